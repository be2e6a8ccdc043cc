"""A data set on disk: tars, one index beside each, one `dataset.json`.

In: samples (key, named parts as bytes).  Out: `000000.tar` and `000000.index.safetensors`, whole or absent, and the
facts about a data set that every reader takes from its `dataset.json`.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from safetensors.numpy import save as safetensors_bytes

from vqscale.data.processes import made_progress
from vqscale.data.remote import is_url
from vqscale.data.shardtable import INDEX_SUFFIX, ShardInfo, ShardTable, look_together, remove_tables
from vqscale.files import SEAL, check_seal, replacing, sealed, write_atomically, write_json
from vqscale.topology import Topology

log = logging.getLogger("vqscale")

MANIFEST = "dataset.json"
MOST_LISTED = 2000  # shards that dataset.json itself lists: people, scripts and older versions read it
MAX_LABEL_BYTES = 64
MAX_CLASSES = 1 << 31  # no label may reach it
_KINDS = ("images", "codes", "samples")
_FIELDS = ("offset", "size", "crc32")
_MAX_COUNT = (1 << 63) - 1  # of samples or bytes, which are kept as int64
_PLAIN = re.compile(r"[\w-][\w.-]*\.tar")
# What parsing a damaged file raises, whatever the damage.
_MALFORMED = (
    *(KeyError, TypeError, AttributeError, AssertionError, RecursionError, OverflowError),
    *(json.JSONDecodeError, UnicodeDecodeError, safetensors.SafetensorError),
)


@dataclass
class IndexRows:
    """A shard's index while it is built: one row per sample."""

    keys: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    parts: list[dict[str, tuple[int, int, int]]] = field(default_factory=list)  # name -> offset, size, crc32

    def add(self, key: str, label: int, parts: dict[str, tuple[int, int, int]]) -> None:
        """Append one sample."""
        self.keys.append(key)
        self.labels.append(label)
        self.parts.append(parts)

    def save(self, path: Path, info: ShardInfo) -> str:
        """Write the index, with the tar's size and sha256 in it. Returns the index's own sha256."""
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
        data = safetensors_bytes(table, {"shard": shard})
        write_atomically(path, data)
        return hashlib.sha256(data).hexdigest()


class ShardIndex:
    """Where every part of every sample of one tar is.

    `labels`: int64 [n]; `offset[part]`, `size[part]`, `crc32[part]`: int64 [n], an offset of -1 where a sample lacks
    the part; `name`, `bytes`, `sha256`: of the tar that was indexed; `index_sha256`: of the index itself.
    """

    def __init__(self, table: Mapping[str, np.ndarray], shard: Mapping[str, Any], where: str, index_sha256: str = ""):
        self.where, self.index_sha256 = where, index_sha256
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
    def load(cls, path: str | Path, read: Callable[[Path], bytes] = Path.read_bytes) -> "ShardIndex":
        """Read an index file. Raises FileNotFoundError, or ValueError when it is damaged."""
        try:
            data = read(Path(path))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: this shard's index is missing") from None
        try:
            table = safetensors.numpy.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return cls(table, json.loads(header["__metadata__"]["shard"]), str(path), hashlib.sha256(data).hexdigest())
        except _MALFORMED as error:
            raise ValueError(f"{path}: not a whole shard index ({error})") from None

    def _check(self) -> None:
        columns = [self.labels, self._ends]
        columns += [column[name] for column in (self.offset, self.size, self.crc32) for name in self.part_names]
        if any(column.dtype != np.int64 or column.shape != self.labels.shape for column in columns):
            raise ValueError(f"{self.where}: not a whole shard index (columns of unequal length or type)")
        ends = np.concatenate([[0], self._ends])
        if (np.diff(ends) < 0).any() or ends[-1] != len(self._blob):
            raise ValueError(f"{self.where}: not a whole shard index (the ends of the keys do not fit the keys)")
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


