"""Addressed randomness: (seed, what, position) -> numbers, the same on every rank, worker and restart.

In: integers (and names, through `key_of`).  Out: 64-bit hashes, uniforms, seeded generators.

The arithmetic is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), written
out here because the streams of library generators change between releases.
"""

import hashlib

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _finalise(z: int) -> int:
    """SplitMix64's output function: a bijection of 64-bit integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def mix(*words: int) -> int:
    """A 64-bit hash of integers; the order of the words matters."""
    state = 0
    for word in words:
        state = _finalise((state + _GOLDEN + (word & _MASK)) & _MASK)
    return state


def key_of(name: str) -> int:
    """A 64-bit word for a name: the first 8 bytes of its sha256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def uniform(*words: int) -> float:
    """A float in [0, 1) addressed by the words, with 53 random bits."""
    return (mix(*words) >> 11) * 2.0**-53


def generator(*words: int) -> torch.Generator:
    """A CPU generator addressed by the words."""
    return torch.Generator().manual_seed(mix(*words) & ((1 << 63) - 1))


def mix_array(prefix: int, words: np.ndarray) -> np.ndarray:
    """`mix_array(mix(a, b), x)[i] == mix(a, b, x[i])`, vectorised. `prefix`: a result of `mix`; words: uint64 [n]."""
    with np.errstate(over="ignore"):
        z = words.astype(np.uint64) + np.uint64((prefix + _GOLDEN) & _MASK)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform_array(prefix: int, words: np.ndarray) -> np.ndarray:
    """`uniform_array(mix(a, b), x)[i] == uniform(a, b, x[i])`, vectorised; float64 in [0, 1)."""
    return (mix_array(prefix, words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def finalise_tensor(z: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """SplitMix64's output function on int64 tensors: the bits of the unsigned result. Products wrap."""
    z = (z ^ logical_shift(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ logical_shift(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ logical_shift(z, 31)


def mix_tensor(prefix: int, words: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """`mix_array` on int64 tensors: the bits of the unsigned result."""
    return finalise_tensor(words + signed((prefix + _GOLDEN) & _MASK))


def logical_shift(x: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    """Right shift of a signed integer tensor that brings in zeros."""
    return (x >> bits) & ((1 << (8 * x.element_size() - bits)) - 1)


def signed(word: int) -> int:
    """The signed 64-bit integer of the same bits."""
    return word - (1 << 64) if word >> 63 else word
