"""The layout of rosinality/vq-vae-2-pytorch: a random state dict, and a forward written from its names alone."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN, RESIDUAL, DIM, CODES = 128, 32, 64, 512


def port_state(seed: int = 0, residual_layers: int = 2) -> dict[str, Tensor]:
    """A state dict of rosinality/vq-vae-2-pytorch's VQVAE with random weights, of a size that keeps signals alive."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int, transposed: bool = False) -> None:
        shape = (inputs, outputs, kernel, kernel) if transposed else (outputs, inputs, kernel, kernel)
        scale = (inputs * kernel**2 / (4 if transposed else 1)) ** -0.5
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale * 1.3
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.02

    def residual(part: str, first: int) -> int:
        for n in range(first, first + residual_layers):
            conv(f"{part}.blocks.{n}.conv.1", HIDDEN, RESIDUAL, 3)
            conv(f"{part}.blocks.{n}.conv.3", RESIDUAL, HIDDEN, 1)
        return first + residual_layers + 1  # a ReLU comes between

    conv("enc_b.blocks.0", 3, HIDDEN // 2, 4)
    conv("enc_b.blocks.2", HIDDEN // 2, HIDDEN, 4)
    conv("enc_b.blocks.4", HIDDEN, HIDDEN, 3)
    residual("enc_b", 5)
    conv("enc_t.blocks.0", HIDDEN, HIDDEN // 2, 4)
    conv("enc_t.blocks.2", HIDDEN // 2, HIDDEN, 3)
    residual("enc_t", 3)
    conv("quantize_conv_t", HIDDEN, DIM, 1)
    conv("dec_t.blocks.0", DIM, HIDDEN, 3)
    conv(f"dec_t.blocks.{residual('dec_t', 1)}", HIDDEN, DIM, 4, transposed=True)
    conv("quantize_conv_b", DIM + HIDDEN, DIM, 1)
    conv("upsample_t", DIM, DIM, 4, transposed=True)
    conv("dec.blocks.0", 2 * DIM, HIDDEN, 3)
    after = residual("dec", 1)
    conv(f"dec.blocks.{after}", HIDDEN, HIDDEN // 2, 4, transposed=True)
    conv(f"dec.blocks.{after + 2}", HIDDEN // 2, 3, 4, transposed=True)
    for part in ("quantize_t", "quantize_b"):
        state[f"{part}.embed"] = torch.randn(DIM, CODES, generator=generator) * 0.3
        state[f"{part}.cluster_size"] = torch.randint(0, 40, (CODES,), generator=generator).float()
        state[f"{part}.embed_avg"] = state[f"{part}.embed"] * (state[f"{part}.cluster_size"] + 1e-3)
    return state


def port_forward(state: Mapping[str, Tensor], image: Tensor, *, in_place: bool = False) -> tuple[list[Tensor], Tensor]:
    """(codes top and bottom, reconstruction), from the state dict by hand. in_place: as that project before 2021."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], stride, (weight.shape[-1] - 1) // 2)

    def up(x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2, padding=1)

    def residual(x: Tensor, part: str, first: int) -> Tensor:
        for n in (first, first + 1):
            rectified = torch.relu(x)
            inner = conv(rectified, f"{part}.blocks.{n}.conv.1").relu()
            x = conv(inner, f"{part}.blocks.{n}.conv.3") + (rectified if in_place else x)
        return x.relu()

    def quantize(z: Tensor, part: str) -> tuple[Tensor, Tensor]:
        embed = state[f"{part}.embed"]
        flat = z.permute(0, 2, 3, 1).reshape(-1, DIM)
        distance = flat.square().sum(1, keepdim=True) - 2 * flat @ embed + embed.square().sum(0)
        codes = distance.argmin(1).view(len(z), *z.shape[2:])
        return codes, embed.t()[codes].permute(0, 3, 1, 2)

    bottom = conv(conv(image, "enc_b.blocks.0", 2).relu(), "enc_b.blocks.2", 2).relu()
    bottom = residual(conv(bottom, "enc_b.blocks.4"), "enc_b", 5)
    top = residual(conv(conv(bottom, "enc_t.blocks.0", 2).relu(), "enc_t.blocks.2"), "enc_t", 3)
    top_codes, top_vectors = quantize(conv(top, "quantize_conv_t"), "quantize_t")
    decoded = up(residual(conv(top_vectors, "dec_t.blocks.0"), "dec_t", 1), "dec_t.blocks.4")
    bottom_codes, vectors = quantize(conv(torch.cat([decoded, bottom], 1), "quantize_conv_b"), "quantize_b")
    x = torch.cat([up(top_vectors, "upsample_t"), vectors], 1)
    x = up(residual(conv(x, "dec.blocks.0"), "dec", 1), "dec.blocks.4").relu()
    return [top_codes, bottom_codes], up(x, "dec.blocks.6")


def pictures() -> Tensor:
    """Coarse patches of colour: noise would look alike everywhere to an encoder."""
    patches = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(7)) * 2 - 1
    return F.interpolate(patches, (64, 64), mode="nearest")
