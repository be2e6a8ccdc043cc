"""VQ-VAE: shapes, the papers' topology, one update per step under checkpointing and compilation, init from data."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.quantizers import Rank
from support.vqvaes import images, loss_of, update, vqvae
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from vqscale.models.vqvae import VQVAE, ResidualBlock, VQVAEConfig

# ---- shapes and topology


@pytest.mark.parametrize(
    ("downsample", "grids", "names"),
    [
        ([4], [(8, 8)], ["top"]),
        ([4, 2], [(4, 4), (8, 8)], ["top", "bottom"]),
        ([4, 2, 2], [(2, 2), (4, 4), (8, 8)], ["top", "middle", "bottom"]),
        ([2, 8], [(2, 2), (16, 16)], ["top", "bottom"]),
    ],
)
def test_levels_have_their_grids_and_every_weight_learns(downsample, grids, names):
    model = vqvae(downsample, resolution=32)
    image = images(3, 32)
    out = model(image, torch.arange(3))
    assert model.grids == grids and model.level_names == names and model.num_codes == 16
    assert [tuple(c.shape) for c in out.codes] == [(3, h, w) for h, w in grids]
    assert all(c.dtype == torch.int64 for c in out.codes) and out.reconstruction.shape == image.shape
    (F.mse_loss(out.reconstruction, image) + out.commitment).backward()
    # the last convolutions of residual blocks start at 0, so what lies before them learns from the second step on
    still = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert still == {name for name, _ in model.named_parameters() if ".spatial." in name}
    metrics = update(model)
    assert {f"{m}/{n}" for m in ("perplexity", "used_codes", "restarts") for n in names} == metrics.keys()
    assert [m.shape for m in metrics.values()] == [torch.Size([])] * len(metrics)


def test_codes_decode_to_exactly_the_reconstruction():
    for downsample in ([4], [4, 2], [4, 2, 2]):
        model = vqvae(downsample, resolution=32).train()
        image = images(2, 32)
        out = model(image)
        codes = model.encode(image)
        assert all(torch.equal(a, b) for a, b in zip(codes, out.codes, strict=True))
        assert torch.equal(model.decode(codes), out.reconstruction)
        assert torch.equal(model.decode([c.int() for c in codes]), out.reconstruction)


def test_decode_upper_depends_on_the_codes_that_it_is_given_alone():
    model = vqvae([4, 2, 2], resolution=32, num_codes=8)
    codes = model.encode(images(4, 32))
    image, top = model.decode_upper(codes[:2]), model.decode_upper(codes[:1])
    assert image.shape == top.shape == (4, 3, 32, 32)
    assert not torch.equal(image, model.decode_upper([codes[0], 7 - codes[1]]))
    assert not torch.equal(top, model.decode_upper([7 - codes[0]]))
    assert not torch.equal(image, top) and not torch.equal(image, model.decode(codes))
    assert torch.equal(model.decode_upper(codes), model.decode(codes))


@pytest.mark.parametrize("downsample", [[4], [4, 2], [4, 2, 2]])
def test_a_forward_pass_gives_what_the_upper_levels_decode_to_where_it_is_asked(downsample):
    model, image = vqvae(downsample, resolution=32), images(3, 32)
    for training in (False, True):
        out, plain = model.train(training)(image, upper=True), model(image)
        assert plain.upper == [] and len(out.upper) == len(downsample) - 1
        torch.testing.assert_close(out.reconstruction, plain.reconstruction)
        for count, picture in enumerate(out.upper, 1):
            torch.testing.assert_close(picture, model.decode_upper(out.codes[:count]))
    assert all(q.images == 6 for q in model.quantizers.values())  # counted once a pass


def test_the_error_of_the_top_alone_teaches_what_it_needs():
    model, image = vqvae(), images()
    F.mse_loss(model(image, torch.arange(4), upper=True).upper[0], image).backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    parts = {".".join(name.split(".")[1:3]) for name in learning}
    assert parts == {"0.encoder", "0.to_code", "1.encoder", "1.upsample", "1.decoder"}


def test_the_bottom_sees_the_quantized_top():
    model = vqvae()
    image = images()
    before = model.encode(image)
    model.levels[0].quantizer.embedding += 5
    after = model.encode(image)
    assert not torch.equal(before[1], after[1])


def kernels(module: nn.Module) -> list[tuple]:
    """(type, in, out, kernel, stride) of the convolutions in order of use; nested for residual blocks."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    short = {nn.Conv2d: "conv", nn.ConvTranspose2d: "up"}
    return [(short[type(c)], c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs]


def test_vqvae2_at_paper_size_has_the_published_layers():
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig(), resolution=256)
    residual = [("conv", 128, 64, 3, 1), ("conv", 64, 128, 1, 1)] * 2
    top, bottom = model.levels
    assert model.grids == [(32, 32), (64, 64)]
    assert kernels(bottom.encoder) == [
        ("conv", 3, 64, 4, 2),
        ("conv", 64, 128, 4, 2),
        ("conv", 128, 128, 3, 1),
        *residual,
    ]
    assert kernels(top.encoder) == [("conv", 128, 64, 4, 2), ("conv", 64, 128, 3, 1), *residual]
    assert kernels(top.to_code) == [("conv", 128, 64, 1, 1)]
    assert kernels(bottom.to_code) == [("conv", 192, 64, 1, 1)]
    assert kernels(top.decoder) == [("conv", 64, 128, 3, 1), *residual, ("up", 128, 64, 4, 2)]
    assert kernels(bottom.upsample) == [("up", 64, 64, 4, 2)]
    assert kernels(bottom.decoder) == [("conv", 128, 128, 3, 1), *residual, ("up", 128, 64, 4, 2), ("up", 64, 3, 4, 2)]
    assert all(tuple(level.quantizer.embedding.shape) == (512, 64) for level in model.levels)
    # with the 32 residual channels of the popular port
    with torch.device("meta"):
        port = VQVAE(VQVAEConfig(residual_hidden=32), resolution=256)
    assert sum(p.numel() for p in port.parameters()) == PORT_PARAMETERS


