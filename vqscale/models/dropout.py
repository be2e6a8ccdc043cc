"""Dropout as a pure function of (seed, position, layer, element): no generator, so no state to save or to agree on.

In: activations [b, ...] and one 64-bit key per sample.  Out: the same shape, elements dropped and the rest scaled.

A sample's mask is the same on one rank and on many, in any split into micro-batches, in an activation checkpoint's
recompute and under torch.compile. All arithmetic is int32 that wraps: int64 costs five times as much on a CPU. The
element's index is hashed first, without the key, so that two samples never see one mask shifted or permuted.
"""

import torch
from torch import Tensor, nn

from vqscale.seeding import key_of, mix

_FINAL_1 = 0x85EBCA6B - (1 << 32)  # MurmurHash3's 32-bit finaliser (Appleby, public domain), as signed int32
_FINAL_2 = 0xC2B2AE35 - (1 << 32)
_LAYER = 0x9E3779B1 - (1 << 32)  # 2^32 / golden ratio, odd
_SPLIT_1 = 0xBF58476D1CE4E5B9 - (1 << 64)  # SplitMix64's output function, as signed int64
_SPLIT_2 = 0x94D049BB133111EB - (1 << 64)
_LABEL_LAYER = 0x7FFFFFFF  # the "layer" of whole-label dropout; real layers count from 0


def _shift(x: Tensor, bits: int, width: int) -> Tensor:
    """Logical right shift of a signed integer tensor of `width` bits."""
    return (x >> bits) & ((1 << (width - bits)) - 1)


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser: a bijection of int32."""
    x = (x ^ _shift(x, 16, 32)) * _FINAL_1
    x = (x ^ _shift(x, 13, 32)) * _FINAL_2
    return x ^ _shift(x, 16, 32)


def dropout_key(seed: int, position: Tensor) -> Tensor:
    """One key per sample: int64 [b] from the run's seed and the samples' positions (int64 [b], any device)."""
    prefix = mix(seed, key_of("dropout"))
    x = position.to(torch.int64) * _LAYER + (prefix - (1 << 64) if prefix >> 63 else prefix)
    x = (x ^ _shift(x, 30, 64)) * _SPLIT_1
    x = (x ^ _shift(x, 27, 64)) * _SPLIT_2
    return x ^ _shift(x, 31, 64)


def _layer_key(key: Tensor, layer: int) -> Tensor:
    """Both words of the sample's key and the layer, as int32 [b]."""
    key = key.to(torch.int64)
    low, high = key.to(torch.int32), (key >> 32).to(torch.int32)
    return _mix32(_mix32(low + layer * _LAYER % (1 << 31)) ^ high)


def _threshold(p: float) -> int:
    """int32 value below which a uniform int32 falls with probability p."""
    return max(-(1 << 31), min((1 << 31) - 1, round(p * (1 << 32)) - (1 << 31)))


def drop_mask(key: Tensor, layer: int, elements: int, p: float) -> Tensor:
    """bool [b, elements], true where the element is dropped (with probability p). key: int64 [b]."""
    index = _mix32(torch.arange(elements, dtype=torch.int32, device=key.device))
    x = (index[None] ^ _layer_key(key, layer)[:, None]) * _FINAL_1
    x = (x ^ _shift(x, 15, 32)) * _FINAL_2
    return x < _threshold(p)


def drop_labels(label: Tensor, key: Tensor | None, p: float, null: int) -> Tensor:
    """Labels int64 [b], replaced by `null` with probability p per sample: what classifier-free guidance needs."""
    if key is None or p == 0:
        return label
    return torch.where(drop_mask(key, _LABEL_LAYER, 1, p)[:, 0], null, label)


class Dropout(nn.Module):
    """Drops elements with probability p (0 <= p < 1) and scales the rest by 1 / (1 - p).

    `layer` addresses the mask: sites of one model need different numbers. Identity in evaluation, at p = 0 and without
    a key. The element's index is its offset within the sample in the tensor's logical order, whatever the strides.
    """

    def __init__(self, p: float, layer: int):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be in [0, 1), got {p}")
        self.p, self.layer = p, layer

    def forward(self, x: Tensor, key: Tensor | None) -> Tensor:
        """x: [b, ...]; key: int64 [b] from `dropout_key`, or None for no dropout."""
        if key is None or self.p == 0 or not self.training:
            return x
        mask = drop_mask(key, self.layer, x[0].numel(), self.p).view(x.shape)
        return x.masked_fill(mask, 0) * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"
