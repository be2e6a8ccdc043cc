"""Vector quantization: encoder vectors -> nearest codes; and the codebook's own learning, once per optimizer step.

In: z [b, d, h, w], any float type.  Out: `Quantized` (vectors [b, d, h, w] in z's type, codes int64 [b, h, w], losses).

`forward` never changes the codebook: while training it only adds to statistics of this rank.  `update_quantizers`,
called after the optimizer step, sums the statistics of all levels over all ranks in one call and learns from them.  The
reason: an update inside a compiled or checkpointed forward gives wrong gradients, or counts twice.

Legend: b batch, d code dimension, h w grid, k codes, c = h w cells of an image; N vectors of the global batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqscale.batch import as_float64
from vqscale.fields import Choice, NonNegativeFloat, NonNegativeInt, PositiveInt, Range, check_values
from vqscale.models.codebook import choose_restarts, draw_pool, nearest_codes, perplexity, pick_candidates

_RESTART_SIZE = 2.0  # a restarted code's EMA count, in units of the threshold: soon dead again if nothing chooses it
_TINY = 1e-6  # below this EMA count (in vectors) a code keeps its place: the ratio of two vanishing numbers is noise
_ADAM_BETAS, _ADAM_EPS = (0.9, 0.999), 1e-8  # Kingma & Ba 2015, the defaults of section 2


@dataclass(frozen=True)
class QuantizerConfig:
    num_codes: Annotated[int, Range(ge=2, le=65536)] = 512  # K; codes are stored as uint16
    code_dim: PositiveInt = 64  # D
    codebook: Annotated[str, Choice("ema", "gradient")] = "ema"  # 2017: appendix A.1 or equation 3
    decay: Annotated[float, Range(ge=0, lt=1)] = 0.99  # gamma of the moving averages
    decay_warmup: NonNegativeInt = 10  # w: gamma is at most (1 + t) / (w + t) in update t, for fast early learning
    commitment: NonNegativeFloat = 0.25  # beta
    restart_below: Annotated[float, Range(ge=0, lt=1)] = 0.1  # of the mean use: codes below it are replaced; 0 = never

    def __post_init__(self) -> None:
        check_values(self)


class Quantized(NamedTuple):
    vectors: Float[Tensor, "b d h w"]  # the codes' vectors; the gradient passes straight through to z
    codes: Int[Tensor, "b h w"]
    commitment: Float[Tensor, ""]  # beta * mean (z - sg[e])^2
    codebook_loss: Float[Tensor, ""]  # mean (sg[z] - e)^2, a report: the codebook learns in `update_quantizers`


class Ranks(Protocol):
    """Who shares a global batch, as `vqscale.topology.Topology` says it."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def all_reduce_(self, tensor: Tensor) -> object:
        """Sum over all ranks, in place."""


@dataclass
class Candidates:
    """Encoder vectors of this rank's images since the last update: what dead codes may restart from."""

    num_codes: int
    rows: list[Tensor] = field(default_factory=list)  # [b, p, d + 1] each: vector, squared error
    positions: list[Tensor] = field(default_factory=list)  # int64 [b] each
    positioned: bool = True

    def add(
        self, vectors: Float[Tensor, "b c d"], errors: Float[Tensor, "b c"], position: Int[Tensor, " b"] | None
    ) -> None:
        """Keep a few vectors of each image. Without positions the draw depends on the topology."""
        self.positioned = position is not None
        if position is None:
            first = sum(len(rows) for rows in self.rows)
            position = torch.arange(first, first + len(vectors), device=vectors.device)
        self.rows.append(pick_candidates(vectors, errors, position, self.num_codes))
        self.positions.append(position)

    def pack(self, key: int, ranks: Ranks) -> Float[Tensor, "s r"]:
        """This rank's rows of the pool that all ranks restart from; see `draw_pool`."""
        rows, position = torch.cat(self.rows), torch.cat(self.positions)
        images = len(rows) * ranks.world_size
        # A global batch is a run of `images` consecutive positions, so the remainder tells its images apart
        index = position % images if self.positioned else position + ranks.rank * len(rows)
        return draw_pool(rows, index, images, self.num_codes, key)