class HashedFile:
    """A binary file that is read, or written, once from front to back, and hashed on the way."""

    def __init__(self, file: Any):
        self.name = file.name
        self.sha256 = hashlib.sha256()
        self._file = file
        self._at = 0

    def tell(self) -> int:
        """How many bytes were read, or written."""
        return self._at

    def read(self, size: int) -> bytes:
        """The next bytes, fewer where the file ends."""
        data = self._file.read(size)
        made_progress()
        self._count(data)
        return data

    def write(self, data: bytes) -> int:
        """Append bytes."""
        self._count(data)
        return self._file.write(data)

    def _count(self, data: bytes) -> None:
        self.sha256.update(data)
        self._at += len(data)


class ShardWriter:
    """Context manager that writes one tar and its index, both or neither.

    `path`: the tar's final path. The index is renamed into place before the tar, so a tar never lacks its index.
    After a clean exit `info` describes the shard; after an error nothing remains.
    The same samples give the same bytes, on any day and for any user.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.info: ShardInfo | None = None
        self._rows = IndexRows()
        self._keys: set[str] = set()

    def __enter__(self) -> "ShardWriter":
        self._block = self._writing()
        return self._block.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._block.__exit__(*error)

    @contextlib.contextmanager
    def _writing(self) -> Iterator["ShardWriter"]:
        with replacing(self.path) as temporary:
            with open(temporary, "wb") as raw:
                file: Any = HashedFile(raw)
                with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as self._tar:
                    yield self
            info = ShardInfo(self.path.name, len(self._rows.keys), file.tell(), file.sha256.hexdigest())
            self.path.unlink(missing_ok=True)  # an older tar must never be seen beside the new index
            index_sha256 = self._rows.save(self.path.with_suffix(INDEX_SUFFIX), info)
        self.info = dataclasses.replace(info, index_sha256=index_sha256)

    def write(self, key: str, parts: dict[str, bytes]) -> None:
        """Append a sample. `parts`: extension -> bytes, stored in this order; `cls` must be the label.

        Raises ValueError for a duplicate or unusable key or a missing or malformed label.
        """
        check_key(key, str(self.path))
        if key in self._keys:
            raise ValueError(f"{self.path}: key {key!r} is written twice")
        label = parse_label(parts.get("cls"), f"{self.path}: key {key!r}")
        rows = {}
        for name, data in parts.items():
            member = tarfile.TarInfo(f"{key}.{name}")  # its time is the integer 0: a float would add a PAX header
            member.size, member.mode, member.uname, member.gname = len(data), 0o444, "vqscale", "vqscale"
            self._tar.addfile(member, io.BytesIO(data))
            start = self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            rows[name] = (start, len(data), zlib.crc32(data))
        self._keys.add(key)
        self._rows.add(key, label, rows)


def shard_info(tar: Path) -> ShardInfo | None:
    """The description of a tar and its index as `ShardWriter` left them; None if either is missing or not whole."""
    try:
        index = ShardIndex.load(tar.with_suffix(INDEX_SUFFIX))
        if tar.stat().st_size != index.bytes:
            return None
    except (OSError, ValueError):
        return None
    return ShardInfo(tar.name, len(index), index.bytes, index.sha256, index_sha256=index.index_sha256)


@dataclass(frozen=True)
class Manifest:
    """`dataset.json`: what is in a data set. Make one with `Manifest.of`, which computes the fingerprint.

    `kind`: images | codes | samples. `transform`: how images were stored. `extra`: facts that the kind needs (codes:
    tokenizer, `num_codes`, `levels` top first, views, …). `shards`: a tuple; more than MOST_LISTED, a `ShardTable`.
    """

    kind: str
    shards: Sequence[ShardInfo]
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
        shards = ShardTable.of(shards) if len(shards) > MOST_LISTED else tuple(shards)
        new = cls(kind, shards, 0, tuple(classes), dict(transform or {}), "", dict(extra or {}))
        facts = json.dumps({"shards": new.column("sha256"), "kind": kind, "classes": list(classes)})
        fingerprint = "sha256:" + hashlib.sha256(facts.encode()).hexdigest()
        return dataclasses.replace(new, num_samples=sum(new.column("num_samples").tolist()), fingerprint=fingerprint)

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read `<folder>/dataset.json`. Raises FileNotFoundError, or ValueError naming the file when it is not one."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: {folder} is not a data set")
        try:
            raw = json.loads(path.read_text())
            if raw["version"] not in (1, 2):
                raise ValueError(f"{path}: version {raw['version']} is not one this program reads (1, 2)")
            assert raw["version"] == 1 or SEAL in raw, f"it has no {SEAL}"
            raw = check_seal(path, raw)
            assert isinstance(raw["transform"], dict) and isinstance(raw["extra"], dict), "transform, extra: no objects"
            assert all(isinstance(name, str) for name in raw["classes"]), "classes: not a list of names"
            if raw.pop("version") == 2:
                return cls._with_table(Path(folder), **raw)
            shards = tuple(_checked(ShardInfo(**shard)) for shard in raw["shards"])
            manifest = cls.of(raw["kind"], shards, raw["classes"], raw["transform"], raw["extra"])
        except _MALFORMED as error:
            raise ValueError(f"{path}: not a data set's description ({type(error).__name__}: {error})") from None
        if (manifest.num_samples, manifest.fingerprint) != (raw["num_samples"], raw["fingerprint"]):
            raise ValueError(f"{path}: was edited: its shards give {manifest.fingerprint}, not {raw['fingerprint']}")
        return manifest

    @classmethod
    def _with_table(
        cls, folder: Path, *, kind: str, shards: dict[str, Any], num_samples: int, classes: list[str], **facts: Any
    ) -> "Manifest":
        """Two checksums, of `dataset.json` and of the columns, vouch for the fingerprint: it is not computed again."""
        assert kind in _KINDS, kind
        table = ShardTable.load(folder, **shards)
        samples, sizes = table.column("num_samples"), table.column("bytes")
        if (samples < 0).any() or (samples > sizes // tarfile.BLOCKSIZE).any() or samples.sum() != num_samples:
            raise TypeError(f"shards of {samples.sum()} samples, not {num_samples}, or more than fit in their bytes")
        return cls(kind, table, num_samples, tuple(classes), **facts)

    def save(self, folder: str | Path) -> None:
        """Write `<folder>/dataset.json` atomically: the last step of making a data set."""
        table = self.shards.save(Path(folder)) if isinstance(self.shards, ShardTable) else {}
        optional = ("index", "index_sha256")
        listed = [
            {k: v for k, v in dataclasses.asdict(shard).items() if v or k not in optional}
            for shard in (() if table else self.shards)
        ]
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        raw = {"version": 2 if table else 1, **facts, "shards": table or listed}
        write_json(Path(folder) / MANIFEST, sealed(raw))
        remove_tables(Path(folder), keep=table.get("file", ""))

    def column(self, field: str) -> Any:
        """A field of every shard: `num_samples` or `bytes` as int64 [shards], `name` or `sha256` as a list."""
        if isinstance(self.shards, ShardTable):
            return self.shards.column(field)
        values = [getattr(shard, field) for shard in self.shards]
        return np.array(values, np.int64) if field in ("num_samples", "bytes") else values

    def tar(self, folder: str | Path, shard: int) -> Path | str:
        """A shard's tar: a path, or the URL of a remote one, which is read through `data.cache`."""
        name = self.shards[shard].name
        return name if is_url(name) else Path(folder) / name  # an absolute name replaces the folder

    def runs(self, shards: Sequence[int]) -> list[range]:
        """The positions of each of these shards' samples, counted over the whole data set in stored order."""
        ends = np.append(0, np.cumsum(self.column("num_samples")))
        return [range(int(ends[n]), int(ends[n + 1])) for n in shards]

    def names_of_results(self) -> list[str]:
        """A file name for the result of each shard: the tar's own, or a number where those repeat or are not plain."""
        names = [Path(name).name for name in self.column("name")]
        if len(set(names)) == len(names) and all(_PLAIN.fullmatch(name) for name in names):
            return names
        return [f"{n:06d}.tar" for n in range(len(self.shards))]

    def index(self, folder: str | Path, shard: int, read: Callable[[Path], bytes] = Path.read_bytes) -> ShardIndex:
        """A shard's index. Raises ValueError when it was changed, belongs to another tar, or has impossible labels."""
        info = self.shards[shard]
        index = ShardIndex.load(Path(folder) / info.index_name, read)
        if (len(index), index.bytes, index.sha256) != (info.num_samples, info.bytes, info.sha256):
            raise ValueError(f"{index.where}: indexes another tar than {MANIFEST} names (sha256 or counts differ)")
        if info.index_sha256 and index.index_sha256 != info.index_sha256:
            raise ValueError(
                f"{index.where}: was damaged or changed: its sha256 is {index.index_sha256[:12]}…, {MANIFEST} has "
                f"{info.index_sha256[:12]}…"
            )
        for row in np.flatnonzero((index.labels < 0) | (index.labels >= len(self.classes)))[:1].tolist():
            raise ValueError(
                f"{index.where}: label {index.labels[row]} of key {index.key(row)!r} is outside the "
                f"{len(self.classes)} classes of {MANIFEST}"
            )
        return index


