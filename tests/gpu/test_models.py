"""Models on a GPU against the CPU: integers bit for bit, floats to their precision, sampling code for code."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import priors
from support.devices import DEVICES, gradients, moved, relative_error
from support.quantizers import ALONE
from support.vqvaes import images, loss_of, vqvae
from torch import Tensor

from vqscale.models.codebook import draw_pool, nearest_codes, pick_candidates, weighted_order
from vqscale.models.dropout import Dropout, drop_labels, drop_mask, dropout_key, layer_word
from vqscale.models.prior import nll
from vqscale.models.sampling import sample_codes
from vqscale.topology import set_arithmetic

KINDS = ("pixelcnn", "transformer")
GRID, UPPER = (6, 5), [(3, 3)]


@pytest.fixture(params=["fp32", "tf32", "bf16"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """As a config would set it, and taken back."""
    set_arithmetic(request.param, deterministic=False)
    yield request.param
    set_arithmetic("", deterministic=False)


def tolerance(precision: str) -> float:
    """Relative, of a forward pass."""
    return {"fp32": 1e-5, "tf32": 2e-3, "bf16": 2e-2}[precision]


def autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


# --- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_keys_masks_and_labels_are_equal(device: str) -> None:
    position = torch.tensor([0, 1, 5, 123_456_789_012, (1 << 40) + 3])
    keys = dropout_key(7, position)
    assert torch.equal(dropout_key(7, position.to(device)).cpu(), keys)
    for layer in (0, 3, 59):
        for p in (0.1, 0.5, 0.9):
            mask = drop_mask(keys.to(device), layer_word(layer), 4_099, p)
            assert torch.equal(mask.cpu(), drop_mask(keys, layer_word(layer), 4_099, p))
    label = torch.arange(5)
    dropped = drop_labels(label.to(device), keys.to(device), 0.5, 9)
    assert torch.equal(dropped.cpu(), drop_labels(label, keys, 0.5, 9))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_dropout_drops_the_same_elements(device: str) -> None:
    torch.compiler.reset()
    drop, keys, x = Dropout(0.3, 5), dropout_key(1, torch.arange(4)), torch.randn(4, 33, 7)
    compiled = torch.compile(drop, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    found = compiled(x.to(device), keys.to(device)).cpu()
    torch.compiler.reset()
    assert torch.equal(found == 0, drop(x, keys) == 0) and torch.equal(drop(x.to(device), keys.to(device)).cpu(), found)


@pytest.mark.parametrize("device", DEVICES)
def test_restarts_are_drawn_from_the_same_cells(device: str) -> None:
    rng = torch.Generator().manual_seed(0)
    vectors, errors = torch.randn(6, 64, 8, generator=rng), torch.rand(6, 64, generator=rng)
    position = torch.arange(6) + (1 << 40)
    expected = pick_candidates(vectors, errors, position, 16)
    found = pick_candidates(*moved([vectors, errors, position], device), 16)
    assert torch.equal(found.cpu(), expected)
    index = position % 6
    pool = draw_pool(found, index.to(device), 6, 16, key=11)
    assert torch.equal(pool.cpu(), draw_pool(expected, index, 6, 16, key=11))
    assert torch.equal(weighted_order(errors[0].to(device), 5).cpu(), weighted_order(errors[0], 5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codes", [16, 512, 5000])  # 5000 are compared in parts
def test_nearest_codes_are_equal_except_in_near_ties(device: str, codes: int) -> None:
    rng = torch.Generator().manual_seed(1)
    vectors, codebook = torch.randn(4_096, 64, generator=rng), torch.randn(codes, 64, generator=rng)
    found = nearest_codes(vectors.to(device), codebook.to(device)).cpu()
    distances = torch.cdist(vectors.double(), codebook.double()).square()
    best, second = distances.topk(2, largest=False).values.unbind(1)
    differs = found != distances.argmin(1)
    assert ((second - best) / best)[differs].numel() == 0 or ((second - best) / best)[differs].max() < 1e-5
    assert differs.float().mean() < 1e-2


# --- floats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_s_logits_and_gradients(device: str, kind: str, precision: str) -> None:
    model, codes, label = priors.build(kind, GRID, UPPER), priors.draw((3, *GRID)), torch.tensor([0, 1, 3])
    upper, key = [priors.draw((3, *UPPER[0]))], dropout_key(1, torch.arange(3))
    expected = model(codes, label, upper, dropout_key=key)
    expected_gradients = gradients(model, nll(expected, codes))
    model.to(device)
    codes, label, key, above = moved([codes, label, key, *upper], device)
    with autocast(device, precision):
        found = model(codes, label, [above], dropout_key=key)
    assert found.device.type == device and relative_error([found], [expected]) <= tolerance(precision)
    error = relative_error(gradients(model, nll(found, codes)), expected_gradients)
    assert error <= {"fp32": 1e-4, "tf32": 2e-2, "bf16": 0.2}[precision]


@pytest.mark.parametrize("device", DEVICES)
def test_a_vqvae_s_codes_loss_and_gradients(device: str) -> None:
    """In true fp32, where these images have no near ties."""
    model, image, position = vqvae().train(), images(), torch.arange(4)
    expected = model(image, position)
    expected_gradients = gradients(model, loss_of(model, image, position))
    model.to(device)
    found = model(image.to(device), position.to(device))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found.codes, expected.codes, strict=True))
    assert relative_error([found.reconstruction], [expected.reconstruction]) <= 1e-5
    assert relative_error([found.commitment], [expected.commitment]) <= 1e-5
    found_gradients = gradients(model, loss_of(model, image.to(device), position.to(device)))
    assert relative_error(found_gradients, expected_gradients) <= 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_decoded_images(device: str, precision: str) -> None:
    model = vqvae().eval()
    with torch.inference_mode():
        codes = model.encode(images())
        expected = model.decode(codes)
        with autocast(device, precision):
            found = model.to(device).decode([level.to(device) for level in codes])
    assert relative_error([found], [expected]) <= tolerance(precision)


@pytest.mark.parametrize("device", DEVICES)
def test_codebooks_learn_the_same(device: str) -> None:
    models = {name: vqvae().train().to(name) for name in dict.fromkeys(("cpu", device))}
    for step in range(3):
        for name, model in models.items():
            loss_of(model, images(seed=step).to(name), torch.arange(4, device=name))
            model.update_codebooks(ALONE, seed=0, images_seen=4 * step, applied=True, learning_rate=1e-3)
    buffers = [[buffer.float() for buffer in models[name].buffers()] for name in (device, "cpu")]
    assert relative_error(*buffers) <= 1e-5


# --- sampling ---------------------------------------------------------------------------------------------------------


def inputs(kind: str, dtype: torch.dtype, device: str) -> tuple[Any, Tensor, list[Tensor], Tensor]:
    model = priors.build(kind, GRID, UPPER).to(dtype).eval()
    label, upper = torch.tensor([0, 1, 2, 3]), priors.draw((4, *UPPER[0]))
    return model.to(device), label.to(device), [upper.to(device)], torch.arange(4) * 7 + 1_000


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.3, "temperature_end": 0.3},
        {"temperature": 0.0},
        {"top_k": 5, "top_p": 0.8},
        {"guidance": 1.5},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_codes_are_the_reference_s_and_the_cpu_s(
    device: str, kind: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """In float64, where no rounding decides. Twice with the same weights: the second batch takes the first one's memory
    and, on a GPU, its graphs."""
    model, label, upper, ids = inputs(kind, torch.float64, device)
    weights = model.sampling_weights(torch.float64)
    for seed in (3, 4):
        drawn = sample_codes(model, label, upper, seed=seed, sample_ids=ids, weights=weights, **options)
        assert drawn.device.type == device
        reference = sample_codes(model, label, upper, seed=seed, sample_ids=ids, cached=False, **options)
        assert torch.equal(drawn, reference)
        alone, label_here, upper_here, _ = inputs(kind, torch.float64, "cpu")
        assert torch.equal(
            drawn.cpu(), sample_codes(alone, label_here, upper_here, seed=seed, sample_ids=ids, **options)
        )
    assert "without CUDA graphs" not in caplog.text


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_rows_are_those_drawn_kernel_by_kernel(device: str, kind: str, dtype: torch.dtype) -> None:
    """In the precisions in which people sample, where another kernel would draw other codes now and then."""
    model, label, upper, ids = inputs(kind, torch.float32, device)
    for seed in range(4):
        options: dict[str, Any] = {"seed": seed, "sample_ids": ids, "dtype": dtype}
        replayed, eager = (sample_codes(model, label, upper, graphs=graphs, **options) for graphs in (True, False))
        assert torch.equal(replayed, eager)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_are_those_of_a_forward_pass(device: str, kind: str, dtype: torch.dtype, limit: float) -> None:
    model, label, upper, _ = inputs(kind, torch.float32, device)
    codes = priors.draw((4, *GRID)).to(device)
    with torch.inference_mode():
        state, found = model.sampling_weights(dtype).state(4), []
        state.reset(label, upper)
        for row in range(GRID[0]):
            state.begin_row(row)
            for column in range(GRID[1]):
                found.append(state.next_logits(column).clone())
                state.row[:, column] = codes[:, row, column]
            state.end_row(row)
        expected = model(codes, label, upper).flatten(2)
    assert relative_error([torch.stack(found, dim=-1)], [expected]) <= limit
