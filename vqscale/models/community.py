"""VQ-VAE-2 checkpoints of rosinality/vq-vae-2-pytorch and of what was made from it -> our config and tensors.

In: its state dict: two levels, strides 4 and 2, names with or without `module.` in front.  Out: a VQVAEConfig and a
state dict of a VQVAE, which compute the same codes and reconstructions.

The two networks differ in names alone, with one exception that a state dict does not show. Until January 2021 the first
ReLU of a residual block worked in place, so that the block added to ReLU(x) instead of x; forks still do
(`rectified_skip=True`). Images are in [-1, 1] there as here.
"""

from collections.abc import Mapping

from torch import Tensor

from vqscale.models.quantizer import QuantizerConfig
from vqscale.models.vqvae import VQVAEConfig

_PARTS = {
    "enc_t": "levels.0.encoder",
    "quantize_conv_t": "levels.0.to_code",
    "quantize_t": "levels.0.quantizer",
    "dec_t": "levels.0.decoder",
    "enc_b": "levels.1.encoder",
    "quantize_conv_b": "levels.1.to_code",
    "quantize_b": "levels.1.quantizer",
    "upsample_t": "levels.1.upsample.0.0",
    "dec": "levels.1.decoder",
}
_LEAST_COUNT = 1e-6  # a code that was never used keeps its vector, at a weight of nearly nothing


def convert(
    tensors: Mapping[str, Tensor], where: str, *, rectified_skip: bool = False
) -> tuple[VQVAEConfig, dict[str, Tensor]]:
    """(config, tensors by our names). Sizes are read off the tensors; `check_fits` says whether the rest agrees.

    Raises ValueError naming `where` and the tensor that is missing or is none of that layout.
    """
    given = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    blocks = sum(name.startswith("enc_b.") and name.endswith(".conv.1.weight") for name in given)
    try:
        for name in given:
            if name.partition(".")[0] not in _PARTS:
                raise ValueError(f"{name} is no tensor of a rosinality/vq-vae-2-pytorch model")
        code_dim, num_codes = _shape(given, "quantize_t.embed", (-1, -1))
        residual_hidden, hidden, *_ = _shape(given, "enc_b.blocks.5.conv.1.weight", (-1,) * 4)
        ours = {_our_name(name): tensor for name, tensor in given.items()}
        ours = {name: tensor for name, tensor in ours.items() if ".quantizer." not in name}
        for part in ("quantize_t", "quantize_b"):
            codes = _shape(given, f"{part}.embed", (-1, -1))[1]
            _shape(given, f"{part}.cluster_size", (codes,))
            codebook = _codebook(given[f"{part}.embed"], given[f"{part}.cluster_size"])
            ours |= {f"{_PARTS[part]}.{name}": tensor for name, tensor in codebook.items()}
        config = VQVAEConfig(
            hidden=hidden,
            residual_hidden=residual_hidden,
            residual_layers=blocks,
            downsample=[4, 2],
            quantizer=QuantizerConfig(num_codes=num_codes, code_dim=code_dim),
            rectified_skip=rectified_skip,
        )
    except KeyError as error:
        raise ValueError(f"{where}: {error.args[0]} is missing") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return config, ours


def _shape(given: Mapping[str, Tensor], name: str, expected: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape; -1 = any size."""
    shape = tuple(given[name].shape)
    if len(shape) != len(expected) or any(e not in (-1, size) for size, e in zip(shape, expected, strict=True)):
        raise ValueError(f"{name} has shape {list(shape)}, expected {list(expected)} (-1 = any size)")
    return shape


def _our_name(name: str) -> str:
    """enc_b.blocks.5.conv.1.weight -> levels.1.encoder.5.spatial.weight"""
    part, _, rest = name.partition(".")
    rest = rest.removeprefix("blocks.").replace("conv.1.", "spatial.").replace("conv.3.", "pointwise.")
    return f"{_PARTS[part]}.{rest}"


def _codebook(embed: Tensor, cluster_size: Tensor) -> dict[str, Tensor]:
    """Their [D, K] -> our [K, D]; sums that fit the codes as they are, where theirs differ by a smoothing of counts."""
    embedding = embed.t().contiguous()
    counts = cluster_size.clamp_min(_LEAST_COUNT)
    return {
        "embedding": embedding,
        "cluster_size": counts,
        "embedding_sum": embedding * counts[:, None],
        "updates": embedding.new_zeros(()),
    }
