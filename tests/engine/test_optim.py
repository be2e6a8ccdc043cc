import pytest
import torch
from support.training import TinyModel
from torch import nn

from vqscale.engine.optim import build_adamw, learning_rate_at, moments, set_learning_rate


@pytest.mark.parametrize(
    ("seen", "schedule", "expected"),
    [
        (0, "constant", 1.0 / 100),
        (49, "constant", 50.0 / 100),
        (98, "constant", 99.0 / 100),
        (99, "constant", 1.0),
        (10_000, "constant", 1.0),
        (99, "cosine", 1.0),
        (99 + 400, "cosine", 0.1 + 0.9 * 0.5),
        (99 + 800, "cosine", 0.1),
        (5_000, "cosine", 0.1),
    ],
)
def test_learning_rate_at_known_places(seen: int, schedule: str, expected: float) -> None:
    rate = learning_rate_at(seen, peak=1.0, warmup=99, schedule=schedule, total=899, final=0.1)
    assert rate == pytest.approx(expected, rel=1e-12)


def test_learning_rate_without_warmup_starts_at_its_peak() -> None:
    assert learning_rate_at(0, peak=3e-4, warmup=0, schedule="constant", total=10, final=0.0) == 3e-4


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule=linear: choose constant or cosine"):
        learning_rate_at(0, peak=1.0, warmup=0, schedule="linear", total=10, final=0.0)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    for rate in rates:
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_that_of_torch(weight_decay: float) -> None:
    rates = [1e-2, 2e-2, 3e-2, 2e-2, 1e-2]
    ours, theirs = TinyModel(), TinyModel()
    steps(ours, build_adamw(ours.parameters(), betas=(0.8, 0.95), weight_decay=weight_decay), rates)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    steps(theirs, torch.optim.AdamW(groups, betas=(0.8, 0.95), foreach=False, fused=False), rates)
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6, msg=name)
    assert not torch.allclose(ours.head.weight, TinyModel().head.weight, atol=1e-2)


def test_state_exists_before_the_first_step() -> None:
    model = TinyModel()
    model.head.bias.requires_grad_(False)
    optimizer = build_adamw(model.parameters(), betas=(0.9, 0.999), weight_decay=0.0)
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    held = moments(optimizer, trained)
    assert held.keys() == {f"{m}.{name}" for m in ("exp_avg", "exp_avg_sq") for name in trained.values()}
    assert all(not tensor.any() for tensor in held.values())
    before = {name: id(tensor) for name, tensor in held.items()}
    steps(model, optimizer, [1e-2])
    assert {name: id(tensor) for name, tensor in moments(optimizer, trained).items()} == before
    assert all(tensor.any() for tensor in held.values())
