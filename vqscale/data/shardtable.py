"""The shards of a large data set as columns: one safetensors file beside `dataset.json`, read by memory map.

In: what is known of each shard.  Out: a sequence of `ShardInfo`, each made when it is asked for, and their numbers as
arrays. The file holds 80 bytes per shard, and the names where they follow no pattern; processes of a node share it.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from jaxtyping import Shaped
from safetensors.numpy import save as safetensors_bytes

from vqscale.files import sha256_of, write_atomically
from vqscale.topology import Topology

INDEX_SUFFIX = ".index.safetensors"
_FILE = re.compile(r"shards-[0-9a-f]{12}\.safetensors")
_NUMBERED = re.compile(r"(.*?)([0-9]+)([^0-9]*)", re.DOTALL)
_MOST_DIGITS = 20
# One shard's numbers; a digest of zeros stands for none, num_samples = -1 for a shard that is not there.
_ROW = np.dtype([("num_samples", "<i8"), ("bytes", "<i8"), ("sha256", "u1", 32), ("index_sha256", "u1", 32)])
_DTYPES = {"I64": "<i8", "U8": "u1"}
Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ShardInfo:
    """One tar of a data set."""

    name: str  # relative to the data set's folder; for a tar that others wrote an absolute path or a URL
    num_samples: int
    bytes: int
    sha256: str  # of the tar, hexadecimal
    index: str = ""  # the index's file name; "" = the tar's own name with .index.safetensors
    index_sha256: str = ""  # of the index; "" in data sets of earlier versions

    @property
    def index_name(self) -> str:
        """File name of the index inside the data set's folder."""
        return self.index or Path(self.name).with_suffix(INDEX_SUFFIX).name


