"""The PixelCNN: causal without a blind spot, conditioned, recomputable, buildable at the paper's size."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from vqscale.models.dropout import dropout_key
from vqscale.models.init import initialise
from vqscale.models.pixelcnn import PixelCNN, PriorConfig, code_nll, nll, resize_nearest

SMALL = PriorConfig(
    hidden=16, residual=12, layers=3, heads=4, output_layers=1, conditioning_layers=2, class_dim=8, dropout=0.2
)
K = 11


def build(config: PriorConfig = SMALL, grid=(5, 4), upper=(), classes: int = 3) -> PixelCNN:
    """A model whose every tensor is random: zeros at the end of branches would hide what a test looks for."""
    model = PixelCNN(config, num_codes=K, grid=grid, num_classes=classes, upper_grids=upper)
    initialise(model, seed=1)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / max(1, parameter[0].numel()) ** 0.5)
    return model


def draw(shape, seed: int = 3, high: int = K) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


class Rows(nn.Module):
    """Stands for the code embedding and hands out a leaf tensor, so that gradients reach every place's input."""

    def __init__(self, leaf: Tensor):
        super().__init__()
        self.leaf = leaf

    def forward(self, codes: Tensor) -> Tensor:
        return self.leaf


@pytest.mark.parametrize("attention_every", [0, 1])
def test_causal_without_blind_spot(attention_every):
    """Output i has zero gradient from inputs >= i and a non-zero one from every input before i."""
    model = build(dataclasses.replace(SMALL, attention_every=attention_every)).double()
    height, width = model.grid
    leaf = torch.randn(1, height, width, SMALL.hidden, dtype=torch.float64, requires_grad=True)
    model.embedding = Rows(leaf)  # type: ignore[assignment]
    out = model(draw((1, height, width)), torch.tensor([1]))
    weights = torch.randn(K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for place in range(height * width):
        value = (out.flatten(2)[0, :, place] * weights).sum()
        (grad,) = torch.autograd.grad(value, leaf, retain_graph=True)
        seen = grad[0].abs().amax(dim=-1).flatten()
        assert (seen[place:] == 0).all(), f"output {place} sees inputs {seen[place:].nonzero().flatten() + place}"
        assert (seen[:place] > 0).all(), f"output {place} is blind to {(seen[:place] == 0).nonzero().flatten()}"


def test_attention_reaches_beyond_the_convolutions():
    """One gated block reaches two places; with attention the last place sees the first."""

    def first_seen(attention_every: int) -> bool:
        model = build(dataclasses.replace(SMALL, layers=1, attention_every=attention_every), grid=(8, 8))
        codes = draw((1, 8, 8))
        changed = codes.clone()
        changed[0, 0, 0] = (codes[0, 0, 0] + 1) % K
        label = torch.tensor([0])
        return not torch.equal(model(codes, label)[..., -1, -1], model(changed, label)[..., -1, -1])

    assert first_seen(1) and not first_seen(0)


def test_class_and_every_upper_level_condition_every_place():
    model = build(dataclasses.replace(SMALL, attention_every=2), grid=(4, 6), upper=[(1, 2), (2, 3)])
    codes, upper = draw((2, 4, 6)), [draw((2, 1, 2), 5), draw((2, 2, 3), 6)]
    label = torch.tensor([0, 2])
    base = model(codes, label, upper)
    other_class = model(codes, torch.tensor([1, 2]), upper)
    assert (other_class[0] - base[0]).abs().amax(dim=0).min() > 0 and torch.equal(other_class[1], base[1])
    for level in range(2):
        changed = [u.clone() for u in upper]
        changed[level][1] = (changed[level][1] + 1) % K
        moved = model(codes, label, changed)
        assert (moved[1] - base[1]).abs().amax(dim=0).min() > 0 and torch.equal(moved[0], base[0])


def test_upper_codes_lie_over_their_own_places():
    assert resize_nearest(torch.tensor([[[0, 1], [2, 3]]]), (4, 4))[0].tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [2, 2, 3, 3],
    ]
    assert resize_nearest(torch.arange(3).view(1, 1, 3), (1, 5))[0, 0].tolist() == [0, 0, 1, 2, 2]


def test_first_rows_alone_give_the_same_logits():
    model = build(dataclasses.replace(SMALL, attention_every=2), grid=(4, 4), upper=[(2, 2)]).eval()
    codes, upper, label = draw((2, 4, 4)), [draw((2, 2, 2))], torch.tensor([0, 3])
    assert torch.allclose(model(codes[:, :3], label, upper), model(codes, label, upper)[:, :, :3], atol=1e-5)


def test_starts_near_ln_k_and_is_the_same_from_the_meta_device():
    config = dataclasses.replace(SMALL, attention_every=2)
    model = PixelCNN(config, num_codes=K, grid=(4, 4), num_classes=3)
    initialise(model, seed=5)
    codes = draw((4, 4, 4))
    assert abs(nll(model(codes, torch.tensor([0, 1, 2, 3])), codes).item() - math.log(K)) < 0.1
    with torch.device("meta"):
        empty = PixelCNN(config, num_codes=K, grid=(4, 4), num_classes=3)
    empty.to_empty(device="cpu")
    initialise(empty, seed=5)
    for (name, a), b in zip(model.named_parameters(), empty.parameters(), strict=True):
        assert torch.equal(a, b), name


def gradients(model: PixelCNN, key: Tensor) -> list[Tensor]:
    codes, upper = draw((3, 4, 4)), [draw((3, 2, 2))]
    nll(model(codes, torch.tensor([0, 1, 3]), upper, dropout_key=key), codes).backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [g for g in found if g is not None]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, inside dynamo
