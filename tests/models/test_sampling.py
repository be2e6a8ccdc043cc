"""Sampling: the cached way draws the reference's codes, whatever the batch; the draw itself is right."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import priors
from support.priors import CLASSES, K
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqscale.models import causal, sampling
from vqscale.models.sampling import choose, draw_uniforms, guidance_weights, sample_codes
from vqscale.seeding import key_of, uniform

KINDS = ("pixelcnn", "transformer")


def build(grid, upper=(), dtype: torch.dtype = torch.float64, kind: str = "pixelcnn", **changes) -> Any:
    if kind == "pixelcnn":
        changes = {"attention_every": 2, "output_layers": 2, "residual": 20} | changes
    return priors.build(kind, grid, upper, **changes).to(dtype)


def inputs(batch: int, upper) -> tuple[Tensor, list[Tensor], Tensor]:
    rng = torch.Generator().manual_seed(4)
    label = torch.arange(batch) % (CLASSES + 1)
    return label, [torch.randint(K, (batch, *grid), generator=rng) for grid in upper], torch.arange(batch) * 7 + 1000


def _logits(state: Any, codes: Tensor, label: Tensor, above: list[Tensor]) -> Iterator[Tensor]:
    """Of every position, given the codes before it."""
    state.reset(label, above)
    for row in range(codes.shape[1]):
        state.begin_row(row)
        state.row.copy_(codes[:, row])
        yield from (state.next_logits(column) for column in range(codes.shape[2]))
        state.end_row(row)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "grid, upper, changes",
    [
        ((6, 6), [], {}),
        ((5, 7), [], {"attention_every": 0, "filter": 3}),
        ((3, 1), [], {"filter": 7}),
        ((1, 5), [], {"residual": 256}),
        ((6, 4), [(3, 2)], {"conditioning_hidden": 24}),
        ((4, 4), [(1, 2), (2, 2)], {"attention_every": 1}),
        ((6, 6), [], {"kind": "transformer"}),
        ((5, 7), [], {"kind": "transformer", "heads": 2, "residual": 256}),
        ((3, 1), [(3, 1)], {"kind": "transformer"}),
        ((6, 4), [(3, 2)], {"kind": "transformer", "conditioning_hidden": 24}),
        ((4, 4), [(1, 2), (2, 2)], {"kind": "transformer"}),
    ],
)
def test_cached_equals_reference(grid, upper, changes, dtype):
    """Code for code, and the logits to rounding. Training mode must not matter: there is no key, so no dropout."""
    model = build(grid, upper, dtype, dropout=0.5, class_dropout=0.5, **changes)
    label, above, ids = inputs(5, upper)
    cached = sample_codes(model, label, above, seed=3, sample_ids=ids)
    assert torch.equal(cached, sample_codes(model, label, above, seed=3, sample_ids=ids, cached=False))
    assert cached.shape == (5, *grid) and cached.unique().numel() > 2
    with torch.inference_mode():
        state = model.sampling_weights(dtype).state(5)
        logits = torch.stack(list(_logits(state, cached, label, above)), dim=-1)
        expected = model(cached, label, above).flatten(2)
    assert (logits - expected).abs().max() < (1e-11 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"temperature": 1.3, "temperature_end": 0.3},
        {"top_k": 3},
        {"top_p": 0.6},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
        {"guidance": 1.5},
        {"guidance": 2.0, "guidance_schedule": "linear"},
        {"guidance": 2.0, "guidance_schedule": "cosine", "guidance_interval": [0.2, 0.8]},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_reference_with_options(kind, options):
    model = build((5, 4), [(2, 2)], kind=kind)
    label, above, ids = inputs(4, [(2, 2)])
    plain = sample_codes(model, label, above, seed=3, sample_ids=ids)
    cached = sample_codes(model, label, above, seed=3, sample_ids=ids, **options)
    assert torch.equal(cached, sample_codes(model, label, above, seed=3, sample_ids=ids, cached=False, **options))
    assert not torch.equal(cached, plain)  # the option is read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sample_is_the_same_in_any_batch(dtype, kind):
    model = build((6, 5), [(3, 3)], dtype, kind)
    label, above, ids = inputs(8, [(3, 3)])
    whole = sample_codes(model, label, above, seed=1, sample_ids=ids)
    for cut in ([1] * 8, [3, 3, 2]):
        parts = [
            sample_codes(model, part, [above_part], seed=1, sample_ids=part_ids)
            for part, above_part, part_ids in zip(label.split(cut), above[0].split(cut), ids.split(cut), strict=True)
        ]
        assert torch.equal(whole, torch.cat(parts))
    other = sample_codes(model, label, above, seed=2, sample_ids=ids)
    moved = sample_codes(model, label, above, seed=1, sample_ids=ids + 1)
    assert not torch.equal(whole, other) and not torch.equal(whole, moved)


@pytest.mark.parametrize("kind", KINDS)
def test_class_and_guidance_move_the_samples(kind):
    model, ids = build((6, 6), kind=kind), torch.arange(4)
    codes = [sample_codes(model, torch.full((4,), c), seed=0, sample_ids=ids) for c in range(CLASSES + 1)]
    assert all(not torch.equal(codes[0], other) for other in codes[1:])
    unconditional = sample_codes(model, torch.full((4,), 1), seed=0, sample_ids=ids, guidance=-1.0)
    assert torch.equal(unconditional, codes[CLASSES])  # (1 + w) c - w u at w = -1 is u


@pytest.mark.parametrize("upper", [[], [(2, 2)]])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_near_and_is_that_of_the_conditioning_stack_too(kind, upper):
    model = build((4, 4), upper, dtype=torch.float32, kind=kind).eval()
    label, above, _ = inputs(3, upper)
    codes = torch.randint(K, (3, 4, 4), generator=torch.Generator().manual_seed(5))
    dtypes = []
    for conv in (m for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
        conv.register_forward_hook(lambda module, given, out: dtypes.append(out.dtype))
    with torch.inference_mode():
        state = model.sampling_weights(torch.bfloat16).state(3)
        low = torch.stack(list(_logits(state, codes, label, above)), dim=-1).view(3, K, 4, 4)
        assert low.dtype == torch.bfloat16 and set(dtypes) == ({torch.bfloat16} if upper else set())
        full = model(codes, label, above)
    assert (low - full).norm() < 2e-2 * full.norm()
    assert next(model.parameters()).dtype == torch.float32


def test_uniforms_are_addressed():
    ids = torch.tensor([5, 2**40])
    drawn = draw_uniforms(9, 1, ids, 6)
    assert drawn.shape == (6, 2)
    assert drawn[4, 1].item() == uniform(9, key_of("sample"), 1, 2**40, 4)
    assert torch.equal(drawn[:, :1], draw_uniforms(9, 1, ids[:1], 6))
    assert not torch.equal(drawn, draw_uniforms(9, 0, ids, 6))


def test_draw_follows_the_distribution():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = choose(logits.expand(4000, -1), grid)
    share = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(share.double(), torch.softmax(logits[0].double(), 0), atol=1e-3)
    cold = choose(logits.expand(4000, -1), grid, temperature=0.5)
    assert torch.allclose(
        torch.bincount(cold, minlength=4).double() / 4000, torch.softmax(2 * logits[0].double(), 0), atol=1e-3
    )


def test_truncation_keeps_the_likeliest():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    rows = logits.expand(1000, -1)
    assert set(choose(rows, grid, top_k=2).tolist()) == {1, 2}
    assert set(choose(rows, grid, top_p=0.65).tolist()) == {1, 2}  # 0.4 + 0.3 is the first to reach it
    assert set(choose(rows, grid, top_p=0.75).tolist()) == {1, 2, 3}
    assert set(choose(rows, grid, top_p=1e-9).tolist()) == {1}
    assert set(choose(rows, grid, top_k=9).tolist()) == {0, 1, 2, 3}
    ties = torch.zeros(1, 4)
    assert set(choose(ties.expand(1000, -1), grid, top_k=2).tolist()) == {0, 1}


def test_draw_at_the_edges():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    last = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert choose(logits, last).item() == 1 and choose(logits, torch.zeros(1, dtype=torch.float64)).item() == 0
    assert choose(logits.flip(1), torch.zeros(1, dtype=torch.float64)).item() == 1  # never a code of probability 0


def test_temperature_changes_linearly_from_the_first_code_to_the_last(monkeypatch):
    temperatures: list[float] = []

    def likeliest(logits: Tensor, _uniform: Tensor, *, temperature: float | Tensor, **_rest: Any) -> Tensor:
        temperatures.append(float(temperature))
        return logits.argmax(dim=-1)

    monkeypatch.setattr(sampling, "choose", likeliest)
    sample_codes(build((2, 3)), torch.tensor([0]), seed=0, sample_ids=torch.tensor([0]), temperature_end=0.5)
    assert temperatures == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    temperatures.clear()
    sample_codes(build((2, 2)), torch.tensor([0]), seed=0, sample_ids=torch.tensor([0]), temperature=0.7)
    assert temperatures == pytest.approx([0.7] * 4)


@pytest.mark.parametrize(
    ("schedule", "interval", "expected"),
    [
        ("constant", (0, 1), [2, 2, 2, 2, 2]),
        ("linear", (0, 1), [0, 0.5, 1, 1.5, 2]),
        ("cosine", (0, 1), [0, 0.2929, 1, 1.7071, 2]),
        ("constant", (0.25, 0.6), [0, 2, 2, 0, 0]),
        ("linear", (0.5, 1), [0, 0, 1, 1.5, 2]),
    ],
)
def test_the_guidance_weight_changes_along_the_codes(schedule, interval, expected):
    assert guidance_weights(2.0, schedule, interval, 5).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_before_the_interval_are_those_without_guidance(kind):
    """And a batch drawn with other weights before leaves nothing of them behind."""
    model = build((5, 4), kind=kind)
    label, _, ids = inputs(6, [])
    weights = model.sampling_weights(torch.float64)
    given: dict[str, Any] = {"seed": 1, "sample_ids": ids, "weights": weights}
    plain = sample_codes(model, label, **given)
    whole = sample_codes(model, label, guidance=5.0, **given)
    late = sample_codes(model, label, guidance=5.0, guidance_interval=[0.5, 1], **given)
    assert torch.equal(late.flatten(1)[:, :10], plain.flatten(1)[:, :10]) and not torch.equal(late, plain)
    assert not torch.equal(late, whole)
    assert torch.equal(sample_codes(model, label, guidance=5.0, **given), whole)
    nowhere = sample_codes(model, label, guidance=5.0, guidance_interval=[0.01, 0.02], **given)
    assert torch.equal(nowhere, plain)  # no code stands there


def test_progress_is_reported_row_by_row():
    model, seen = build((4, 3)), []
    label, ids = torch.tensor([0]), torch.tensor([0])
    threads = torch.get_num_threads()
    sample_codes(model, label, seed=0, sample_ids=ids, progress=lambda done, rows: seen.append((done, rows)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)] and torch.get_num_threads() == threads


def test_leaves_the_global_generator_alone():
    model = build((3, 3))
    before = torch.get_rng_state()
    sample_codes(model, torch.tensor([0]), seed=0, sample_ids=torch.tensor([0]))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind, blocks", [("pixelcnn", 1), ("transformer", 2)])
def test_memory_per_sample_counts_what_is_held(kind, blocks):
    model = build((6, 4), [(3, 2)], kind=kind)
    small = model.sampling_weights(torch.float64).state(3)
    keys_and_values = blocks * 2 * 16 * 24 * 8  # per attention block: two, of hidden 16 at 24 places in float64
    assert keys_and_values < small.bytes_per_sample() < 100 * keys_and_values


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": torch.tensor([0, 4])}, r"labels 0 \.\.\. 4 do not fit a prior of 3 classes"),
        ({"label": torch.tensor([-1, 0])}, r"labels -1 \.\.\. 0"),
        ({"sample_ids": torch.arange(3)}, r"label has shape \(2,\), sample_ids \(3,\)"),
        ({"upper": []}, r"codes above have shapes \[\], the prior needs \[\(2, 2, 2\)\]"),
        ({"temperature": -1.0}, "temperature=-1.0 must be >= 0"),
        ({"temperature_end": -0.5}, "temperature_end=-0.5 must be >= 0"),
        ({"temperature": float("nan")}, "temperature=nan must be >= 0"),
        ({"temperature_end": float("inf")}, "temperature_end=inf must be >= 0"),
        ({"top_p": 0.0}, r"top_p=0.0 in \(0, 1\]"),
        ({"top_p": float("nan")}, r"top_p=nan in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1 must be >= 0"),
        ({"guidance": float("nan")}, "guidance=nan finite"),
        ({"guidance_schedule": "step"}, "guidance_schedule=step: choose from constant, linear, cosine"),
        ({"guidance_interval": [0.8, 0.2]}, r"guidance_interval=\[0.8, 0.2\]: takes \[first, last\]"),
        ({"guidance_interval": [0.5]}, r"guidance_interval=\[0.5\]"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    good = {"label": torch.tensor([0, 1]), "upper": [torch.zeros(2, 2, 2, dtype=torch.int64)]}
    good |= {"seed": 0, "sample_ids": torch.arange(2)}
    with pytest.raises(ValueError, match=message):
        sample_codes(build((4, 4), [(2, 2)]), **(good | change))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_are_not_finite_end_sampling(kind):
    """Weights may all be finite and their products not."""
    model = build((3, 3), dtype=torch.float32, kind=kind)
    with torch.no_grad():
        model.logits.weight.fill_(3e38)
    with pytest.raises(ValueError, match="logits are not finite in row 0: weights too large for torch.float32"):
        sample_codes(model, torch.tensor([0]), seed=0, sample_ids=torch.tensor([0]))


RISING = {"guidance": 0.7, "guidance_schedule": "linear"}
CASES = [("pixelcnn", {}), ("pixelcnn", RISING), ("transformer", {}), ("transformer", {"top_p": 0.8})]


def _memory(state: Any) -> list[int]:
    tensors = [state.codes, state.row, state.above, state.positions, *state.buffers]
    return [t.data_ptr() for t in [*tensors, *(b for block in state.blocks for b in block.buffers)]]


@pytest.mark.parametrize("kind, options", CASES)
def test_a_second_batch_uses_the_same_memory_and_draws_what_a_fresh_one_does(kind, options):
    model = build((6, 5), [(3, 3)], kind=kind)
    label, above, ids = inputs(8, [(3, 3)])
    weights, drawn, memory = model.sampling_weights(torch.float64), [], []
    for batch in (slice(4), slice(4, 8)):
        given = {"seed": 1, "sample_ids": ids[batch], **options}
        drawn.append(sample_codes(model, label[batch], [above[0][batch]], weights=weights, **given))
        memory.append(_memory(weights.state(8 if "guidance" in options else 4)))
        assert torch.equal(drawn[-1], sample_codes(model, label[batch], [above[0][batch]], **given))
    assert memory[0] == memory[1]
    assert not torch.equal(drawn[0], drawn[1])


class _NoHostReads(TorchDispatchMode):
    """Refuses what would make a captured graph wait for the host, or take another course in a replay."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), name
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind, options", CASES)
def test_a_row_reads_nothing_back_and_may_be_done_twice(kind, options, monkeypatch):
    model = build((6, 5), [(3, 3)], kind=kind)
    label, above, ids = inputs(4, [(3, 3)])
    expected = sample_codes(model, label, above, seed=1, sample_ids=ids, temperature_end=0.0, **options)
    plain = sampling.RowSampler._choose

    def twice(sampler: Any) -> Tensor:
        with _NoHostReads():
            plain(sampler)
            return plain(sampler)

    monkeypatch.setattr(sampling.RowSampler, "_choose", twice)
    drawn = sample_codes(model, label, above, seed=1, sample_ids=ids, temperature_end=0.0, **options)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("kind, options", CASES)
