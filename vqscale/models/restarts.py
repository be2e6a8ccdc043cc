"""Restarts of dead codes from recent encoder vectors, agreed by all ranks.

In: each image's encoder vectors and their quantization errors.  Out: dead codes moved to badly quantized vectors.

Which vectors are kept and drawn is addressed by the samples' positions in the training order, never by rank, so the
same run at another world size or accumulation restarts the same codes at the same vectors.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vqscale.seeding import mix, uniform_array

if TYPE_CHECKING:
    from vqscale.models.quantizer import VectorQuantizer

PER_IMAGE = 4  # vectors kept of each image
POOL = 256  # vectors of the global batch that a step draws from, and the most codes that it restarts
_RESTART_SIZE = 2.0  # a restarted code's EMA count, in units of the threshold: soon dead again if nothing chooses it


class Candidates:
    """Encoder vectors of this rank's images since the last update, PER_IMAGE of each."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._vectors: list[Tensor] = []  # [b, PER_IMAGE, D + 1]: vector, squared error
        self._positions: list[Tensor] = []  # int64 [b]
        self._images = 0
        self._positioned = True

    def add(self, vectors: Tensor, errors: Tensor, position: Tensor | None) -> None:
        """vectors [b, n, D], errors [b, n], position int64 [b] or None (then the draw depends on the topology)."""
        images, cells, dim = vectors.shape
        self._positioned = position is not None
        if position is None:
            position = torch.arange(self._images, self._images + images, device=vectors.device)
        cell = _cells(position, min(PER_IMAGE, cells), cells)
        rows = torch.cat([vectors, errors[..., None]], dim=-1)
        self._vectors.append(rows.gather(1, cell[..., None].expand(-1, -1, dim + 1)))
        self._positions.append(position)
        self._images += images

    def pack(self, key: int, num_codes: int, rank: int, world_size: int) -> Tensor:
        """This rank's rows of the pool [S, D + 2] (vector, error, 1); zeros where another rank holds the vector."""
        held = torch.cat(self._vectors)
        images = len(held) * world_size
        slots = min(num_codes, POOL, images * held.shape[1])
        entry = _draw(key, slots, images * held.shape[1], held.device)
        image, pick = entry // held.shape[1], entry % held.shape[1]
        # A global batch is a run of `images` consecutive positions, so the remainder is a place of its own
        place = torch.cat(self._positions) % images if self._positioned else rank * len(held) + self._arange(held)
        mine = image[:, None] == place[None, :]
        rows = held[mine.int().argmax(1), pick]
        owners = mine.sum(1, keepdim=True)
        return torch.cat([torch.where(owners > 0, rows, 0), owners.to(rows.dtype)], dim=1)

    def _arange(self, held: Tensor) -> Tensor:
        return torch.arange(len(held), device=held.device)


def _draw(key: int, slots: int, pool: int, device: torch.device) -> Tensor:
    """`slots` distinct numbers below `pool`, addressed by the key: steps of a length that has no divisor in common."""
    start, step = mix(key, 0) % pool, mix(key, 1) % pool
    while math.gcd(step, pool) != 1:
        step += 1
    return (start + step * torch.arange(slots, device=device)) % pool


def _cells(position: Tensor, picks: int, cells: int) -> Tensor:
    """Grid cells int64 [b, picks], one in each of `picks` equal parts of the grid, by a hash of position and part."""
    part = torch.arange(picks, device=position.device)
    width = cells // picks
    return part * width + _hash(position[:, None] * picks + part) % width


def _hash(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64, cut to 31 bits (products wrap, shifts are made logical by a mask)."""
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return (x >> 33) & 0x7FFFFFFF


def restart_dead_codes(quantizer: "VectorQuantizer", pool: Tensor, key: int) -> Tensor:
    """Replace codes whose EMA count is below `restart_below` of the mean, least used first; returns how many.

    New places are drawn from the pool without replacement, with a chance in proportion to the squared quantization
    error (as k-means++ seeds: Arthur & Vassilvitskii 2007), so that a busy background is not covered twice.  Embedding,
    sum and count are set together, so the next average moves the code on instead of undoing the restart.
    """
    pool = rearrange(pool, "(s c) -> s c", c=quantizer.embedding.shape[1] + 2)
    vectors, errors, owners = pool.tensor_split([-2, -1], dim=1)
    torch._assert_async((owners == 1).all(), "a candidate for restarts is held by no rank, or by two")
    # Efraimidis & Spirakis 2006: the smallest exponential / weight are a weighted draw without replacement
    waits = -np.log1p(-uniform_array(mix(key, 2), np.arange(len(pool), dtype=np.uint64)))
    order = (torch.from_numpy(waits).to(errors) / errors[:, 0]).argsort()
    threshold = quantizer.config.restart_below * quantizer.cluster_size.mean()
    size, codes = quantizer.cluster_size.topk(len(pool), largest=False)
    restart = (size < threshold) & (errors[order, 0] > 0)
    _place(quantizer, codes, restart, vectors[order], _RESTART_SIZE * threshold)
    return restart.sum()


def _place(quantizer: "VectorQuantizer", codes: Tensor, restart: Tensor, vectors: Tensor, size: Tensor) -> None:
    """Set embedding, sum and count of `codes` [S] where `restart` [S]; a fresh Adam state too, if there is one."""
    one = restart[:, None]
    settings: list[tuple[Tensor, Tensor | float]] = [
        (quantizer.embedding, vectors),
        (quantizer.embedding_sum, vectors * size),
    ]
    if quantizer.config.codebook == "gradient":
        settings += [(quantizer.adam_mean, 0.0), (quantizer.adam_square, 0.0)]
    for buffer, value in settings:
        buffer[codes] = torch.where(one, value, buffer[codes])
    quantizer.cluster_size[codes] = torch.where(restart, size, quantizer.cluster_size[codes])