class ShardTable(Sequence[ShardInfo]):
    """Shards as columns: `num_samples` and `bytes`, int64 [n]; `sha256` and `index_sha256`, uint8 [n, 32]; names."""

    def __init__(self, data: bytes | mmap.mmap):
        """`data`: a columns file's content. Raises ValueError, KeyError, TypeError or AssertionError for any other."""
        self.data = data
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        texts = json.loads(header.pop("__metadata__")["texts"])
        self._columns = {name: _column(data, start, **entry) for name, entry in header.items()}
        self.name, self._index = (_reader(texts[field], field, self._columns) for field in ("name", "index"))
        shapes = {field: (len(self), *_ROW[field].shape) for field in _ROW.names or ()}
        assert {field: self._columns[field].shape for field in shapes} == shapes, "columns of unequal length"

    @classmethod
    def of(cls, shards: Sequence[ShardInfo]) -> "ShardTable":
        """The columns of these shards. Raises ValueError for a sha256 that is not one."""
        if isinstance(shards, cls):
            return shards
        return cls.of_rows(_rows(shards), [shard.name for shard in shards], [shard.index for shard in shards])

    @classmethod
    def of_rows(cls, rows: np.ndarray, names: Sequence[str], indexes: Sequence[str] = ()) -> "ShardTable":
        """The columns of `rows`, as `survey` returns them, with the names of tars and indexes (none: "" for all).

        Shards that are not there are left out.
        """
        whole = np.flatnonzero(rows["num_samples"] >= 0).tolist()
        columns = {field: rows[field][whole] for field in _ROW.names or ()}
        columns_of_texts = {"name": [names[n] for n in whole], "index": [indexes[n] for n in whole] if indexes else []}
        texts = {field: _store(values, field, columns) for field, values in columns_of_texts.items()}
        return cls(safetensors_bytes(columns, {"texts": json.dumps(texts)}))

    @classmethod
    def load(cls, folder: Path, file: str, count: int, bytes: int, sha256: str) -> "ShardTable":
        """Map the file that `dataset.json` describes so. Raises FileNotFoundError or ValueError where it is another."""
        path = folder / file
        assert _FILE.fullmatch(file), f"{file!r} is no file of shards"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: it lists the {count} shards of dataset.json")
        if (size := path.stat().st_size) != bytes:
            raise ValueError(f"{path}: {size} bytes, not the {bytes} of dataset.json: cut short, or another file")
        if (actual := sha256_of(path)) != sha256:
            raise ValueError(f"{path}: was damaged: its sha256 is {actual[:12]}…, dataset.json has {sha256[:12]}…")
        with open(path, "rb") as opened:
            table = cls(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        if len(table) != count:
            raise ValueError(f"{path}: {len(table)} shards, but dataset.json says {count}")
        return table

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the file, unless it is there. Returns what `dataset.json` says of it."""
        sha256 = hashlib.sha256(self.data).hexdigest()
        path = folder / f"shards-{sha256[:12]}.safetensors"
        if not path.is_file() or path.stat().st_size != len(self.data):
            write_atomically(path, bytes(self.data))
        return {"file": path.name, "count": len(self), "bytes": len(self.data), "sha256": sha256}

    def column(self, field: str) -> Any:
        """`num_samples` or `bytes`: int64 [n]; `name` or `sha256`: a list."""
        if field == "name":
            return [self.name(n) for n in range(len(self))]
        if field == "sha256":
            digests = self._columns[field].tobytes().hex()
            return [digests[n : n + 64] for n in range(0, len(digests), 64)]
        return self._columns[field]

    def __len__(self) -> int:
        return len(self._columns["num_samples"])

    @overload
    def __getitem__(self, number: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, number: slice) -> list[ShardInfo]: ...
    def __getitem__(self, number: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(number, slice):
            return [self[n] for n in range(len(self))[number]]
        n = range(len(self))[number]
        sizes = int(self._columns["num_samples"][n]), int(self._columns["bytes"][n])
        sha256, index_sha256 = (_hexadecimal(self._columns[field][n]) for field in ("sha256", "index_sha256"))
        return ShardInfo(self.name(n), *sizes, sha256, self._index(n), index_sha256)


def remove_tables(folder: Path, keep: str = "") -> None:
    """Remove the columns files of a folder but `keep`: those that its `dataset.json` no longer names."""
    for path in folder.glob("shards-*.safetensors"):
        if path.name != keep and _FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def survey(topology: Topology, count: int, look: Callable[[int], ShardInfo | None]) -> Shaped[np.ndarray, " count"]:
    """Collective: what `look(n)` says of each of `count` shards, as rows on every rank; `num_samples` is -1 for None.

    Each shard is looked at by one rank: n, n + ranks, … by rank n. The names are left out: who asks has them.
    """
    absent = ShardInfo("", -1, 0, "")
    mine = range(topology.rank, count, topology.world_size)
    pieces = topology.gather(_rows([look(n) or absent for n in mine]))
    rows = np.zeros(count, _ROW)
    for rank, piece in enumerate(pieces):
        rows[rank :: topology.world_size] = piece
    return rows


def look_together(topology: Topology, items: Sequence[Item], look: Callable[[Item], Answer]) -> list[Answer]:
    """Collective: `look(item)` of each item, on every rank. Each item is looked at by one rank, as in `survey`.

    A ValueError or OSError of one rank is raised on all, as a ValueError.
    """
    pieces = topology.on_each(lambda: [look(item) for item in items[topology.rank :: topology.world_size]])
    answers: list[Any] = [None] * len(items)
    for rank, piece in enumerate(pieces):
        answers[rank :: topology.world_size] = piece
    return answers


def _rows(shards: Sequence[ShardInfo]) -> np.ndarray:
    rows = np.zeros(len(shards), _ROW)
    for field in ("num_samples", "bytes"):
        rows[field] = [getattr(shard, field) for shard in shards]
    for field in ("sha256", "index_sha256"):
        digests = b"".join(_digest(getattr(shard, field)) for shard in shards)
        rows[field] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
    return rows


def _digest(text: str) -> bytes:
    if len(digest := bytes.fromhex(text or "00" * 32)) != 32:
        raise ValueError(f"{text!r} is not a sha256 in hexadecimal")
    return digest


def _hexadecimal(digest: np.ndarray) -> str:
    return digest.tobytes().hex() if digest.any() else ""


def _column(data: bytes | mmap.mmap, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(data, _DTYPES[dtype], count, start + data_offsets[0]).reshape(shape)


def _store(texts: list[str], field: str, columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """How to read `texts` again: a pattern, or {} and two more columns."""
    if not any(texts):
        return {"prefix": ""}
    prefix, digits, suffix = match.groups() if (match := _NUMBERED.fullmatch(texts[0])) else ("", "", "")
    pattern = {"prefix": prefix, "first": int(digits or 0), "digits": len(digits), "suffix": suffix}
    read = _reader(pattern, field, {})
    if len(digits) in range(1, _MOST_DIGITS) and all(text == read(n) for n, text in enumerate(texts)):
        return pattern
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    columns[field] = np.frombuffer(b"".join(encoded), np.uint8)
    columns[f"{field}_ends"] = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return {}


def _reader(pattern: Mapping[str, Any], field: str, columns: Mapping[str, np.ndarray]) -> Callable[[int], str]:
    """n -> the text of shard n."""
    if pattern:
        prefix, first, digits, suffix = (pattern.get(key, "") for key in ("prefix", "first", "digits", "suffix"))
        assert digits == "" or digits in range(_MOST_DIGITS), f"numbers of {digits} digits"
        return (lambda n: prefix) if digits == "" else (lambda n: f"{prefix}{first + n:0{digits}d}{suffix}")
    blob, ends = columns[field], columns[f"{field}_ends"]
    return lambda n: blob[ends[n - 1] if n else 0 : ends[n]].tobytes().decode("utf-8", "surrogateescape")
