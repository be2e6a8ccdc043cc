"""The on-disk form of codes: one little-endian uint16 .npy per level, `[views, h, w]`.

In: a sample's parts.  Out: {"top": int32 [h, w], …}, the view (codes of the plain or of the flipped image) drawn by
position.
Letters: V views, b samples, h and w a level's code grid.
"""

import ast
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt16, UInt64
from torch import Tensor

from vqscale.data.parts import DecodeError
from vqscale.data.shards import encode_npy
from vqscale.seeding import key_of, mix, uniform_array

_VIEW = key_of("view")
_MAGIC = b"\x93NUMPY\x01\x00"


def pack_codes(codes: Mapping[str, UInt16[np.ndarray, "V h w"]]) -> dict[str, bytes]:
    """Codes by level -> the parts {"top.npy": bytes, …} of a sample."""
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


def _arrays(files: Sequence[Any], name: str, shape: tuple[int, ...]) -> UInt16[np.ndarray, "b V h w"]:
    """The arrays in .npy files of known shape [V, h, w]. The header, which is the same in all, is parsed once."""
    start = 10 + files[0][8] + 256 * files[0][9] if len(files[0]) > 10 else 0
    header = bytes(files[0][:start])
    dtype, stored_shape, fortran_order = _header(header)
    if (dtype, stored_shape, fortran_order) != ("<u2", shape, False):
        raise DecodeError(f"{name} contains {dtype} {list(stored_shape)}, the data set's codes are <u2 {list(shape)}")
    size = start + 2 * math.prod(shape)
    if any(len(file) != size for file in files):
        raise DecodeError(f"{name} is not {size} bytes long, as its header says")
    table = np.frombuffer(b"".join(files), np.uint8).reshape(len(files), size)
    if (table[:, :start] != np.frombuffer(header, np.uint8)).any():
        raise DecodeError(f"{name} has another header than the batch's first sample")
    return table[:, start:].view("<u2").reshape(len(files), *shape)


class CodeReader:
    """The `read` for codes: {"top": int32 [h, w], …} in the order of `levels`.

    levels: name -> (h, w), top first, as in `dataset.json`. With `flip` and 2 views, the view is drawn by
    (seed, position). num_codes: K; a code outside [0, K) makes the sample bad.
    """

    def __init__(
        self, levels: Mapping[str, Sequence[int]], views: int = 1, flip: bool = False, seed: int = 0, num_codes: int = 0
    ):
        self.shapes = {name: (views, *(int(n) for n in grid)) for name, grid in levels.items()}
        self.part_names = tuple(f"{name}.npy" for name in levels)
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

    def views(self, positions: UInt64[np.ndarray, "b"]) -> Int64[np.ndarray, "b"]:
        """The view of each position: 0 or 1."""
        if self._key is None:
            return np.zeros(len(positions), np.int64)
        return (uniform_array(self._key, positions) < 0.5).astype(np.int64)

    def _level(self, name: str, parts: Sequence[Mapping[str, Any]], views: np.ndarray) -> Int32[Tensor, "b h w"]:
        part = f"{name}.npy"
        if any(part not in sample for sample in parts):
            raise DecodeError(f"the sample has no {part}")
        every_view = _arrays([sample[part] for sample in parts], part, self.shapes[name])
        codes = every_view[np.arange(len(parts)), views].astype(np.int32)
        if self.num_codes and codes.size and (largest := int(codes.max())) >= self.num_codes:
            raise DecodeError(f"{part} contains code {largest}, the codebook has {self.num_codes}")
        return torch.from_numpy(codes)
