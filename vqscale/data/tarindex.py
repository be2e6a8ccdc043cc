"""Tars that others wrote -> an index, or a refusal that names member and offset.

In: any ordinary WebDataset tar (ustar, PAX, GNU long names).  Out: its `ShardInfo` and its index rows. Each byte is
read once: header checksums, contents (crc32 per part) and the sha256 of the whole. Members are grouped and named as
webdataset does it. Nothing is extracted, decoded or run.
"""

import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vqscale.data.remote import RemoteFile, open_tar
from vqscale.data.shards import IndexRows, ShardInfo, check_key, parse_label

_BLOCK = 512
_ZERO = bytes(_BLOCK)
_MAX_EXTENSION = 1 << 20  # bytes of a PAX or long-name header
_MAX_PARTS = 256  # different part names in one tar
_CHUNK = 1 << 20
_REGULAR = (b"0", b"\0", b"7")
_DIRECTORY = b"5"
_REFUSED = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
# As in webdataset: the part's name begins at the first dot of the last path component.
_SPLIT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its contents are at [offset, offset + size)."""

    name: str
    offset: int
    size: int
    crc32: int
    label: bytes  # the first bytes, for a label


class _Stream:
    """A tar read front to back, hashed on the way."""

    def __init__(self, file: BinaryIO | RemoteFile):
        self._file, self.path = file, file.name
        self.sha256 = hashlib.sha256()
        self.at = 0

    def take(self, size: int, what: str) -> bytes:
        """The next bytes. Raises ValueError when the tar ends before them."""
        data = self._file.read(size)
        self.sha256.update(data)
        self.at += len(data)
        if len(data) < size:
            raise ValueError(f"{self.path}: cut short at byte {self.at}, inside {what}")
        return data

    def contents(self, size: int, name: str) -> Iterator[bytes]:
        """A member's contents in chunks, and its padding passed over."""
        what = f"member {name!r}"
        for done in range(0, size, _CHUNK):
            yield self.take(min(_CHUNK, size - done), what)
        self.take(-size % _BLOCK, what)

    def rest(self) -> Iterator[bytes]:
        """What follows, to the end of the file."""
        while data := self._file.read(_CHUNK):
            self.sha256.update(data)
            self.at += len(data)
            yield data


def index_tar(
    tar: str | Path, num_classes: int | None = None, labels: str = "cls", allow_pipe: bool = False
) -> tuple[ShardInfo, IndexRows]:
    """Index a WebDataset tar, a file or what is at a URL.

    num_classes: labels must be below it. labels: `cls` = from each sample's .cls part; `none` = all 0.
    Raises FileNotFoundError, OSError for a URL that cannot be read to its end, or ValueError naming tar, member or key
    and offset: cut short anywhere, damaged header, link, device, key that leads out of the folder, duplicate key or
    part, label missing or not in [0, num_classes).
    """
    with open_tar(tar, allow_pipe) as file:
        stream = _Stream(file)
        rows = _Rows(stream.path, num_classes, labels)
        for member in members(stream):
            rows.add(member)
    rows.finish()
    if not rows.rows.keys:
        raise ValueError(f"{stream.path}: holds no samples")
    return ShardInfo(str(tar), len(rows.rows.keys), stream.at, stream.sha256.hexdigest()), rows.rows


class _Rows:
    """Groups consecutive members of one key into samples."""

    def __init__(self, path: str, num_classes: int | None, labels: str):
        self.rows = IndexRows()
        self._path, self._num_classes, self._labels = path, num_classes, labels
        self._key = ""
        self._parts: dict[str, Member] = {}
        self._seen: set[str] = set()
        self._names: set[str] = set()

    def add(self, member: Member) -> None:
        where = f"{self._path} at byte {member.offset}"
        _check_name(member.name, where)
        split = _SPLIT.match(member.name)
        if split is None or _META.match(member.name):
            return  # a README, a hidden file, webdataset's own notes: not part of any sample
        key, part = split[1], split[2].lower()
        check_key(key, where)
        if key != self._key:
            self.finish()
            if key in self._seen:
                raise ValueError(f"{where}: key {key!r} comes a second time")
            self._key = key
        if part in self._parts:
            raise ValueError(f"{where}: key {key!r} has two parts {part!r}")
        self._parts[part] = member
        self._names.add(part)
        if len(self._names) > _MAX_PARTS:
            raise ValueError(f"{where}: more than {_MAX_PARTS} different part names; are there dots in the keys?")

    def finish(self) -> None:
        """Close the sample at hand."""
        if not self._parts:
            return
        label = self._parts["cls"].label if "cls" in self._parts else None
        number = 0
        if self._labels == "cls":
            number = parse_label(label, f"{self._path}: key {self._key!r}", self._num_classes)
        self.rows.add(self._key, number, {n: (m.offset, m.size, m.crc32) for n, m in self._parts.items()})
        self._seen.add(self._key)
        self._parts = {}


