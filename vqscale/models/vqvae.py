"""VQ-VAE with N levels of codes: 1 is van den Oord et al. 2017, 2 and 3 are VQ-VAE-2 (Razavi et al. 2019).

In: images [b, 3, r, r] in [-1, 1].  Out: reconstructions of the same shape; codes [b, h, w] per level, top first.

Legend: b batch, r resolution, c hidden units, d code dimension, h w a level's grid; levels are listed top (coarsest)
first.

    image -> encoder -> encoder          each level's encoder works on the features of the level below
                |          |
                |       1x1, quantize -> top codes
                |          |
                |       decoder            the level below is quantized knowing what the top already says
                |          |
             concat -> 1x1, quantize -> bottom codes
                           |
    all levels' quantized maps, upsampled by transposed convolutions, concat -> decoder -> image
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqscale.config import level_names
from vqscale.fields import NonNegativeInt, Range, check_values
from vqscale.models.causal import CheckpointableBlock
from vqscale.models.codebook import addressed_cells, fit_codebook, sample_size
from vqscale.models.init import RELU_GAIN, with_init_scale
from vqscale.models.quantizer import Quantized, QuantizerConfig, Ranks, VectorQuantizer, update_quantizers
from vqscale.seeding import key_of, mix


@dataclass(frozen=True)
class VQVAEConfig:
    hidden: Annotated[int, Range(ge=2)] = 128  # channels of encoders and decoders
    residual_hidden: Annotated[int, Range(ge=2)] = 64  # channels inside a residual block
    residual_layers: NonNegativeInt = 2  # residual blocks in each encoder and decoder
    downsample: list[Annotated[int, Range(ge=2)]] = field(default_factory=lambda: [4, 2])  # bottom level first
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    activation_checkpointing: bool = False  # recompute residual blocks in the backward pass to save memory
    rectified_skip: bool = False  # residual blocks add to ReLU(x), not to x: some imported checkpoints need it

    def __post_init__(self) -> None:
        level_names(len(self.downsample))
        for stride in self.downsample:
            if stride < 2 or stride & (stride - 1):
                raise ValueError(f"downsample={list(self.downsample)}: {stride} is not a power of 2 (2, 4, 8, ...)")
        check_values(self)


Image = Float[Tensor, "b 3 _ _"]
Codes = Int[Tensor, "b _ _"]  # of one level


class VQVAEOutput(NamedTuple):
    reconstruction: Image  # not clamped
    codes: list[Codes]  # top first
    commitment: Float[Tensor, ""]  # beta * mean (z - sg[e])^2, summed over levels: add it to the reconstruction loss
    codebook_loss: Float[Tensor, ""]  # mean (sg[z] - e)^2, summed over levels: a report without gradient
    upper: Sequence[Image] = ()  # where asked for: reconstructions from the first level's codes, the first two's, …


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, gain: float = 1.0) -> nn.Conv2d:
    return with_init_scale(nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2), gain)


def _upconv(inputs: int, outputs: int, *, gain: float = 1.0) -> nn.ConvTranspose2d:
    return with_init_scale(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1), gain)


class ResidualBlock(CheckpointableBlock):
    """x + 1x1(ReLU(3x3(ReLU(x)))). The last convolution starts at 0, so the block starts as x."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.activation_checkpointing = config.activation_checkpointing
        self.rectified_skip = config.rectified_skip
        self.spatial = _conv(config.hidden, config.residual_hidden, 3, gain=RELU_GAIN)
        self.pointwise = _conv(config.residual_hidden, config.hidden, 1, gain=0.0)

    def compute(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        rectified = F.relu(x)
        return (rectified if self.rectified_skip else x) + self.pointwise(F.relu(self.spatial(rectified)))


def _residual_stack(config: VQVAEConfig) -> list[nn.Module]:
    return [*(ResidualBlock(config) for _ in range(config.residual_layers)), nn.ReLU()]


def encoder(inputs: int, stride: int, config: VQVAEConfig) -> nn.Sequential:
    """[b, inputs, h, w] -> [b, c, h / stride, w / stride]: 4x4 stride-2 convolutions, a 3x3, residual blocks."""
    widths = [inputs, config.hidden // 2] + [config.hidden] * (int(math.log2(stride)) - 1)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [_conv(before, after, 4, stride=2, gain=RELU_GAIN), nn.ReLU()]
    return nn.Sequential(*layers, _conv(widths[-1], config.hidden, 3, gain=RELU_GAIN), *_residual_stack(config))


def decoder(inputs: int, outputs: int, stride: int, config: VQVAEConfig) -> nn.Sequential:
    """[b, inputs, h, w] -> [b, outputs, h * stride, w * stride]: a 3x3, residual blocks, 4x4 up-convolutions."""
    widths = [config.hidden] * int(math.log2(stride))
    if len(widths) > 1:
        widths[-1] //= 2
    layers: list[nn.Module] = [_conv(inputs, config.hidden, 3), *_residual_stack(config)]
    for before, after in pairwise(widths):
        layers += [_upconv(before, after, gain=RELU_GAIN), nn.ReLU()]
    return nn.Sequential(*layers, _upconv(widths[-1], outputs))


def upsampler(channels: int, stride: int) -> nn.Sequential:
    """[b, channels, h, w] -> [b, channels, h * stride, w * stride] by learned transposed convolutions."""
    return nn.Sequential(*(_upconv(channels, channels) for _ in range(int(math.log2(stride)))))


class Level(nn.Module):
    """One level's networks; level 0 is the top, so that `index` levels lie above."""

    def __init__(self, config: VQVAEConfig, index: int):
        super().__init__()
        strides = config.downsample[::-1]  # top first
        bottom = index == len(strides) - 1
        dim = config.quantizer.code_dim
        self.encoder = encoder(3 if bottom else config.hidden, strides[index], config)
        self.to_code = _conv(config.hidden + (dim if index else 0), dim, 1)
        self.quantizer = VectorQuantizer(config.quantizer)
        self.upsample = nn.ModuleList(upsampler(dim, strides[index - 1]) for _ in range(index))
        self.decoder = decoder(dim * (index + 1), 3 if bottom else dim, strides[index], config)

    def project(
        self, features: Float[Tensor, "b c h w"], decoded: Float[Tensor, "b d h w"] | None
    ) -> Float[Tensor, "b d h w"]:
        """What is quantized: from this level's features and what the level above decodes."""
        return self.to_code(features if decoded is None else torch.cat([decoded, features], dim=1))

    def gather(
        self, maps: Sequence[Float[Tensor, "b d _ _"]], vectors: Float[Tensor, "b d h w"]
    ) -> list[Float[Tensor, "b d h w"]]:
        """All levels' quantized maps so far on this level's grid: those above, upsampled, then this one's."""
        return [*(up(above) for up, above in zip(self.upsample, maps, strict=True)), vectors]


class VQVAE(nn.Module):
    """Images <-> codes. A new one has no codebook yet: `initialise` (models/init.py) it or load weights."""

    public_methods = ("encode", "decode", "decode_upper")  # what is called besides forward, on wrapped models too

    def __init__(self, config: VQVAEConfig, *, resolution: int):
        """Raises ValueError if the resolution is not divisible by the product of the strides."""
        super().__init__()
        total = math.prod(config.downsample)
        if resolution < total or resolution % total:
            raise ValueError(f"resolution={resolution} is not divisible by {total}, the product of downsample")
        self.config = config
        self.resolution = resolution
        self.level_names = level_names(len(config.downsample))
        levels = (Level(config, index) for index in range(len(config.downsample)))
        self.levels: list[Level] = nn.ModuleList(levels)  # type: ignore[assignment]
        self._images = 0  # forwarded in training since the last update of the codebooks

    @property
    def num_codes(self) -> int:
        return self.config.quantizer.num_codes

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(h, w) of each level's codes, top first."""
        sides = [self.resolution // math.prod(self.config.downsample[: n + 1]) for n in range(len(self.levels))]
        return [(side, side) for side in reversed(sides)]

    @property
    def quantizers(self) -> dict[str, VectorQuantizer]:
        """By level name, top first."""
        return {name: level.quantizer for name, level in zip(self.level_names, self.levels, strict=True)}

    def encoding_names(self) -> list[str]:
        """Tensors that codes depend on: all but what only the last decoder uses. The decoders of upper levels count."""
        decoding = tuple(f"levels.{len(self.levels) - 1}.{part}." for part in ("upsample", "decoder"))
        return [name for name in self.state_dict() if not name.startswith(decoding)]

    def freeze(self, parts: Collection[str]) -> None:
        """Keep these parts as they are in training. encoder: all parameters that codes depend on; quantizer: the
        codebooks. With both, codes stay the same. For the plain model, before it is wrapped."""
        if "encoder" in parts:
            parameters = dict(self.named_parameters())
            for name in parameters.keys() & set(self.encoding_names()):
                parameters[name].requires_grad_(False)
        for quantizer in self.quantizers.values():
            quantizer.frozen = "quantizer" in parts

    def wrap_units(self) -> list[nn.Module]:
        """The residual blocks: what the engine may checkpoint and shard on its own."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]

    def compiled_units(self) -> list[nn.Module]:
        """Whole encoders and decoders: more can be fused in them than in residual blocks. The quantizers stay eager."""
        return [part for level in self.levels for part in (level.encoder, *level.upsample, level.decoder)]

    def forward(self, image: Image, position: Int[Tensor, " b"] | None = None, upper: bool = False) -> VQVAEOutput:
        """Reconstruct images in [-1, 1]; in training also gather the codebooks' statistics.

        `position`: the samples' positions in the training order, which make restarts independent of the number of
        ranks. `upper`: also reconstruct from the upper levels' codes alone, as `decode_upper` does.
        """
        if self.training:
            self._count(len(image))
        quantized, decoded = self._descend(self._features(image), len(self.levels), position, track=True, upper=upper)
        assert decoded is not None
        reconstruction, *others = decoded.split(len(image))
        return VQVAEOutput(
            reconstruction,
            [q.codes for q in quantized],
            torch.stack([q.commitment for q in quantized]).sum(),
            torch.stack([q.codebook_loss for q in quantized]).sum(),
            others,
        )

    @torch.compiler.disable
    def _count(self, images: int) -> None:
        self._images += images

    def encode(self, image: Image) -> list[Codes]:
        """Codes of images in [-1, 1], top first."""
        features, last = self._features(image), len(self.levels) - 1
        quantized, decoded = self._descend(features, last)
        z = self.levels[last].project(features[last], decoded)
        return [*(q.codes for q in quantized), self.levels[last].quantizer.nearest(rearrange(z, "b d h w -> b h w d"))]

    def decode(self, codes: Sequence[Codes]) -> Image:
        """Images (not clamped) of codes, top first."""
        return self._decode([level.quantizer.lookup(c) for level, c in zip(self.levels, codes, strict=True)])

    def decode_upper(self, codes: Sequence[Codes]) -> Image:
        """Images from the codes of the upper levels, top first; every level below them is its mean code."""
        upper = self.levels[: len(codes)]
        return self._decode([level.quantizer.lookup(c) for level, c in zip(upper, codes, strict=True)])

    def _decode(self, vectors: Sequence[Tensor]) -> Tensor:
        return self.levels[-1].decoder(self._maps([v.to(self.levels[-1].to_code.weight.dtype) for v in vectors]))

    def _maps(self, vectors: Sequence[Tensor]) -> Tensor:
        """What the last decoder reads of the code vectors of all levels, or of the upper ones and the others' means."""
        maps: list[Tensor] = []
        for level, (h, w), quantized in zip_longest(self.levels, self.grids, vectors):
            if quantized is None:
                mean = level.quantizer.mean_vector().to(vectors[0].dtype)
                quantized = repeat(mean, "d -> b d h w", b=len(vectors[0]), h=h, w=w)
            maps = level.gather(maps, quantized)
        return torch.cat(maps, dim=1)

    def _features(self, image: Tensor) -> list[Tensor]:
        """Encoder features [b, c, h, w], top first; a lower level's are the input of the one above."""
        if image.shape[-2:] != (self.resolution, self.resolution):
            raise ValueError(f"images of {tuple(image.shape[-2:])} pixels for a model of resolution {self.resolution}")
        image = image.to(self.levels[-1].to_code.weight.dtype)
        if image.is_cuda:  # what its convolutions are fast in; on a CPU the last bits would differ
            image = image.contiguous(memory_format=torch.channels_last)
        features = [image]
        for level in reversed(list(self.levels)):
            features.insert(0, level.encoder(features[0]))
        return features[:-1]

    def _descend(
        self,
        features: Sequence[Tensor],
        depth: int,
        position: Tensor | None = None,
        track: bool = False,
        upper: bool = False,
    ) -> tuple[list[Quantized], Tensor | None]:
        """Quantize and decode the first `depth` levels: (quantized, what the last of them decodes). With `upper`, the
        last decoder also decodes the upper levels' codes alone: once, in one batch, as a sharded module should run."""
        quantized: list[Quantized] = []
        maps: list[Tensor] = []
        decoded: Tensor | None = None
        for level, feature in zip(self.levels, features[:depth], strict=False):
            quantized.append(level.quantizer(level.project(feature, decoded), position, track))
            maps = level.gather(maps, quantized[-1].vectors)
            read = torch.cat(maps, dim=1)
            if upper and level is self.levels[-1]:
                vectors = [q.vectors for q in quantized]
                read = torch.cat([read, *(self._maps(vectors[:count]) for count in range(1, len(vectors)))])
            decoded = level.decoder(read)
        return quantized, decoded

    def update_codebooks(
        self, ranks: Ranks, *, seed: int, images_seen: int, applied: bool, learning_rate: float
    ) -> dict[str, Tensor]:
        """Call once after each optimizer step, on every rank. See `update_quantizers`."""
        images, self._images = self._images, 0
        key = mix(seed, key_of("restarts"), images_seen)
        return update_quantizers(
            self.quantizers, ranks, key=key, images=images, applied=applied, learning_rate=learning_rate
        )

    @torch.no_grad()
    def init_codebooks(
        self,
        batches: Iterable[Tensor],
        *,
        seed: int,
        between: Callable[[], None] = lambda: None,
        keep: Collection[str] = (),
    ) -> None:
        """Fit the codebooks, but those of the levels in `keep`, to batches of images, level by level from the top: a
        lower level's encoder vectors depend on the quantized levels above. For the plain model, before it is wrapped.
        `between` is called before each batch is encoded."""
        images = list(batches)
        if not images:
            raise ValueError("codebook init needs at least one batch of images, got 0")
        training = self.training
        self.eval()
        for index, (name, level) in enumerate(zip(self.level_names, self.levels, strict=True)):
            if name in keep:
                continue
            key = mix(seed, key_of("codebook"), key_of(name))
            vectors = self._sample_vectors(images, index, key, between)
            level.quantizer.set_codebook(fit_codebook(vectors, self.num_codes, key))
        self.train(training)

    def _sample_vectors(self, images: Sequence[Tensor], index: int, key: int, between: Callable[[], None]) -> Tensor:
        """Encoder vectors [n, d] of one level: the same number of grid cells of every image."""
        level, cells = self.levels[index], math.prod(self.grids[index])
        count = min(cells, math.ceil(sample_size(self.num_codes) / sum(len(batch) for batch in images)))
        chosen: list[Tensor] = []
        for batch in images:
            between()
            features = self._features(batch.to(level.quantizer.embedding.device))
            _, decoded = self._descend(features, index)
            z = rearrange(level.project(features[index], decoded), "b d h w -> b (h w) d")
            for vectors in z:
                chosen.append(vectors[addressed_cells(cells, count, key, len(chosen)).to(z.device)])
        return torch.cat(chosen).to(level.quantizer.embedding.dtype)