# conv + bias by hand: encoders, residual blocks, 1x1s, decoders, upsampler
_RESIDUAL = 2 * (128 * 32 * 9 + 32 + 32 * 128 + 128)
PORT_PARAMETERS = (
    (3 * 64 * 16 + 64) + (64 * 128 * 16 + 128) + (128 * 128 * 9 + 128) + _RESIDUAL  # bottom encoder
    + (128 * 64 * 16 + 64) + (64 * 128 * 9 + 128) + _RESIDUAL  # top encoder
    + (128 * 64 + 64) + (192 * 64 + 64)  # to the codes
    + (64 * 128 * 9 + 128) + _RESIDUAL + (128 * 64 * 16 + 64)  # top decoder
    + (64 * 64 * 16 + 64)  # upsampler
    + (128 * 128 * 9 + 128) + _RESIDUAL + (128 * 64 * 16 + 64) + (64 * 3 * 16 + 3)  # decoder
)  # fmt: skip


def test_vqvae_of_2017_at_paper_size():
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig(hidden=256, residual_hidden=256, downsample=[4]), resolution=32)
    (level,) = model.levels
    assert model.grids == [(8, 8)] and len(model.wrap_units()) == 4
    assert kernels(level.encoder)[:2] == [("conv", 3, 128, 4, 2), ("conv", 128, 256, 4, 2)]


def test_three_levels_at_1024_pixels():
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig(downsample=[8, 2, 2]), resolution=1024)
    assert model.grids == [(32, 32), (64, 64), (128, 128)]
    assert model.levels[2].decoder[0].in_channels == 3 * 64  # all three quantized maps reach the image's decoder


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"downsample": [4, 3]}, r"downsample=\[4, 3\]: 3 is not a power of 2"),
        ({"downsample": [1]}, "1 is not a power of 2"),
        ({"downsample": []}, "1, 2 or 3 levels, not 0"),
        ({"downsample": [2, 2, 2, 2]}, "not 4"),
        ({"hidden": 1}, "hidden=1"),
        ({"residual_layers": -1}, "residual_layers=-1"),
    ],
)
def test_bad_configs_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        VQVAEConfig(**options)


