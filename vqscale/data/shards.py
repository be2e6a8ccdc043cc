"""A data set on disk: tars, one index beside each, one `dataset.json`.

In: samples (key, named parts as bytes).  Out: `000000.tar` + `000000.index.safetensors` written so that a tar that
is there is whole, and the facts about a data set that every consumer reads instead of being told.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import safetensors
from safetensors.numpy import save as safetensors_bytes
from webdataset.writer import TarWriter

from vqscale.data.remote import is_url
from vqscale.files import check_seal, fsync_folder, sealed, write_atomically, write_json

MANIFEST = "dataset.json"
_KINDS = ("images", "codes", "samples")
_FIELDS = ("offset", "size", "crc32")
_PLAIN = re.compile(r"[\w-][\w.-]*\.tar")


@dataclass(frozen=True)
class ShardInfo:
    """One tar of a data set."""

    name: str  # relative to the data set's folder; for a tar that others wrote an absolute path or a URL
    num_samples: int
    bytes: int
    sha256: str  # of the tar, hexadecimal
    index: str = ""  # the index's file name; "" = the tar's own name with .index.safetensors

    @property
    def index_name(self) -> str:
        """File name of the index inside the data set's folder."""
        return self.index or Path(self.name).with_suffix(".index.safetensors").name


@dataclass
class IndexRows:
    """A shard's index while it grows: one row per sample."""

    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    parts: list[dict[str, tuple[int, int, int]]] = field(default_factory=list)  # name -> offset, size, crc32

    def add(self, key: str, label: int, parts: dict[str, tuple[int, int, int]]) -> None:
        """Append one sample."""
        self.keys.append(key)
        self.labels.append(label)
        self.parts.append(parts)

    def save(self, path: Path, info: ShardInfo) -> None:
        """Write the index atomically; it remembers the tar's size and sha256."""
        names = sorted({name for row in self.parts for name in row})
        table = {
            f"{name}.{column}": np.array([row.get(name, (-1, 0, 0))[i] for row in self.parts], np.int64)
            for name in names
            for i, column in enumerate(_FIELDS)
        }
        encoded = [key.encode("utf-8", "surrogateescape") for key in self.keys]
        table["keys"] = np.frombuffer(b"".join(encoded), np.uint8)
        table["key_ends"] = np.cumsum([len(key) for key in encoded], dtype=np.int64)
        table["label"] = np.array(self.labels, np.int64)
        # One metadata entry: safetensors writes several in an arbitrary order, and our bytes are reproducible.
        shard = json.dumps({"name": Path(info.name).name, "bytes": info.bytes, "sha256": info.sha256})
        write_atomically(path, safetensors_bytes(table, {"shard": shard}))


class ShardIndex:
    """Where every part of every sample of one tar is.

    `labels`: int64 [n]; `offset[part]`, `size[part]`, `crc32[part]`: int64 [n], an offset of -1 where a sample lacks
    the part; `name`, `bytes`, `sha256`: of the tar that was indexed.
    """

    def __init__(self, table: Mapping[str, np.ndarray], shard: Mapping[str, Any], where: str):
        self.where = where
        self.name, self.bytes, self.sha256 = str(shard["name"]), int(shard["bytes"]), str(shard["sha256"])
        self.labels = table["label"]
        self._blob, self._ends = table["keys"].tobytes(), table["key_ends"]
        self.part_names = tuple(
            name.removesuffix(".offset") for name in table if name.endswith(".offset") and f"{name[:-7]}.crc32" in table
        )
        self.offset, self.size, self.crc32 = (
            {name: table[f"{name}.{column}"] for name in self.part_names} for column in _FIELDS
        )
        self._check()

    @classmethod
    def load(cls, path: str | Path) -> "ShardIndex":
        """Read an index file. Raises FileNotFoundError, or ValueError when it is damaged."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: this shard's index is missing")
        try:
            with safetensors.safe_open(str(path), framework="np") as file:
                shard = json.loads((file.metadata() or {})["shard"])
                table = {name: file.get_tensor(name) for name in file.keys()}
            return cls(table, shard, str(path))
        except (safetensors.SafetensorError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a whole shard index ({error})") from None

    def _check(self) -> None:
        columns = [self.labels, self._ends]
        columns += [column[name] for column in (self.offset, self.size, self.crc32) for name in self.part_names]
        if any(column.dtype != np.int64 or column.shape != self.labels.shape for column in columns):
            raise ValueError(f"{self.where}: not a whole shard index (columns of unequal length or type)")
        ends = np.concatenate([[0], self._ends])
        if (np.diff(ends) < 0).any() or ends[-1] != len(self._blob):
            raise ValueError(f"{self.where}: not a whole shard index (keys do not fit)")
        for name in self.part_names:
            offset, size = self.offset[name], self.size[name]
            if (offset < -1).any() or (size < 0).any() or (size > self.bytes - np.maximum(offset, 0)).any():
                raise ValueError(f"{self.where}: part {name!r} points outside the tar's {self.bytes} bytes")

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        """The sample's key."""
        start = int(self._ends[row - 1]) if row else 0
        return self._blob[start : int(self._ends[row])].decode("utf-8", "surrogateescape")

    @property
    def keys(self) -> list[str]:
        """All keys in row order."""
        return [self.key(row) for row in range(len(self))]