class VectorQuantizer(nn.Module):
    """A codebook of K vectors and its moving averages, all buffers, float32 whatever the model is cast to (float64 if
    the model is).

    `embedding` [k, d] is `embedding_sum` [k, d] / `cluster_size` [k] at all times.  Both start at one vector per code
    (cluster_size 1, embedding_sum = embedding): the first batches then move the codes fast, and no code starts dead.
    """

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        shape = (config.num_codes, config.code_dim)
        self.embedding = nn.Buffer(torch.zeros(shape))
        self.cluster_size = nn.Buffer(torch.zeros(shape[0]))
        self.embedding_sum = nn.Buffer(torch.zeros(shape))
        self.updates = nn.Buffer(torch.zeros(()))  # t, a float like all of its state
        self.counts = nn.Buffer(torch.zeros(shape[0]), persistent=False)
        self.sums = nn.Buffer(torch.zeros(shape), persistent=False)
        if config.codebook == "gradient":
            self.adam_mean = nn.Buffer(torch.zeros(shape))
            self.adam_square = nn.Buffer(torch.zeros(shape))
        self.frozen = False  # statistics are still reported, but nothing is learned from them
        self.candidates = Candidates(self.config.num_codes)
        self.images = 0  # images behind the statistics, on this rank
        self.vectors_per_image = 0

    @property
    def _restarts(self) -> bool:
        return self.config.restart_below > 0 and not self.frozen

    def init_buffers(self, generator: torch.Generator) -> None:
        """A random codebook (unit normal) and empty statistics; `set_codebook` is the better start."""
        self.set_codebook(torch.randn(self.embedding.shape, generator=generator))

    @torch.no_grad()
    def set_codebook(self, embedding: Float[Tensor, "k d"]) -> None:
        """Start from these vectors: averages of one vector per code, fresh Adam state, no statistics."""
        self.embedding.copy_(embedding)
        self.cluster_size.fill_(1)
        self.embedding_sum.copy_(self.embedding)
        self.updates.zero_()
        if self.config.codebook == "gradient":
            self.adam_mean.zero_()
            self.adam_square.zero_()
        self.discard_statistics()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VectorQuantizer":
        """Every cast and move of a module comes through here: `.to(bfloat16)` moves the codebook but keeps its type."""

        def keep_precision(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return out if out.dtype in (torch.float32, torch.float64) else tensor.to(out.device)

        return super()._apply(keep_precision, recurse)

    def forward(
        self, z: Float[Tensor, "b d h w"], position: Int[Tensor, " b"] | None = None, track: bool = True
    ) -> Quantized:
        """Quantize z; in training also add to the statistics, unless `track` is False.

        `position`: the samples' positions in the training order, which address the candidates for restarts.
        """
        with torch.autocast("cpu" if z.is_meta else z.device.type, enabled=False):
            inputs = rearrange(z, "b d h w -> b h w d").to(self.embedding.dtype)
            codes = self.nearest(inputs)
            vectors = F.embedding(codes, self.embedding)
            loss = F.mse_loss(inputs, vectors)
            if self.training and track:
                self._accumulate(inputs.detach(), codes, vectors, position)
            # The straight-through estimator, z + sg[e - z], written so that its value is e to the last bit
            straight = vectors + (inputs - inputs.detach())
        vectors = rearrange(straight, "b h w d -> b d h w").to(z.dtype)
        return Quantized(vectors, codes, self.config.commitment * loss, loss.detach())

    def nearest(self, inputs: Float[Tensor, "*shape d"]) -> Int[Tensor, "*shape"]:
        """Codes of vectors: the nearest by Euclidean distance, the lowest index among equals."""
        flat = inputs.detach().to(self.embedding.dtype).reshape(-1, self.embedding.shape[1])
        return nearest_codes(flat, self.embedding).view(inputs.shape[:-1])

    def lookup(self, codes: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        """Vectors of codes."""
        return rearrange(F.embedding(codes.long(), self.embedding), "b h w d -> b d h w")

    def mean_vector(self) -> Float[Tensor, " d"]:
        """The mean code vector, weighted by use."""
        return self.embedding_sum.sum(0) / self.cluster_size.sum()

    @torch.compiler.disable
    @torch.no_grad()
    def _accumulate(self, inputs: Tensor, codes: Tensor, vectors: Tensor, position: Tensor | None) -> None:
        flat_codes = codes.flatten()
        self.counts.index_add_(0, flat_codes, torch.ones_like(flat_codes, dtype=self.counts.dtype))
        self.sums.index_add_(0, flat_codes, inputs.reshape(-1, inputs.shape[-1]))
        self.images += codes.shape[0]
        self.vectors_per_image = codes[0].numel()
        if self._restarts:
            errors = (inputs - vectors).square().sum(-1)
            self.candidates.add(inputs.flatten(1, 2), errors.flatten(1), position)

    def discard_statistics(self) -> None:
        self.counts.zero_()
        self.sums.zero_()
        self.candidates = Candidates(self.config.num_codes)
        self.images = 0

    def pack_statistics(self, key: int, ranks: Ranks) -> list[Tensor]:
        """This rank's part of what is summed over ranks: counts, sums, candidates."""
        parts = [self.counts, self.sums.flatten()]
        if self._restarts:
            parts.append(self.candidates.pack(key, ranks).flatten())
        return parts

    def learn(self, total: Float[Tensor, " n"], key: int, images: int, learning_rate: float) -> dict[str, Tensor]:
        """One step of the codebook from the summed statistics of `images` images. Returns its metrics."""
        codes, dim = self.embedding.shape
        counts, sums, candidates = total.tensor_split([codes, codes * (dim + 1)])
        expected = images * self.vectors_per_image
        agree = counts.long().sum() == expected  # a recomputed forward would have counted twice
        torch._assert_async(agree, f"codebook statistics do not hold {expected} vectors once each")
        sums = sums.view(codes, dim)
        if not self.frozen:
            self.updates.add_(1)
            if self.config.codebook == "gradient":
                self._gradient_step(counts, sums, expected, learning_rate)
            self._average(counts, sums)
        restarts = torch.zeros((), device=total.device)
        if self._restarts:
            restarts = self._restart(rearrange(candidates, "(s c) -> s c", c=dim + 2), key)
        return {"perplexity": perplexity(counts).float(), "used_codes": (counts > 0).sum(), "restarts": restarts}

    def _average(self, counts: Tensor, sums: Tensor) -> None:
        """N <- gN + (1-g)n;  m <- gm + (1-g) sum z;  e = m / N;  g the decay (2017, appendix A.1, equations 6-8)."""
        rising = self.updates / (self.config.decay_warmup - 1 + self.updates)  # updates counts this one already
        new = 1 - rising.clamp_max(self.config.decay)
        self.cluster_size.lerp_(counts, new)
        if self.config.codebook == "gradient":  # the codes follow the gradient; the averages only measure their use
            self.cluster_size.clamp_min_(_TINY)
            self.embedding_sum.copy_(self.embedding * self.cluster_size[:, None])
            return
        self.embedding_sum.lerp_(sums, new)
        faded = (self.cluster_size < _TINY)[:, None]
        self.cluster_size.clamp_min_(_TINY)
        self.embedding_sum.copy_(torch.where(faded, self.embedding * _TINY, self.embedding_sum))
        self.embedding.copy_(self.embedding_sum / self.cluster_size[:, None])

    def _restart(self, pool: Tensor, key: int) -> Tensor:
        """Replace codes whose EMA count is below `restart_below` of the mean; returns how many.

        Embedding, sum and count are set together, and a fresh Adam state if there is one, so that the next average
        moves the code on instead of undoing the restart.
        """
        threshold = self.config.restart_below * self.cluster_size.mean()
        codes, restart, vectors = choose_restarts(self.cluster_size, pool, threshold, key)
        size = _RESTART_SIZE * threshold
        settings: list[tuple[Tensor, Tensor | float]] = [
            (self.embedding, vectors),
            (self.embedding_sum, vectors * size),
        ]
        if self.config.codebook == "gradient":
            settings += [(self.adam_mean, 0.0), (self.adam_square, 0.0)]
        for buffer, value in settings:
            buffer[codes] = torch.where(restart[:, None], value, buffer[codes])
        self.cluster_size[codes] = torch.where(restart, size, self.cluster_size[codes])
        return restart.sum()

    def _gradient_step(self, counts: Tensor, sums: Tensor, vectors: int, learning_rate: float) -> None:
        """Adam on the codebook loss, the mean of (sg[z] - e)^2 over the N x D elements (2017, equation 3)."""
        gradient = 2 * (counts[:, None] * self.embedding - sums) / (vectors * self.embedding.shape[1])
        beta1, beta2 = _ADAM_BETAS
        self.adam_mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        self.adam_square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        steps = as_float64(self.updates)
        mean = self.adam_mean / (1 - beta1**steps).to(gradient.dtype)
        square = self.adam_square / (1 - beta2**steps).to(gradient.dtype)
        self.embedding.sub_(learning_rate * mean / (square.sqrt() + _ADAM_EPS))


@torch.no_grad()
def update_quantizers(
    quantizers: Mapping[str, VectorQuantizer],
    ranks: Ranks,
    *,
    key: int,
    images: int,
    applied: bool,
    learning_rate: float,
) -> dict[str, Tensor]:
    """Learn from the statistics of one optimizer step: one fused sum over ranks, then each codebook once.

    key: addresses the draw of restarts (from the seed and the images seen).  images: how many this rank has forwarded
    since the last update, counted by the caller.  applied: False for a skipped optimizer step, whose statistics are
    discarded.  Every rank calls it alike and ends with the same codebooks.
    Returns perplexity/<level>, used_codes/<level>, restarts/<level> of the global batch; nothing for a skipped step.
    """
    metrics: dict[str, Tensor] = {}
    if applied:
        for name, quantizer in quantizers.items():
            assert quantizer.images == images, f"{name}: statistics of {quantizer.images} images after {images} images"
        keys = {name: key + index for index, name in enumerate(quantizers)}
        packed = {name: q.pack_statistics(keys[name], ranks) for name, q in quantizers.items()}
        sizes = [sum(part.numel() for part in parts) for parts in packed.values()]
        total = torch.cat([part for parts in packed.values() for part in parts])
        ranks.all_reduce_(total)
        for (name, quantizer), part in zip(quantizers.items(), total.split(sizes), strict=True):
            learned = quantizer.learn(part, keys[name], images * ranks.world_size, learning_rate)
            metrics |= {f"{metric}/{name}": value for metric, value in learned.items()}
    for quantizer in quantizers.values():
        quantizer.discard_statistics()
    return metrics
