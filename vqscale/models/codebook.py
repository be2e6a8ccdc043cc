"""Where codes and codebooks come from: nearest codes, k-means, restarts of dead codes, perplexity. Pure functions.

In: encoder vectors [n, d] and a codebook [k, d], or counts [k].  Out: codes, a new codebook, what to restart.

Random choices are addressed by a key and by the samples' positions in the training order, never by rank, so that a run
at another world size or accumulation fits and restarts the same codes.

Legend: n vectors, k codes, d code dimension, b images, c grid cells of an image, p vectors kept of an image, s slots of
the pool that a step restarts from, r numbers in a row (a vector, then what is known of it).
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from vqscale.batch import as_float64
from vqscale.seeding import generator, mix, mix_tensor, uniform_array

_ITERATIONS = 10
_JITTER = 1e-3  # of the vectors' standard deviation, when there are fewer vectors than codes
_PER_IMAGE = 4  # vectors kept of each image as candidates for restarts, up to K = 16,384
_POOL = 256  # vectors of the global batch that a step draws from, and the most codes that it restarts; likewise


# --- nearest codes ----------------------------------------------------------------------------------------------------


def search_block(num_codes: int, device: torch.device) -> tuple[int, int]:
    """(vectors, codes) that are compared at once, so that their distances stay in the cache.

    On a CPU 2^19 distances, 2 MiB; on a GPU 2^23, 32 MiB of the 40 (A100) or 50 (H100) of its L2. No more codes than
    2,048 and 4,096: a few vectors beside all codes of a large codebook would read it anew for each few.
    """
    distances, most = (2**19, 2048) if device.type == "cpu" else (2**23, 4096)
    codes = min(num_codes, most)
    return distances // codes, codes


@torch.compiler.disable
@torch.no_grad()
def nearest_codes(vectors: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"]) -> Int[Tensor, " n"]:
    """Index of the nearest row of the codebook, the lowest among equals: argmin of |e|^2 - 2 z e."""
    nearest = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    rows, width = search_block(len(codebook), vectors.device)
    parts = [*zip(codebook.square().sum(1).split(width), codebook.split(width), strict=True)]
    with _full_precision_products():
        for out, block in zip(nearest.split(rows), vectors.split(rows), strict=True):
            distances = (torch.addmm(squares, block, codes.t(), alpha=-2) for squares, codes in parts)
            if len(parts) == 1:
                torch.argmin(next(distances), dim=1, out=out)
                continue
            least, index = (torch.stack(each) for each in zip(*(d.min(dim=1) for d in distances), strict=True))
            part = least.argmin(dim=0)
            torch.add(index.gather(0, part[None])[0], part, alpha=width, out=out)
    return nearest


class _full_precision_products:
    """Matrix products in true float32 (no TF32 nor bf16 passes) within the block, whatever the program has set."""

    _backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]

    def __enter__(self) -> None:
        self._before = [backend.fp32_precision for backend in self._backends]
        for backend in self._backends:
            backend.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        for backend, before in zip(self._backends, self._before, strict=True):
            backend.fp32_precision = before


def perplexity(counts: Num[Tensor, " k"]) -> Float[Tensor, ""]:
    """exp of the entropy (nats) of code counts, in float64: K if all codes are used alike, 1 if one is."""
    counts = as_float64(counts)
    share = counts / counts.sum().clamp_min(1)
    return torch.exp(-torch.xlogy(share, share).sum())


def weighted_order(weights: Float[Tensor, " n"], key: int) -> Int[Tensor, " n"]:
    """Indices in the order of a weighted draw without replacement, addressed by the key.

    The smallest exponential / weight are such a draw: Efraimidis & Spirakis 2006.
    """
    waits = -np.log1p(-uniform_array(key, np.arange(len(weights), dtype=np.uint64)))
    # Pinned, so that the copy does not wait for the GPU
    on_host = torch.empty(len(weights), dtype=weights.dtype, device="cpu", pin_memory=weights.is_cuda)
    on_host.copy_(torch.from_numpy(waits))
    return (on_host.to(weights.device, non_blocking=True) / weights).argsort()


# --- a codebook from data ---------------------------------------------------------------------------------------------


def sample_size(num_codes: int) -> int:
    """How many encoder vectors to fit K codes to."""
    return max(16384, 8 * num_codes)


def addressed_cells(cells: int, count: int, key: int, image: int) -> Int[Tensor, " count"]:
    """`count` distinct grid cells of `cells`, sorted, drawn for one image of the sample."""
    return torch.randperm(cells, generator=generator(key, image))[:count].sort().values


@torch.no_grad()
def fit_codebook(vectors: Float[Tensor, "n d"], num_codes: int, key: int) -> Float[Tensor, "{num_codes} d"]:
    """Lloyd's iterations from K vectors of the sample; the same for the same vectors and key.

    Empty clusters move to badly covered vectors, with a chance in proportion to the squared distance, as in k-means++
    (Arthur & Vassilvitskii 2007). With fewer vectors than codes: every vector, then repeats with a jitter of a
    thousandth of their spread.
    """
    order = torch.randperm(len(vectors), generator=generator(key, 0)).to(vectors.device)
    if len(vectors) < num_codes:
        return _repeat_with_jitter(vectors[order], num_codes, key)
    codebook = vectors[order[:num_codes]].clone()
    for iteration in range(_ITERATIONS):
        codebook = _lloyd(vectors, codebook, mix(key, 1, iteration))
    return codebook


def _lloyd(vectors: Tensor, codebook: Tensor, key: int) -> Tensor:
    codes = nearest_codes(vectors, codebook)
    counts = torch.zeros_like(codebook[:, 0]).index_add_(0, codes, torch.ones_like(vectors[:, 0]))
    sums = torch.zeros_like(codebook).index_add_(0, codes, vectors)
    errors = (vectors - codebook[codes]).square().sum(1)
    far = vectors[weighted_order(errors, key)[: len(codebook)]]
    empty = counts == 0
    means = sums / counts.clamp_min(1)[:, None]
    return torch.where(empty[:, None], far[(empty.cumsum(0) - 1).clamp_min(0)], means)


def _repeat_with_jitter(vectors: Tensor, num_codes: int, key: int) -> Tensor:
    repeats = vectors[torch.arange(num_codes, device=vectors.device) % len(vectors)]
    noise = torch.randn(repeats.shape, generator=generator(key, 2), dtype=torch.float64).to(repeats)
    noise[: len(vectors)] = 0
    return repeats + noise * (_JITTER * vectors.std(correction=0))


# --- restarts of dead codes -------------------------------------------------------------------------------------------


def _more_of_large_codebooks(count: int, num_codes: int) -> int:
    """`count`, in proportion to K beyond 16,384 codes, most of which would wait for thousands of steps otherwise."""
    return max(count, count * num_codes // 16384)


def pick_candidates(
    vectors: Float[Tensor, "b c d"], errors: Float[Tensor, "b c"], position: Int[Tensor, " b"], num_codes: int
) -> Float[Tensor, "b p d+1"]:
    """A few encoder vectors of each image, each with its squared quantization error as the last column."""
    cells, dim = vectors.shape[1:]
    chosen = _candidate_cells(position, min(_more_of_large_codebooks(_PER_IMAGE, num_codes), cells), cells)
    rows = torch.cat([vectors, errors[..., None]], dim=-1)
    return rows.gather(1, chosen[..., None].expand(-1, -1, dim + 1))


def _candidate_cells(position: Tensor, picks: int, cells: int) -> Tensor:
    """Grid cells [b, p], one in each of `picks` equal parts of the grid, by a hash of position and part."""
    part = torch.arange(picks, device=position.device)
    width = cells // picks
    hashed = mix_tensor(0, position[:, None] * picks + part) >> 33 & 0x7FFFFFFF
    return part * width + hashed % width


def draw_pool(
    candidates: Float[Tensor, "b p r"], index: Int[Tensor, " b"], images: int, num_codes: int, key: int
) -> Float[Tensor, "s r+1"]:
    """This rank's rows (vector, error, 1) of a pool drawn from all ranks' candidates; zeros for other ranks' rows.

    `index`: which of the global batch's `images` each of the rank's images is. All ranks draw the same slots, so the
    sum over ranks is the pool, and its last column says how many ranks own each row.
    """
    per_image = candidates.shape[1]
    slots = min(num_codes, _more_of_large_codebooks(_POOL, num_codes), images * per_image)
    entry = _distinct_numbers(key, slots, images * per_image, candidates.device)
    image, pick = entry // per_image, entry % per_image
    own = image[:, None] == index[None, :]
    rows = candidates[own.int().argmax(1), pick]
    owners = own.sum(1, keepdim=True)
    return torch.cat([torch.where(owners > 0, rows, 0), owners.to(rows.dtype)], dim=1)


def _distinct_numbers(key: int, count: int, below: int, device: torch.device) -> Tensor:
    """`count` distinct numbers, addressed by the key: steps of a length that shares no divisor with `below`."""
    start, step = mix(key, 0) % below, mix(key, 1) % below
    while math.gcd(step, below) != 1:
        step += 1
    return (start + step * torch.arange(count, device=device)) % below


def choose_restarts(
    cluster_size: Float[Tensor, " k"], pool: Float[Tensor, "s r"], threshold: Float[Tensor, ""], key: int
) -> tuple[Int[Tensor, " s"], Bool[Tensor, " s"], Float[Tensor, "s r-2"]]:
    """(codes, which of them to restart, at which vectors): those with a count below the threshold, least used first.

    Vectors are drawn from the pool without replacement, with a chance in proportion to the squared quantization error,
    so that a busy background is not covered twice. Codes used alike come in their own order, on any device.
    """
    vectors, errors, owners = pool.tensor_split([-2, -1], dim=1)
    torch._assert_async((owners == 1).all(), "a candidate for restarts belongs to no rank, or to two")
    order = weighted_order(errors[:, 0], mix(key, 2))
    codes = cluster_size.argsort(stable=True)[: len(pool)]  # `topk` breaks ties in another order on a GPU
    return codes, (cluster_size[codes] < threshold) & (errors[order, 0] > 0), vectors[order]