def test_resolutions_that_do_not_fit_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="resolution=100 is not divisible by 8"):
        VQVAE(VQVAEConfig(), resolution=100)
    with pytest.raises(ValueError, match=r"\(32, 16\).*resolution 16"):
        vqvae().encode(torch.zeros(1, 3, 32, 16))


# ---- one update per step, whatever wraps the forward


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_step(model: VQVAE, call: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    position = torch.arange(4) + 4 * step
    loss_of(call, images(seed=step), position).backward()
    actual = gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    update(model, step)
    return actual


def test_checkpointing_counts_once_and_changes_no_gradient():
    plain, checkpointed = vqvae(), vqvae(activation_checkpointing=True)
    calls = 0
    for block in checkpointed.wrap_units():
        compute = block.compute

        def counted(x: Tensor, compute=compute) -> Tensor:
            nonlocal calls
            calls += 1
            return compute(x)

        block.compute = counted
    for model in (plain, checkpointed):
        loss_of(model, images()).backward()
        assert [q.counts.sum().item() for q in model.quantizers.values()] == [4 * 2 * 2, 4 * 4 * 4]
    assert calls == 2 * len(checkpointed.wrap_units())  # it did recompute
    torch.testing.assert_close(gradients(plain), gradients(checkpointed), rtol=0, atol=0)
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    update(checkpointed)


def test_checkpointing_the_whole_model_is_caught_not_counted_twice():
    model = vqvae([4])
    level = model.levels[0]
    image = images().requires_grad_()

    def recomputed(x: Tensor) -> Tensor:
        return level.quantizer(level.project(level.encoder(x), None)).commitment

    model._count(4)
    with set_checkpoint_early_stop(False):
        checkpoint(recomputed, image, use_reentrant=False).backward()
    with pytest.raises(AssertionError, match="statistics of 8 images after 4 images"):
        update(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at activations' .grad
@pytest.mark.parametrize(
    "units", ["", "compiled_units", "wrap_units"], ids=["whole model", "networks", "residual blocks"]
)
def test_compiled_training_equals_eager(units):
    eager, compiled = vqvae(), vqvae()
    call: nn.Module = compiled
    if not units:
        call = torch.compile(compiled, backend="aot_eager")  # type: ignore[assignment]
    else:
        for unit in getattr(compiled, units)():
            unit.compile(backend="aot_eager")
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (eager, compiled)]
    try:
        for step in range(3):
            expected = train_step(eager, eager, step, optimizers[0])
            actual = train_step(compiled, call, step, optimizers[1])
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)
    finally:
        torch.compiler.reset()


