"""What both kinds of prior owe: causal without a blind spot, conditioned, recomputable, the same on any topology."""

import math
from typing import Any

import pytest
import torch
from support.priors import KINDS, SMALL, K, build, draw
from torch import Tensor, nn

from vqscale.models.dropout import dropout_key
from vqscale.models.init import initialise
from vqscale.models.prior import code_nll, nll, resize_nearest
from vqscale.sources import PRIORS
from vqscale.sources import build as build_described

ATTENTION = [("pixelcnn", {"attention_every": 0}), ("pixelcnn", {"attention_every": 1}), ("transformer", {})]


class Rows(nn.Module):
    """Stands for the code embedding and hands out a leaf tensor, so that gradients reach every place's input."""

    def __init__(self, leaf: Tensor):
        super().__init__()
        self.leaf = leaf

    def forward(self, codes: Tensor) -> Tensor:
        return self.leaf


@pytest.mark.parametrize("upper", [[], [(2, 2)]], ids=["top", "lower"])
@pytest.mark.parametrize("kind, changes", ATTENTION)
def test_causal_without_blind_spot(kind, changes, upper):
    """Output i has zero gradient from inputs >= i and a non-zero one from every input before i."""
    model = build(kind, upper=upper, **changes).double()
    height, width = model.grid
    leaf = torch.randn(1, height, width, 16, dtype=torch.float64, requires_grad=True)
    model.embedding = Rows(leaf)
    out = model(draw((1, height, width)), torch.tensor([1]), [draw((1, *grid)) for grid in upper])
    weights = torch.randn(K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for place in range(height * width):
        value = (out.flatten(2)[0, :, place] * weights).sum()
        (grad,) = torch.autograd.grad(value, leaf, retain_graph=True)
        seen = grad[0].abs().amax(dim=-1).flatten()
        assert (seen[place:] == 0).all(), f"output {place} sees inputs {seen[place:].nonzero().flatten() + place}"
        assert (seen[:place] > 0).all(), f"output {place} is blind to {(seen[:place] == 0).nonzero().flatten()}"


@pytest.mark.parametrize("kind, changes", ATTENTION)
def test_class_and_every_upper_level_condition_every_place(kind, changes):
    model = build(kind, (4, 6), [(1, 2), (2, 3)], **changes)
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
    features = torch.randn(2, 2, 3, 7)
    assert torch.equal(resize_nearest(features, (4, 6))[:, 2:, :2], features[:, 1:, :1].expand(2, 2, 2, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_first_rows_alone_give_the_same_logits(kind):
    model = build(kind, (4, 4), [(2, 2)]).eval()
    codes, upper, label = draw((2, 4, 4)), [draw((2, 2, 2))], torch.tensor([0, 3])
    assert torch.allclose(model(codes[:, :3], label, upper), model(codes, label, upper)[:, :, :3], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_near_ln_k_and_is_the_same_from_the_meta_device(kind):
    def empty() -> Any:
        return KINDS[kind](SMALL[kind], num_codes=K, grid=(4, 4), num_classes=3, upper_grids=[(2, 2)])

    model = empty()
    initialise(model, seed=5)
    codes, upper = draw((4, 4, 4)), [draw((4, 2, 2))]
    assert abs(nll(model(codes, torch.tensor([0, 1, 2, 3]), upper), codes).item() - math.log(K)) < 0.1
    with torch.device("meta"):
        bare = empty()
    bare.to_empty(device="cpu")
    initialise(bare, seed=5)
    for (name, a), b in zip(model.named_parameters(), bare.parameters(), strict=True):
        assert torch.equal(a, b), name


def gradients(model: Any, key: Tensor) -> list[Tensor]:
    codes, upper = draw((3, 4, 4)), [draw((3, 2, 2))]
    nll(model(codes, torch.tensor([0, 1, 3]), upper, dropout_key=key), codes).backward()
    gathered = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [g for g in gathered if g is not None]


@pytest.mark.slow
@pytest.mark.parametrize("kind, changes", ATTENTION[1:])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, inside dynamo
def test_recompute_and_compile_give_the_same_gradients_and_touch_no_generator(kind, changes):
    changes = changes | {"class_dropout": 0.5}
    key = dropout_key(1, torch.tensor([5, 6, 1 << 40]))
    plain = build(kind, (4, 4), [(2, 2)], **changes)
    checkpointed = build(kind, (4, 4), [(2, 2)], activation_checkpointing=True, **changes)
    before = torch.get_rng_state()
    expected = gradients(plain, key)
    assert len(expected) == len(list(plain.parameters()))
    recomputed = gradients(checkpointed, key)
    assert torch.equal(before, torch.get_rng_state())
    compiled = build(kind, (4, 4), [(2, 2)], **changes)
    for unit in compiled.wrap_units():
        unit.compile(backend="aot_eager")
    for a, b, c in zip(expected, recomputed, gradients(compiled, key), strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, atol=1e-6)


@pytest.mark.parametrize("kind, graphs", [("pixelcnn", 3), ("transformer", 1)])
def test_blocks_of_one_kind_share_one_compiled_graph(kind, graphs):
    """However deep the prior: each block's dropout has a number of its own, and no graph may hold it."""
    compiled: list[object] = []

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    changes = {"attention_every": 2, "output_layers": 10} if kind == "pixelcnn" else {}
    model = build(kind, (4, 4), layers=10, **changes)
    key, codes = dropout_key(1, torch.arange(2)), draw((2, 4, 4))
    with torch.no_grad():
        expected = model(codes, torch.tensor([0, 1]), dropout_key=key)
        torch.compiler.reset()
        for unit in model.wrap_units():
            unit.compile(backend=count, fullgraph=True)
        logits = model(codes, torch.tensor([0, 1]), dropout_key=key)
    assert len(compiled) == graphs
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_keeps_less(kind):
    """The option does something: fewer bytes are saved for backward."""

    def saved(checkpointing: bool) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        model = build(kind, activation_checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(draw((2, 5, 4)), torch.tensor([0, 1]), dropout_key=dropout_key(0, torch.arange(2)))
        return total

    assert saved(True) < saved(False) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_depends_on_the_sample_not_on_the_batch(kind):
    model = build(kind)
    codes, label, key = draw((4, 5, 4)), torch.tensor([0, 1, 2, 0]), dropout_key(1, torch.tensor([9, 8, 7, 6]))
    whole = model(codes, label, dropout_key=key)
    halves = torch.cat([model(codes[s], label[s], dropout_key=key[s]) for s in (slice(0, 1), slice(1, 4))])
    assert torch.allclose(whole, halves, atol=1e-5)
    assert not torch.allclose(whole, model(codes, label), atol=1e-2)
    assert not torch.allclose(whole, model(codes, label, dropout_key=key + 1), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_class_dropout_means_the_null_class(kind):
    model = build(kind, dropout=0.0, class_dropout=0.999999)
    codes, key = draw((2, 5, 4)), dropout_key(1, torch.arange(2))
    without = model(codes, torch.tensor([3, 3]))
    assert torch.equal(model(codes, torch.tensor([0, 1]), dropout_key=key), without)
    assert not torch.equal(model.eval()(codes, torch.tensor([0, 1]), dropout_key=key), without)


@pytest.mark.parametrize("kind, changes, sites", [(*ATTENTION[1], 2 + 3 * 3 + 1), (*ATTENTION[2], 2 + 2 * 3)])
def test_every_dropout_site_and_every_unit_is_numbered_once(kind, changes, sites):
    model = build(kind, (4, 4), [(2, 2)], **changes)
    gathered = [m.layer for m in model.modules() if hasattr(m, "layer")]
    assert sorted(gathered) == list(range(sites))
    inside = {id(p) for unit in model.wrap_units() for p in unit.parameters()}
    outside = {name for name, p in model.named_parameters() if id(p) not in inside}
    edges = {"embedding", "row", "column", "label", "logits", "project", "0"}
    assert {name.split(".")[-2] for name in outside} <= edges


def test_nll_is_the_mean_of_minus_log_p():
    logits, codes = torch.randn(2, K, 3, 4, dtype=torch.float64), draw((2, 3, 4))
    by_hand = -torch.log_softmax(logits, dim=1).gather(1, codes[:, None])[:, 0]
    assert torch.allclose(code_nll(logits, codes), by_hand) and torch.allclose(nll(logits, codes), by_hand.mean())
    assert code_nll(logits.bfloat16(), codes).dtype == torch.float32


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("pixelcnn", {"filter": 4}, "model.filter must be odd, got 4"),
        ("pixelcnn", {"attention_every": 1, "heads": 3}, "model.hidden=16 is not divisible by model.heads=3"),
        ("pixelcnn", {"class_dropout": 1.0}, "class_dropout=1.0: must be at least 0 and below 1"),
        ("transformer", {"conditioning_filter": 2}, "model.conditioning_filter must be odd, got 2"),
        ("transformer", {"heads": 8}, "model.hidden=16 is not divisible by 4 x model.heads=8"),
        ("transformer", {"filter": 3}, "model.filter=3 is a key of model.kind=pixelcnn: leave it out"),
        ("transformer", {"attention_every": 2}, "model.attention_every=2 is a key of model.kind=pixelcnn"),
    ],
)
def test_refuses_a_shape_that_cannot_be(kind, change, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **change)


def test_the_description_says_which_kind():
    described: dict[str, Any] = {"kind": "prior", "num_codes": K, "grid": [4, 4], "upper_grids": [], "classes": ["a"]}
    assert PRIORS == KINDS
    for kind, made in KINDS.items():
        assert type(build_described(described | {"config": {"kind": kind}})) is made
    with pytest.raises(ValueError, match="kind=rnn: choose from pixelcnn, transformer"):
        build_described(described | {"config": {"kind": "rnn"}})