def _checked(shard: ShardInfo) -> ShardInfo:
    """As written by others. Raises TypeError for a field that is no text, or no count that the tar has room for."""
    for name, value in dataclasses.asdict(shard).items():
        expected = int if name in ("num_samples", "bytes") else str
        if type(value) is not expected or (isinstance(value, int) and not 0 <= value <= _MAX_COUNT):
            raise TypeError(f"a shard has {name}={value!r}")
    if shard.num_samples > shard.bytes // tarfile.BLOCKSIZE:
        raise TypeError(f"{shard.num_samples} samples do not fit in the {shard.bytes} bytes of {shard.name}")
    return shard


def missing_file(folder: Path, topology: Topology) -> Path | None:
    """dataset.json, or the first tar that is not there whole with its index; None where nothing of a data set is gone.

    Collective: each rank looks at its share. For data sets that `ShardWriter` wrote.
    """
    try:
        shards = Manifest.load(folder).shards
    except (OSError, ValueError):
        return folder / MANIFEST
    are_whole = look_together(topology, range(len(shards)), lambda n: shard_info(folder / shards[n].name) is not None)
    return None if all(are_whole) else folder / shards[are_whole.index(False)].name


def resolve(folder: str | Path, split: str = "train", *, made_by: str = "pack") -> Path:
    """The data set at `folder`: itself, or its `train` or `holdout` split. Without a holdout, train, with a log line.

    Raises FileNotFoundError naming the stage that makes such a folder.
    """
    folder = Path(folder)
    for candidate in (folder, folder / split):
        if (candidate / MANIFEST).is_file():
            return candidate
    if split == "holdout" and (folder / "train" / MANIFEST).is_file():
        log.warning("%s has no holdout split: using %s", folder, folder / "train")
        return folder / "train"
    state = "has no dataset.json (unfinished?)" if folder.exists() else "does not exist"
    raise FileNotFoundError(f"data set {folder} {state}; `vqscale {made_by}` makes it")