class _HashingFile:
    """A binary file that knows the sha256 and the count of what was written."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self.sha256 = hashlib.sha256()
        self.count = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.count += len(data)
        return self._raw.write(data)


class ShardWriter:
    """Context manager that writes one tar and its index, both or neither.

    `path`: the tar's final path. The index is renamed into place before the tar: a tar that can be seen has its index.
    After a clean exit `info` describes the shard; after an error nothing remains.
    The same samples give the same bytes, on any day and for any user.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.index_path = self.path.with_suffix(".index.safetensors")
        self.info: ShardInfo | None = None
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._rows = IndexRows()
        self._seen: set[str] = set()

    def __enter__(self) -> "ShardWriter":
        self._raw = open(self._temporary, "wb")
        self._file = _HashingFile(self._raw)
        # mtime must be the integer 0: a float adds a PAX header per member and makes bytes differ between runs.
        self._tar = TarWriter(self._file, encoder=False, user="vqscale", group="vqscale", mode=0o444, mtime=0)
        return self

    def write(self, key: str, parts: dict[str, bytes]) -> None:
        """Append a sample. `parts`: extension -> bytes, stored in this order; `cls` must hold the label.

        Raises ValueError for a duplicate or unusable key or a missing or malformed label.
        """
        check_key(key, str(self.path))
        if key in self._seen:
            raise ValueError(f"{self.path}: key {key!r} is written twice")
        label = parse_label(parts.get("cls"), f"{self.path}: key {key!r}")
        rows = {}
        for name, data in parts.items():
            self._tar.write({"__key__": key, name: data})
            start = self._tar.tarstream.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            rows[name] = (start, len(data), zlib.crc32(data))
        self._seen.add(key)
        self._rows.add(key, label, rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            with contextlib.suppress(Exception):  # already closed, or closing what is thrown away
                self._tar.close()
            self._raw.close()
            self._temporary.unlink(missing_ok=True)

    def _commit(self) -> None:
        self._tar.close()
        self._raw.flush()
        os.fsync(self._raw.fileno())
        info = ShardInfo(self.path.name, len(self._rows.keys), self._file.count, self._file.sha256.hexdigest())
        self.path.unlink(missing_ok=True)  # an older tar must never stand beside the new index
        self._rows.save(self.index_path, info)
        os.replace(self._temporary, self.path)
        fsync_folder(self.path.parent)
        self.info = info


def shard_info(tar: Path) -> ShardInfo | None:
    """What a finished `ShardWriter` said of this tar, from its index; None if the pair is not there or not whole."""
    try:
        index = ShardIndex.load(tar.with_suffix(".index.safetensors"))
        if tar.stat().st_size != index.bytes:
            return None
    except (OSError, ValueError):
        return None
    return ShardInfo(tar.name, len(index), index.bytes, index.sha256)


@dataclass(frozen=True)
class Manifest:
    """`dataset.json`: what a data set holds. Make one with `Manifest.of`, which computes the fingerprint.

    `kind`: images | codes | samples. `transform`: how the stored form was made. `extra`: what the kind needs (codes:
    tokenizer, `num_codes`, `levels` top first, views, …).
    """

    kind: str
    shards: tuple[ShardInfo, ...]
    num_samples: int
    classes: tuple[str, ...]
    transform: dict[str, Any]
    fingerprint: str
    extra: dict[str, Any]

    @classmethod
    def of(
        cls,
        kind: str,
        shards: Sequence[ShardInfo],
        classes: Sequence[str],
        transform: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> "Manifest":
        """The manifest of these shards, fingerprinted over the shards' sha256s in order, the kind and the classes."""
        assert kind in _KINDS, kind
        facts = json.dumps({"shards": [s.sha256 for s in shards], "kind": kind, "classes": list(classes)})
        fingerprint = "sha256:" + hashlib.sha256(facts.encode()).hexdigest()
        total = sum(s.num_samples for s in shards)
        return cls(kind, tuple(shards), total, tuple(classes), dict(transform or {}), fingerprint, dict(extra or {}))

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read `<folder>/dataset.json`. Raises FileNotFoundError, or ValueError naming the file when it is not one."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {folder} is not a data set")
        try:
            raw = json.loads(path.read_text())
            if raw["version"] != 1:
                raise ValueError(f"{path}: version {raw['version']} is not one this program reads (1)")
            raw = check_seal(path, raw)
            shards = tuple(ShardInfo(**shard) for shard in raw["shards"])
            made = cls.of(raw["kind"], shards, raw["classes"], raw["transform"], raw["extra"])
        except (KeyError, TypeError, AttributeError, AssertionError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a data set's description ({type(error).__name__}: {error})") from None
        if (made.num_samples, made.fingerprint) != (raw["num_samples"], raw["fingerprint"]):
            raise ValueError(f"{path}: was edited: its shards give {made.fingerprint}, not {raw['fingerprint']}")
        return made

    def save(self, folder: str | Path) -> None:
        """Write `<folder>/dataset.json` atomically: the last step of making a data set."""
        shards = [{k: v for k, v in dataclasses.asdict(shard).items() if k != "index" or v} for shard in self.shards]
        raw = {"version": 1, **dataclasses.asdict(self), "shards": shards}
        write_json(Path(folder) / MANIFEST, sealed(raw))

    def tar(self, folder: str | Path, shard: int) -> Path | str:
        """Where a shard's tar is: a path, or the URL of a remote one, which is read through `data.cache`."""
        name = self.shards[shard].name
        return name if is_url(name) else Path(folder) / name  # an absolute name replaces the folder

    def names_of_results(self) -> list[str]:
        """A file name for what is made of each shard: the tar's own, or the index's where those are not different."""
        names = [Path(shard.name).name for shard in self.shards]
        if len(set(names)) == len(names) and all(_PLAIN.fullmatch(name) for name in names):
            return names
        return [shard.index_name.removesuffix(".index.safetensors") + ".tar" for shard in self.shards]

    def index(self, folder: str | Path, shard: int) -> ShardIndex:
        """A shard's index. Raises ValueError when it belongs to another tar than the manifest names."""
        info = self.shards[shard]
        index = ShardIndex.load(Path(folder) / info.index_name)
        if (len(index), index.bytes, index.sha256) != (info.num_samples, info.bytes, info.sha256):
            raise ValueError(f"{index.where}: indexes another tar than {MANIFEST} names (sha256 or counts differ)")
        return index


def resolve(folder: str | Path, split: str = "train", *, made_by: str = "pack") -> Path:
    """The data set at `folder`: itself, or its `train`/`holdout` part. A missing holdout becomes train, and says so.

    Raises FileNotFoundError naming the stage that makes such a folder.
    """
    folder = Path(folder)
    for candidate in (folder, folder / split):
        if (candidate / MANIFEST).is_file():
            return candidate
    if split == "holdout" and (folder / "train" / MANIFEST).is_file():
        print(f"{folder} has no holdout part: using {folder / 'train'}")
        return folder / "train"
    state = "has no dataset.json (unfinished?)" if folder.exists() else "does not exist"
    raise FileNotFoundError(f"data set {folder} {state}; `vqscale {made_by}` makes it")


def check_key(key: str, where: str) -> None:
    """Raises ValueError for a key that could not be a member's name or would lead out of a folder."""
    base = key.rsplit("/", 1)[-1]
    if key.startswith("/") or ".." in key.split("/") or "\0" in key or "\\..\\" in key:
        raise ValueError(f"{where}: key {key!r} leads out of the data set")
    if not base or "." in base:
        raise ValueError(f"{where}: key {key!r} must end in a name without dots")


def parse_label(data: bytes | None, where: str, num_classes: int | None = None) -> int:
    """The class number in a `cls` part. Raises ValueError naming `where`."""
    if data is None:
        raise ValueError(f"{where} has no label (no .cls part)")
    text = bytes(data[:32]).strip()
    if not text.removeprefix(b"-").isdigit():
        raise ValueError(f"{where}: label {text.decode('utf-8', 'replace')!r} is not a number")
    label = int(text)
    if label < 0 or (num_classes is not None and label >= num_classes):
        known = "" if num_classes is None else f", outside the {num_classes} classes"
        raise ValueError(f"{where}: label {label} is {'negative' if label < 0 else 'too large'}{known}")
    return label


def encode_npy(array: np.ndarray) -> bytes:
    """The bytes of an .npy file, never pickled."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()
