"""Data sets that come as arrays of pictures: IDX files (MNIST, Fashion-MNIST) and CIFAR-10's binary batches.

In: their folder, as it was unpacked; IDX files may still be gzipped.  Out: pictures by number, uint8 [3, h, w], with
their labels, in the data set's own order. A grey picture becomes three equal channels.
"""

import functools
import gzip
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

_IDX = {"train": r"train-images[-.]idx3-ubyte(\.gz)?", "test": r"t10k-images[-.]idx3-ubyte(\.gz)?"}
_CIFAR = {"train": r"data_batch_\d+\.bin", "test": r"test_batch\.bin"}
_CIFAR_PICTURE = (3, 32, 32)
_MAX_BYTES = 1 << 30  # of one file, unpacked


@dataclass(frozen=True)
class Pictures:
    """One file of them: uint8 [n, h, w] or [n, 3, h, w], and labels int64 [n]."""

    images: UInt8[np.ndarray, "n *picture"]
    labels: Int64[np.ndarray, " n"]

    def picture(self, number: int) -> UInt8[np.ndarray, "3 h w"]:
        """One picture in three channels."""
        image = self.images[number]
        return image if image.ndim == 3 else np.repeat(image[None], 3, axis=0)


def array_files(folder: str | Path, part: str) -> list[str]:
    """The names of the files that hold the pictures of `part` (train | test); [] where the folder has none."""
    names = sorted(path.name for path in Path(folder).iterdir()) if Path(folder).is_dir() else []
    return [name for name in names if re.fullmatch(f"{_IDX[part]}|{_CIFAR[part]}", name)]


@functools.lru_cache(maxsize=8)
def read_pictures(path: Path) -> Pictures:
    """A file's pictures and labels; kept, because they are asked for one by one.

    Raises FileNotFoundError for a missing labels file, ValueError for a file that is not what its name says.
    """
    if path.name.endswith(".bin"):
        return _read_cifar(path)
    labels = _read_idx(path.with_name(re.sub("images([-.])idx3", r"labels\1idx1", path.name)), dimensions=1)
    images = _read_idx(path, dimensions=3)
    if len(images) != len(labels):
        raise ValueError(f"{path}: {len(images)} pictures, but {len(labels)} labels")
    return Pictures(images, labels.astype(np.int64))


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of bytes: magic 0 0 8 d, then d big-endian sizes, then the values (LeCun's format)."""
    data = _unpacked(path)
    start = 4 + 4 * dimensions
    shape = tuple(int(size) for size in np.frombuffer(data[4:start], ">u4")) if len(data) >= start else ()
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != start + math.prod(shape):
        raise ValueError(f"{path}: not a whole IDX file of {dimensions} dimensions")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _read_cifar(path: Path) -> Pictures:
    """CIFAR-10's binary version: records of a label byte and 3 x 32 x 32 bytes."""
    data = _unpacked(path)
    size = 1 + math.prod(_CIFAR_PICTURE)
    if not data or len(data) % size:
        raise ValueError(f"{path}: {len(data)} bytes are no whole number of CIFAR-10 records of {size}")
    table = np.frombuffer(data, np.uint8).reshape(-1, size)
    return Pictures(table[:, 1:].reshape(-1, *_CIFAR_PICTURE), table[:, 0].astype(np.int64))


def _unpacked(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: does not unpack ({error})") from None
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{path}: more than {_MAX_BYTES:,} bytes, which no known data set of this kind has")
    return data


def class_names(folder: str | Path, count: int) -> tuple[str, ...]:
    """The names in CIFAR's batches.meta.txt, or `count` numbers."""
    meta = Path(folder) / "batches.meta.txt"
    return tuple(meta.read_text().split() if meta.is_file() else (str(number) for number in range(count)))