def check_key(key: str, where: str) -> None:
    """Raises ValueError for a key that cannot be a member's name or would lead out of a folder."""
    base = key.rsplit("/", 1)[-1]
    if key.startswith("/") or ".." in key.split("/") or "\0" in key or "\\..\\" in key:
        raise ValueError(f"{where}: key {key!r} leads out of the data set")
    if not base or "." in base:
        raise ValueError(f"{where}: key {key!r} must end in a name without dots")


def parse_label(data: bytes | None, where: str, num_classes: int = MAX_CLASSES) -> int:
    """The class number in a `cls` part. Raises ValueError naming `where`."""
    if data is None:
        raise ValueError(f"{where} has no label (no .cls part)")
    if len(data) > MAX_LABEL_BYTES:
        raise ValueError(f"{where}: the label is longer than {MAX_LABEL_BYTES} bytes: {bytes(data[:20])!r}…")
    text = bytes(data).strip()
    if not text.removeprefix(b"-").isdigit():
        raise ValueError(f"{where}: label {text.decode('utf-8', 'replace')!r} is not a number")
    label = int(text)
    if label < 0:
        raise ValueError(f"{where}: label {label} is negative")
    if label >= num_classes:
        raise ValueError(f"{where}: label {label} is too large, outside the {num_classes} classes")
    return label


def encode_npy(array: np.ndarray) -> bytes:
    """The bytes of an .npy file, never pickled."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()