def test_evaluation_and_encode_gather_nothing():
    model = vqvae()
    before = copy.deepcopy(model.state_dict())
    model.train().encode(images())
    model.eval()(images())
    assert all(q.counts.sum() == 0 and q.images == 0 for q in model.quantizers.values()) and model._images == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_skipped_step_discards_its_statistics():
    model, fresh = vqvae(), vqvae()
    model(images(seed=7))
    assert update(model, applied=False) == {}
    for one in (model, fresh):
        one(images(seed=8), torch.arange(4))
        update(one)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in fresh.state_dict().items())


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_two_ranks_equal_one_in_float64_with_one_reduction_per_step(codebook):
    one = vqvae(codebook=codebook, restart_below=0.5).double()
    for q in one.quantizers.values():  # two codes that nothing uses
        q.cluster_size[:2] = 0.01
        q.embedding[:2] += 50
        q.embedding_sum.copy_(q.embedding * q.cluster_size[:, None])
    ranks = [copy.deepcopy(one) for _ in range(2)]
    restarts = 0
    for step in range(4):
        image, position = images(8, seed=step).double(), torch.arange(8) + 8 * step
        one(image, position)
        metrics = update(one, step)
        restarts += sum(int(v) for name, v in metrics.items() if name.startswith("restarts"))
        for model, part, where in zip(ranks, image.chunk(2), position.chunk(2), strict=True):
            model(part[:2], where[:2])
            model(part[2:], where[2:])
        parts: list[Tensor] = []
        for rank, model in enumerate(ranks):
            parts.append(packed(copy.deepcopy(model), rank, step))
        total = torch.stack(parts).sum(0)
        for rank, model in enumerate(ranks):
            fused = Fused(total)
            update(model, step, ranks=Rank(rank, 2, fused))
            assert fused.calls == 1
        for name, value in one.state_dict().items():
            torch.testing.assert_close(ranks[0].state_dict()[name], value, rtol=0, atol=1e-12)
            assert torch.equal(ranks[0].state_dict()[name], ranks[1].state_dict()[name])
    assert restarts >= 4


class Fused:
    """An all_reduce whose answer is known, and how often it was asked."""

    def __init__(self, total: Tensor):
        self.total, self.calls = total, 0

    def __call__(self, flat: Tensor) -> None:
        self.calls += 1
        flat.copy_(self.total)


def packed(model: VQVAE, rank: int, step: int) -> Tensor:
    """The flat tensor that a rank would sum with the others'."""

    class Seen(Exception):
        pass

    kept: list[Tensor] = []

    def keep(flat: Tensor) -> None:
        kept.append(flat.clone())
        raise Seen

    with pytest.raises(Seen):
        update(model, step, ranks=Rank(rank, 2, keep))
    return kept[0]


def test_bf16_autocast_keeps_codebook_and_losses_in_float32():
    model = vqvae(hidden=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images(2), torch.arange(2))
    assert out.commitment.dtype == out.codebook_loss.dtype == torch.float32
    update(model)
    assert all(b.dtype == torch.float32 for b in model.buffers())


def test_channels_last_gives_the_same_codes_and_close_images():
    model, image = vqvae().eval(), images()
    expected = model(image)
    actual = model.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual.reconstruction, expected.reconstruction)


def test_a_training_step_leaves_the_global_generator_alone():
    model = vqvae(activation_checkpointing=True, restart_below=0.5)
    before = torch.get_rng_state()
    loss_of(model, images(), torch.arange(4)).backward()
    update(model)
    assert torch.equal(before, torch.get_rng_state())


def test_wrap_units_are_all_the_residual_blocks():
    model = vqvae([4, 2], residual_layers=2)
    assert len(model.wrap_units()) == 8 and all(isinstance(unit, ResidualBlock) for unit in model.wrap_units())
    block = ResidualBlock(VQVAEConfig(hidden=4, residual_hidden=2))
    nn.init.zeros_(block.pointwise.weight), nn.init.zeros_(block.pointwise.bias)
    assert torch.equal(block(-torch.ones(1, 4, 3, 3)), -torch.ones(1, 4, 3, 3))  # the skip carries x, not ReLU(x)
    assert math.prod(model.grids[0]) == 4


def test_on_a_gpu_every_image_is_encoded_and_decoded_channels_last():
    """Extraction and evaluation give rows of pixels; a tensor without memory tells what a GPU would get."""
    with FakeTensorMode(), torch.device("cuda"):
        model = VQVAE(VQVAEConfig(hidden=16, residual_hidden=8), resolution=32)
        features = model._features(torch.zeros(2, 3, 32, 32))
        assert all(one.is_contiguous(memory_format=torch.channels_last) for one in features)
        codes = model.encode(torch.zeros(2, 3, 32, 32))
        assert [level.device.type for level in codes] == ["cuda", "cuda"]
        assert model.decode(codes).is_contiguous(memory_format=torch.channels_last)