def test_recompute_and_compile_give_the_same_gradients_and_touch_no_generator():
    config = dataclasses.replace(SMALL, attention_every=2, class_dropout=0.5)
    key = dropout_key(1, torch.tensor([5, 6, 1 << 40]))
    plain = build(config, (4, 4), [(2, 2)])
    checkpointed = build(dataclasses.replace(config, activation_checkpointing=True), (4, 4), [(2, 2)])
    before = torch.get_rng_state()
    expected = gradients(plain, key)
    assert len(expected) == len(list(plain.parameters()))
    recomputed = gradients(checkpointed, key)
    assert torch.equal(before, torch.get_rng_state())
    compiled = build(config, (4, 4), [(2, 2)])
    for unit in compiled.wrap_units():
        unit.compile(backend="aot_eager")
    for a, b, c in zip(expected, recomputed, gradients(compiled, key), strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, atol=1e-6)


def test_activation_checkpointing_keeps_less():
    """The option does something: fewer bytes are saved for backward."""

    def saved(checkpointing: bool) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        model = build(dataclasses.replace(SMALL, activation_checkpointing=checkpointing))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(draw((2, 5, 4)), torch.tensor([0, 1]), dropout_key=dropout_key(0, torch.arange(2)))
        return total

    assert saved(True) < saved(False) / 2


def test_dropout_depends_on_the_sample_not_on_the_batch():
    model = build()
    codes, label, key = draw((4, 5, 4)), torch.tensor([0, 1, 2, 0]), dropout_key(1, torch.tensor([9, 8, 7, 6]))
    whole = model(codes, label, dropout_key=key)
    halves = torch.cat([model(codes[s], label[s], dropout_key=key[s]) for s in (slice(0, 1), slice(1, 4))])
    assert torch.allclose(whole, halves, atol=1e-5)
    assert not torch.allclose(whole, model(codes, label), atol=1e-2)
    assert not torch.allclose(whole, model(codes, label, dropout_key=key + 1), atol=1e-2)


def test_class_dropout_means_the_null_class():
    model = build(dataclasses.replace(SMALL, dropout=0.0, class_dropout=0.999999))
    codes, key = draw((2, 5, 4)), dropout_key(1, torch.arange(2))
    without = model(codes, torch.tensor([3, 3]))
    assert torch.equal(model(codes, torch.tensor([0, 1]), dropout_key=key), without)
    assert not torch.equal(model.eval()(codes, torch.tensor([0, 1]), dropout_key=key), without)


def test_every_dropout_site_and_every_unit_is_numbered_once():
    model = build(dataclasses.replace(SMALL, attention_every=1), (4, 4), [(2, 2)])
    sites = [m.layer for m in model.modules() if hasattr(m, "layer")]
    assert sorted(sites) == list(range(len(sites))) and len(sites) == 2 + 3 * 3 + 1
    inside = {id(p) for unit in model.wrap_units() for p in unit.parameters()}
    outside = [name for name, p in model.named_parameters() if id(p) not in inside]
    assert all(name.split(".")[-2] in {"embedding", "row", "column", "label", "logits", "0"} for name in outside)


def test_nll_is_the_mean_of_minus_log_p():
    logits, codes = torch.randn(2, K, 3, 4, dtype=torch.float64), draw((2, 3, 4))
    by_hand = -torch.log_softmax(logits, dim=1).gather(1, codes[:, None])[:, 0]
    assert torch.allclose(code_nll(logits, codes), by_hand) and torch.allclose(nll(logits, codes), by_hand.mean())
    assert code_nll(logits.bfloat16(), codes).dtype == torch.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"filter": 4}, "model.filter must be odd, got 4"),
        ({"attention_every": 1, "heads": 3}, "model.hidden=16 is not divisible by model.heads=3"),
        ({"class_dropout": 1.0}, "model.class_dropout must be in"),
    ],
)
def test_refuses_a_shape_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        build(dataclasses.replace(SMALL, **change))


PAPER = {  # Razavi et al. 2019, ImageNet priors; the lower level also has 20 conditioning layers
    "top": (dict(hidden=512, residual=2048, layers=20, attention_every=5, heads=8, output_layers=20), (32, 32), []),
    "bottom": (dict(hidden=512, residual=1024, layers=20, conditioning_layers=20), (64, 64), [(32, 32)]),
}


@pytest.mark.parametrize("level", PAPER)
def test_paper_size_on_the_meta_device(level):
    sizes, grid, upper = PAPER[level]
    with torch.device("meta"):
        model = PixelCNN(PriorConfig(**sizes), num_codes=512, grid=grid, num_classes=1000, upper_grids=upper)
    counts = model.num_parameters()
    print(f"{level}: {counts['layers'] / 1e6:.1f}M in layers, {counts['embeddings'] / 1e6:.2f}M in embeddings")
    assert counts["layers"] + counts["embeddings"] == sum(p.numel() for p in model.parameters())
    names = [type(block).__name__ for block in model.blocks]
    assert names.count("GatedBlock") == 20 and names.count("AttentionBlock") == (4 if level == "top" else 0)
    if level == "top":
        assert names[5] == "AttentionBlock" and len(model.output) == 20
        assert 0.8e9 < counts["layers"] < 0.9e9  # 1.6B with full 5x5 kernels, of which 12 of 25 taps would be masked
    else:
        assert model.conditioning is not None and len(model.conditioning.blocks) == 20
        assert 0.5e9 < counts["layers"] < 0.6e9
    assert all(p.numel() == math.prod(p.shape) and p.is_meta for p in model.parameters())