def _check_name(name: str, where: str) -> None:
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{where}: member {name!r} leads out of the data set")


def members(stream: _Stream) -> Iterator[Member]:
    """The regular files of a tar, with its extension headers applied. Raises ValueError as `index_tar` says."""
    common: dict[str, str] = {}
    special: dict[str, str] = {}
    while (header := stream.take(_BLOCK, "a header; its end mark is missing")) != _ZERO:
        at = stream.at - _BLOCK
        kind, name, size = _parse_header(header, stream.path, at)
        if kind in (b"x", b"g", b"L", b"K"):
            target = common if kind == b"g" else special
            target.update(_extension(stream, kind, size, at))
            continue
        attributes = {**common, **special}
        special = {}
        yield from _member(stream, kind, attributes, name, size, at)
    _finish(stream)


def _member(
    stream: _Stream, kind: bytes, attributes: dict[str, str], name: str, size: int, at: int
) -> Iterator[Member]:
    name = attributes.get("path", name)
    where = f"{stream.path} at byte {at}: member {name!r}"
    if kind in _REFUSED:
        raise ValueError(f"{where} is {_REFUSED[kind]}, which a data set must not hold")
    if any(key.startswith("GNU.sparse") for key in attributes) or kind not in (*_REGULAR, _DIRECTORY):
        raise ValueError(f"{where} is of a type (sparse or {kind!r}) that is not read here")
    if "size" in attributes:
        if not attributes["size"].isascii() or not attributes["size"].isdigit():
            raise ValueError(f"{where} has the size {attributes['size']!r}")
        size = int(attributes["size"])
    if kind == _DIRECTORY:
        _check_name(name, where)
        size = 0
    offset, crc32, first = stream.at, 0, b""
    for chunk in stream.contents(size, name):
        first = first or chunk[:64]
        crc32 = zlib.crc32(chunk, crc32)
    if kind != _DIRECTORY:
        yield Member(name, offset, size, crc32, first)


def _parse_header(header: bytes, path: str, at: int) -> tuple[bytes, str, int]:
    """(type, name, size) of a header block whose checksum holds (POSIX.1-1988 ustar)."""
    if not _checksum_holds(header):
        raise ValueError(f"{path}: not a tar header at byte {at} (its checksum differs): damaged or cut short")
    size = _number(header[124:136])
    if size is None or size < 0:
        raise ValueError(f"{path}: the header at byte {at} has no valid size")
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    full = prefix + b"/" + name if prefix else name
    return header[156:157], full.decode("utf-8", "surrogateescape"), size


def _checksum_holds(header: bytes) -> bool:
    stored = _number(header[148:156])
    unsigned = sum(header) - sum(header[148:156]) + 8 * 32  # the field itself counts as blanks
    if stored == unsigned:
        return True
    # Some old programs added the bytes as signed numbers.
    return stored == unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def _number(data: bytes) -> int | None:
    """A number in a header: octal digits, or GNU's base 256; None if it is neither."""
    if data[0] in (0x80, 0xFF):
        return int.from_bytes(data[1:], "big") - (256 ** (len(data) - 1) if data[0] == 0xFF else 0)
    try:
        return int(data.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return None


def _extension(stream: _Stream, kind: bytes, size: int, at: int) -> dict[str, str]:
    """What a GNU long-name or PAX header says of the next member (POSIX.1-2001)."""
    if size > _MAX_EXTENSION:
        raise ValueError(f"{stream.path}: the extension header at byte {at} claims {size} bytes")
    data = b"".join(stream.contents(size, "an extension header"))
    if kind in (b"L", b"K"):
        text = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        return {"path" if kind == b"L" else "linkpath": text}
    found = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = data[len(digits) + 1 : length]
        if length <= len(digits) + 1 or length > len(data) or not record.endswith(b"\n") or b"=" not in record:
            raise ValueError(f"{stream.path}: the PAX header at byte {at} is malformed")
        key, _, value = record[:-1].partition(b"=")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return found


def _finish(stream: _Stream) -> None:
    """After the first zero block: another one, then nothing but zeros, in whole blocks."""
    at = stream.at - _BLOCK
    zeros = _BLOCK
    for data in stream.rest():
        if data.count(0) != len(data):
            raise ValueError(f"{stream.path}: there is data behind the end mark at byte {at}; are these tars joined?")
        zeros += len(data)
    if zeros < 2 * _BLOCK or zeros % _BLOCK:
        raise ValueError(f"{stream.path}: cut short at byte {stream.at}, inside the end mark at byte {at}")
