"""A codebook from data: K vectors that cover a sample of encoder vectors.

In: vectors [n, D], K, a key.  Out: codebook [K, D], the same for the same input and key.
"""

import numpy as np
import torch
from torch import Tensor

from vqscale.models.quantizer import nearest_codes
from vqscale.seeding import generator, mix, uniform_array

_ITERATIONS = 10
_JITTER = 1e-3  # of the vectors' standard deviation, when there are fewer vectors than codes


def sample_size(num_codes: int) -> int:
    """How many encoder vectors to fit K codes to."""
    return max(16384, 8 * num_codes)


def addressed_cells(cells: int, count: int, key: int, image: int) -> Tensor:
    """`count` distinct grid cells of `cells` (int64, sorted), drawn for one image of the sample."""
    return torch.randperm(cells, generator=generator(key, image))[:count].sort().values


@torch.no_grad()
def fit_codebook(vectors: Tensor, num_codes: int, key: int) -> Tensor:
    """Lloyd's iterations from K vectors of the sample, empty clusters moving to badly covered vectors (the chance is in
    proportion to the squared distance, as in k-means++).

    With fewer vectors than codes: every vector, then repeats with a jitter of a thousandth of their spread.
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
    waits = torch.from_numpy(-np.log1p(-uniform_array(key, np.arange(len(vectors), dtype=np.uint64))))
    far = vectors[(waits.to(errors) / errors).argsort()[: len(codebook)]]
    empty = counts == 0
    means = sums / counts.clamp_min(1)[:, None]
    return torch.where(empty[:, None], far[(empty.cumsum(0) - 1).clamp_min(0)], means)


def _repeat_with_jitter(vectors: Tensor, num_codes: int, key: int) -> Tensor:
    repeats = vectors[torch.arange(num_codes, device=vectors.device) % len(vectors)]
    noise = torch.randn(repeats.shape, generator=generator(key, 2), dtype=torch.float64).to(repeats)
    noise[: len(vectors)] = 0
    return repeats + noise * (_JITTER * vectors.std(correction=0))
