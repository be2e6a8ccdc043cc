"""What is ZeRO's own: its state in and out of checkpoints, the averaged weights, what it refuses."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.training import TinyConfig, TinyModel, losses, metrics, sample, train

from vqscale.engine.checkpoint import find_latest
from vqscale.engine.parallel import make_engine
from vqscale.files import read_json
from vqscale.topology import Topology


def config(run_dir: Path | str, **changes: Any) -> TinyConfig:
    return replace(TinyConfig(run_dir=str(run_dir)), **{"trackers": [], **changes})


def saved(run_dir: Path) -> dict[str, torch.Tensor]:
    latest = find_latest(run_dir / "checkpoints")
    assert latest is not None
    return latest.read("")


def forwards(model: torch.nn.Module, images_seen: int) -> Any:
    """An evaluation that computes with the weights it was given."""
    x = torch.stack([sample(p, 1) for p in range(4)])
    yield "held_out", float(model(x).square().sum())
    yield "features", float(model.features(x).square().sum())  # type: ignore[operator]


def train_and_evaluate(settings: TinyConfig) -> Any:
    return train(replace(settings, evaluate_every=80), evaluate=forwards)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a single process that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("alone")
    run_ranks(train_and_evaluate, 1, config(run_dir))
    return run_dir


def assert_same_run(ours: Path, expected: Path, tolerance: float) -> None:
    """Losses, held-out figures and the last checkpoint, all within `tolerance`."""
    assert losses(ours).keys() == losses(expected).keys()
    assert max(abs(losses(ours)[seen] - loss) for seen, loss in losses(expected).items()) <= tolerance
    tensors = saved(ours)
    for name, tensor in saved(expected).items():
        torch.testing.assert_close(tensors.pop(name), tensor, rtol=0, atol=tolerance, msg=name)
    assert not tensors


def figures(run_dir: Path) -> list[tuple[int, float, float]]:
    return [
        (line["images_seen"], line["held_out"], line["features"]) for line in metrics(run_dir) if "held_out" in line
    ]


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_run_leaves_what_a_single_process_leaves(alone: Path, tmp_path: Path, strategy: str) -> None:
    """Evaluation runs on the averaged weights, in forward and in another method, and training goes on unharmed."""
    run_ranks(train_and_evaluate, 2, config(tmp_path, strategy=strategy))
    assert_same_run(tmp_path, alone, 1e-5)
    assert figures(tmp_path) == [pytest.approx(line, rel=1e-5) for line in figures(alone)] and len(figures(alone)) == 2
    command = read_json(tmp_path / "command.json")
    assert (command["engine"], command["strategy"]) == ("deepspeed", strategy)
    numel = sum(p.numel() for p in TinyModel().parameters())
    held = command["bytes_per_rank"]
    assert held.keys() == {"parameters", "optimizer", "master"}
    for what, whole in (("master", 4 * numel), ("optimizer", 8 * numel)):
        assert len(held[what]) == 2 and whole <= sum(held[what]) <= whole + 256  # padding
        assert max(held[what]) <= 0.5 * whole + 256
    assert max(held["parameters"]) <= 4 * numel / (2 if strategy == "zero3" else 1) + 64


@pytest.mark.slow
def test_a_leg_under_zero_continues_another_strategys_run(alone: Path, tmp_path: Path) -> None:
    legs = [("single", 1, 40), ("zero2", 2, 80), ("single", 1, 160)]
    _run_legs(tmp_path, legs)
    assert_same_run(tmp_path, alone, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "legs",
    [
        [("zero2", 2, 56), ("zero2", 1, 104), ("zero2", 2, 160)],
        [("zero1", 2, 56), ("zero3", 2, 104), ("zero1", 4, 160)],
        [("fsdp", 2, 56), ("zero3", 4, 104), ("fsdp", 2, 160)],
        [("zero3", 4, 56), ("hsdp", 4, 80), ("zero2", 2, 120), ("ddp", 2, 160)],
    ],
    ids=lambda legs: "-".join(f"{strategy}@{world}" for strategy, world, _ in legs),
)
def test_every_strategy_continues_every_other(alone: Path, tmp_path: Path, legs: list[tuple[str, int, int]]) -> None:
    _run_legs(tmp_path, legs)
    assert_same_run(tmp_path, alone, 1e-5)


def _run_legs(run_dir: Path, legs: list[tuple[str, int, int]]) -> None:
    seen = 0
    for strategy, world, total in legs:
        results = run_ranks(train_and_evaluate, world, config(run_dir, strategy=strategy, total_images=total))
        assert sorted(p for result in results for p in result["consumed"]) == list(range(seen, total))
        seen = total


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupted_at_the_same_topology_it_is_bit_identical(tmp_path: Path, strategy: str, precision: str) -> None:
    settings = config(tmp_path / "whole", strategy=strategy, precision=precision)
    run_ranks(train, 2, settings)
    for total in (72, 160):
        run_ranks(train, 2, replace(settings, run_dir=str(tmp_path / "parts"), total_images=total))
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 0.0)


@pytest.fixture(scope="module")
def alone_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a single process."""
    run_dir = tmp_path_factory.mktemp("alone_in_bf16")
    run_ranks(train, 1, config(run_dir, precision="bf16"))
    return losses(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "world"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4), ("zero2", 2), ("zero3", 2)])
def test_bf16_under_every_strategy(tmp_path: Path, alone_in_bf16: dict[int, float], strategy: str, world: int) -> None:
    """fp32 weights, bf16 arithmetic: another split of the batch rounds differently, by about 2^-9 of a value."""
    ranks = run_ranks(train, world, config(tmp_path, precision="bf16", strategy=strategy))
    held = [tensor for name, tensor in ranks[0]["tensors"].items() if name.startswith("model.")]
    assert {tensor.dtype for tensor in held if tensor.is_floating_point()} == {torch.float32}
    many = losses(tmp_path)
    assert max(abs(many[seen] - loss) / loss for seen, loss in alone_in_bf16.items()) < 1e-2


def test_what_zero_cannot_do_is_refused(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = replace(topology, strategy="zero2")
    with pytest.raises(ValueError, match="precision=fp64 under strategy=zero2: choose fp32 or bf16"):
        make_engine(TinyModel(), zero, TinyConfig(precision="fp64"), 1)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match="strategy=zero2 needs DeepSpeed, which cannot be imported here"):
        make_engine(TinyModel(), zero, TinyConfig(), 1)
