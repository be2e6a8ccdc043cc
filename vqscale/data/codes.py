"""The on-disk form of codes: one little-endian uint16 .npy per level, `[views, h, w]`.

In: a sample's parts.  Out: {"top": int32 [h, w], …}, the view (plain or flipped image's codes) chosen by position.
"""

import ast
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqscale.data.parts import DecodeError
from vqscale.data.shards import encode_npy
from vqscale.seeding import key_of, mix, uniform_array

_VIEW = key_of("view")
_MAGIC = b"\x93NUMPY\x01\x00"


def pack_codes(codes: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """{"top": uint16 [V, h, w], …} -> the parts {"top.npy": bytes, …} of a sample."""
    for name, array in codes.items():
        assert array.dtype == np.uint16 and array.ndim == 3, (name, array.dtype, array.shape)
    return {f"{name}.npy": encode_npy(array.astype("<u2", copy=False)) for name, array in codes.items()}


@functools.lru_cache(64)
def _header(header: bytes) -> tuple[str, tuple[int, ...], bool]:
    """(dtype, shape, Fortran order) in an .npy header of version 1.0; a literal, so nothing in it can run."""
    if header[:8] != _MAGIC:
        raise DecodeError("not an .npy file of version 1.0")
    try:
        fields = ast.literal_eval(header[10:].decode("latin1"))
        return str(fields["descr"]), tuple(fields["shape"]), bool(fields["fortran_order"])
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        raise DecodeError("not an .npy header") from None


def _arrays(parts: Sequence[Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The arrays in .npy parts of known shape: uint16 [b, *shape]. Equal headers are read once for all samples."""
    start = 10 + parts[0][8] + 256 * parts[0][9] if len(parts[0]) > 10 else 0
    header = bytes(parts[0][:start])
    found = _header(header)
    if found != ("<u2", shape, False):
        raise DecodeError(f"{name}.npy holds {found[0]} {list(found[1])}, the data set's codes are <u2 {list(shape)}")
    size = start + 2 * math.prod(shape)
    if any(len(part) != size for part in parts):
        raise DecodeError(f"{name}.npy is not {size} bytes long, as its header says")
    table = np.frombuffer(b"".join(parts), np.uint8).reshape(len(parts), size)
    if (table[:, :start] != np.frombuffer(header, np.uint8)).any():
        raise DecodeError(f"{name}.npy has a header of its own")
    return table[:, start:].view("<u2").reshape(len(parts), *shape)


class CodeReader:
    """The `read` for codes: {"top": int32 [h, w], …} in the order of `levels`.

    levels: name -> (h, w), top first, as in `dataset.json`. With `flip` and 2 views, the view is drawn by
    (seed, position). num_codes: K; a code outside [0, K) makes the sample bad.
    """

    def __init__(
        self, levels: Mapping[str, Sequence[int]], views: int = 1, flip: bool = False, seed: int = 0, num_codes: int = 0
    ):
        self.shapes = {name: (views, *(int(n) for n in grid)) for name, grid in levels.items()}
        self.parts = tuple(f"{name}.npy" for name in levels)
        self.num_codes = num_codes
        self._key = mix(seed, _VIEW) if flip and views == 2 else None

    def __call__(self, parts: Mapping[str, Any], label: int, position: int) -> dict[str, Tensor]:
        """One sample; raises DecodeError."""
        return {name: codes[0] for name, codes in self.batch([parts], [label], [position]).items()}

    def batch(
        self, parts: Sequence[Mapping[str, Any]], labels: Sequence[int], positions: Sequence[int]
    ) -> dict[str, Tensor]:
        """Many samples at once: {"top": int32 [b, h, w], …}; raises DecodeError if any of them does not decode."""
        views = self.views(np.asarray(positions, np.uint64))
        return {name: self._level(name, parts, views) for name in self.shapes}

    def views(self, positions: np.ndarray) -> np.ndarray:
        """0 or 1 per position; uint64 [n] -> int64 [n]."""
        if self._key is None:
            return np.zeros(len(positions), np.int64)
        return (uniform_array(self._key, positions) < 0.5).astype(np.int64)

    def _level(self, name: str, parts: Sequence[Mapping[str, Any]], views: np.ndarray) -> Tensor:
        part = f"{name}.npy"
        if any(part not in sample for sample in parts):
            raise DecodeError(f"the sample has no {part}")
        codes = _arrays([sample[part] for sample in parts], name, self.shapes[name])
        chosen = codes[np.arange(len(parts)), views].astype(np.int32)
        if self.num_codes and chosen.size and (largest := int(chosen.max())) >= self.num_codes:
            raise DecodeError(f"{part} holds code {largest}, the codebook has {self.num_codes}")
        return torch.from_numpy(chosen)