@pytest.mark.parametrize("grid", [(6, 5), (9, 2), (1, 4)])
def test_the_layout_of_other_devices_draws_the_same(kind, options, grid, monkeypatch):
    """Whole products, and attention to masked rows above in quarters of the grid."""
    model = build(grid, [(3, 3)], kind=kind)
    label, above, ids = inputs(4, [(3, 3)])
    expected = sample_codes(model, label, above, seed=1, sample_ids=ids, **options)
    monkeypatch.setattr(causal, "on_cpu", lambda tensor: False)
    assert torch.equal(sample_codes(model, label, above, seed=1, sample_ids=ids, **options), expected)


@pytest.mark.parametrize("height", [1, 2, 5, 8, 32])
def test_attention_reads_all_rows_above_and_has_few_lengths(height):
    read = [causal.attended_rows(row, height) for row in range(height)]
    assert all(row <= n < height or n == row == 0 for row, n in enumerate(read)) and len(set(read)) <= 5


def test_what_cannot_be_captured_is_told_once_and_drawn_eagerly(monkeypatch, caplog):
    model, (label, above, ids) = build((3, 4)), inputs(3, [])
    expected = sample_codes(model, label, above, seed=2, sample_ids=ids)

    def refuse(self: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(sampling.RowSampler, "_capture", refuse)
    init = sampling.RowSampler.__init__

    def on_a_gpu(self: Any, state: Any, options: Any) -> None:
        init(self, state, options)
        self._captures = options.graphs

    monkeypatch.setattr(sampling.RowSampler, "__init__", on_a_gpu)
    assert torch.equal(sample_codes(model, label, above, seed=2, sample_ids=ids, graphs=False), expected)
    assert not caplog.records
    assert torch.equal(sample_codes(model, label, above, seed=2, sample_ids=ids), expected)
    (record,) = caplog.records
    assert record.getMessage().endswith("which is slower: operation not permitted when stream is capturing")


def test_kernels_that_cannot_be_compiled_run_one_by_one_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU whose machine has no C compiler."""

    def fails(_function: Any) -> Any:
        def compiled(*_tensors: Tensor) -> None:
            raise RuntimeError("no C compiler was found\nand much more")

        return compiled

    monkeypatch.setattr(causal, "on_cpu", lambda _tensor: False)
    monkeypatch.setattr(torch, "compile", fails)
    store = causal.fused(lambda out, x: out.copy_(causal.normalise(x)))
    x, out = torch.randn(2, 8), torch.zeros(2, 8)
    for _ in range(2):
        store(out.zero_(), x)
        assert torch.equal(out, causal.normalise(x))
    assert [record.message for record in caplog.records if record.name == "vqscale"] == [
        "sampling goes on with plain kernels, which is slower: no C compiler was found"
    ]


def test_an_operation_without_memory_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_function: Any) -> Any:
        def compiled(*_tensors: Tensor) -> None:
            raise torch.OutOfMemoryError("out of memory")

        return compiled

    monkeypatch.setattr(causal, "on_cpu", lambda _tensor: False)
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(torch.OutOfMemoryError):
        causal.fused(lambda out, x: out.copy_(x))(torch.zeros(2, 8), torch.randn(2, 8))
