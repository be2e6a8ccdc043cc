"""Dropout as a pure function of (seed, position, layer, element): no generator, so no state to save or to agree on.

In: activations [b, ...] and one 64-bit key per sample.  Out: the same shape, elements dropped and the rest scaled.

A sample's mask is the same on one rank and on many, in any split into micro-batches, in an activation checkpoint's
recompute and under torch.compile. All arithmetic is int32 that wraps: int64 costs five times as much on a CPU. The
element's index is hashed first, without the key, so that two samples never see one mask shifted or permuted.

Legend: b samples, n elements of a sample.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqscale.seeding import finalise_tensor, key_of, logical_shift, mix, signed

_FINAL_1 = 0x85EBCA6B - (1 << 32)  # MurmurHash3's 32-bit finaliser (Appleby, public domain), as signed int32
_FINAL_2 = 0xC2B2AE35 - (1 << 32)
_LAYER = 0x9E3779B1 - (1 << 32)  # 2^32 / golden ratio, odd
_LABEL_LAYER = 0x7FFFFFFF  # the "layer" of whole-label dropout; real layers count from 0


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser: a bijection of int32."""
    x = (x ^ logical_shift(x, 16)) * _FINAL_1
    x = (x ^ logical_shift(x, 13)) * _FINAL_2
    return x ^ logical_shift(x, 16)


def dropout_key(seed: int, position: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """One int64 key per sample, from the run's seed and the sample's position in the training order."""
    prefix = mix(seed, key_of("dropout"))
    return finalise_tensor(position.to(torch.int64) * _LAYER + signed(prefix))


def layer_word(layer: int) -> Int[Tensor, ""]:
    """What a layer adds to every key.

    A tensor rather than a number, which torch.compile would build into each block's graph: one graph for all blocks.
    """
    return torch.tensor(layer * _LAYER % (1 << 31), dtype=torch.int32, device="cpu")


def _layer_key(key: Tensor, word: Tensor) -> Tensor:
    """Both halves of the sample's key and the layer's word, as int32 [b]."""
    key = key.to(torch.int64)
    low, high = key.to(torch.int32), (key >> 32).to(torch.int32)
    return _mix32(_mix32(low + word) ^ high)


def drop_mask(key: Int[Tensor, " b"], word: Int[Tensor, ""], elements: int, p: float) -> Bool[Tensor, "b n"]:
    """True where the element is dropped, with probability p. word: the layer's, from `layer_word`."""
    index = _mix32(torch.arange(elements, dtype=torch.int32, device=key.device))
    x = (index[None] ^ _layer_key(key, word)[:, None]) * _FINAL_1
    x = (x ^ logical_shift(x, 15)) * _FINAL_2
    return x < min(round(p * (1 << 32)) - (1 << 31), (1 << 31) - 1)  # x is uniform over int32


def drop_labels(label: Int[Tensor, " b"], key: Int[Tensor, " b"] | None, p: float, null: int) -> Int[Tensor, " b"]:
    """Labels, replaced by `null` with probability p per sample: what classifier-free guidance needs."""
    if key is None or p == 0:
        return label
    return torch.where(drop_mask(key, layer_word(_LABEL_LAYER), 1, p)[:, 0], null, label)


class Dropout(nn.Module):
    """Drops elements with probability p (0 <= p < 1) and scales the rest by 1 / (1 - p).

    `layer` addresses the mask: sites of one model need different numbers. Identity in evaluation, at p = 0 and without
    a key. The element's index is its offset within the sample in the tensor's logical order, whatever the strides.
    """

    def __init__(self, p: float, layer: int):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be in [0, 1), got {p}")
        self.p, self.layer, self.word = p, layer, layer_word(layer)

    def forward(self, x: Float[Tensor, "b *n"], key: Int[Tensor, " b"] | None) -> Float[Tensor, "b *n"]:
        """key: from `dropout_key`, or None for no dropout."""
        if key is None or self.p == 0 or not self.training:
            return x
        mask = drop_mask(key, self.word, x[0].numel(), self.p).view(x.shape)
        return x.masked_fill(mask, 0) * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"
