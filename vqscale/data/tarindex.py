"""Tars that others wrote -> an index, or a refusal that names member and offset.

In: any ordinary WebDataset tar (ustar, PAX, GNU long names).  Out: its `ShardInfo` and its index rows. Each byte is
read once: header checksums, contents (crc32 per part) and the sha256 of the whole. Members are grouped and named as
webdataset does it. Nothing is extracted, decoded or run.
"""

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vqscale.data.images import SUFFIXES
from vqscale.data.remote import open_tar
from vqscale.data.shards import MAX_CLASSES, MAX_LABEL_BYTES, HashedFile, IndexRows, ShardInfo, check_key, parse_label

_BLOCK = 512
_ZERO = bytes(_BLOCK)
_MAX_EXTENSION = 1 << 20  # bytes of a PAX or long-name header
_MAX_PADDING = 64 << 20  # zeros after the end mark
_MAX_PARTS = 256  # different part names in one tar
_CHUNK = 1 << 20
_REGULAR = (b"0", b"\0", b"7")
_DIRECTORY = b"5"
_VOLUME_LABEL = b"V"
_EXTENSIONS = (b"x", b"X", b"g", b"L", b"K")
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_OTHER_FORMATS = {
    b"\x1f\x8b": "compressed with gzip, not a plain tar: unpack it with gunzip",
    b"\x1f\x9d": "compressed with compress, not a plain tar: unpack it with uncompress",
    b"BZh": "compressed with bzip2, not a plain tar: unpack it with bunzip2",
    b"\xfd7zXZ\0": "compressed with xz, not a plain tar: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd, not a plain tar: unpack it with unzstd",
    b"\x04\x22\x4d\x18": "compressed with lz4, not a plain tar: unpack it with unlz4",
    b"PK": "compressed into a zip archive, not a tar: unzip it and pack the files as a tar",
    b"7z\xbc\xaf\x27\x1c": "compressed into a 7-Zip archive, not a tar: unpack it and pack the files as a tar",
    b"Rar!": "compressed into a RAR archive, not a tar: unpack it and pack the files as a tar",
    b"version https://git-lfs": "a Git LFS pointer, not the tar itself: fetch it with `git lfs pull`",
    b"<": "a web page, not a tar: the download went wrong",
}
# As in webdataset: the part's name begins at the first dot of the last path component.
_SPLIT = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_CLUTTER = ("Thumbs.db", "desktop.ini")
_FIRST_DOT = "a part's name begins at the first dot of the file name"


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its contents are at [offset, offset + size)."""

    name: str
    offset: int
    size: int
    crc32: int
    start: bytes  # the first bytes, enough for a label


class _Stream(HashedFile):
    """A tar that is read once, from front to back."""

    def take(self, size: int, what: str) -> bytes:
        """The next bytes. Raises ValueError when the tar ends before them."""
        data = self.read(size)
        if len(data) < size:
            raise ValueError(f"{self.name}: cut short at byte {self.tell()}, inside {what}")
        return data

    def contents(self, size: int, name: str) -> Iterator[bytes]:
        """A member's contents in chunks; its padding is skipped."""
        what = f"member {name!r}"
        for done in range(0, size, _CHUNK):
            yield self.take(min(_CHUNK, size - done), what)
        self.take(-size % _BLOCK, what)

    def header(self) -> bytes:
        """The next header block, or zeros at the end mark. Raises ValueError for a file that is no tar at all."""
        at, header = self.tell(), self.read(_BLOCK)
        if not at and (len(header) < _BLOCK or (header != _ZERO and not _checksum_holds(header))):
            for prefix, what in _OTHER_FORMATS.items():
                if header.startswith(prefix):
                    raise ValueError(f"{self.name}: {what}")
        if not self.tell():
            raise ValueError(f"{self.name}: empty, 0 bytes")
        if len(header) < _BLOCK:
            raise ValueError(f"{self.name}: cut short at byte {self.tell()}, inside a header; its end mark is missing")
        return header


def index_tar(
    tar: str | Path, num_classes: int = MAX_CLASSES, labels: str = "cls", allow_pipe: bool = False
) -> tuple[ShardInfo, IndexRows]:
    """Index a WebDataset tar, a file or what is at a URL.

    num_classes: labels must be below it. labels: `cls` = from each sample's .cls part; `none` = all 0.
    Raises FileNotFoundError, OSError for a URL that cannot be read to its end, or ValueError naming tar, member or key
    and offset: cut short anywhere, damaged header, link, device, key that leads out of the folder, duplicate key or
    part, label missing or not in [0, num_classes), no sample with a picture.
    """
    with open_tar(tar, allow_pipe) as file:
        stream = _Stream(file)
        rows = _rows(stream, num_classes, labels)
    return ShardInfo(str(tar), len(rows.keys), stream.tell(), stream.sha256.hexdigest()), rows


def _rows(stream: _Stream, num_classes: int, labels: str) -> IndexRows:
    """One row for each run of members of one key. Raises ValueError as `index_tar` says."""
    rows, keys, part_names = IndexRows(), set[str](), Counter[str]()
    for key, group in itertools.groupby(_parts(stream), key=lambda part: part[0]):
        parts = _sample(group, stream.name, keys, part_names)
        label = 0 if labels == "none" else _label(parts, f"{stream.name}: key {key!r}", num_classes)
        rows.add(key, label, {name: (m.offset, m.size, m.crc32) for name, m in parts.items()})
        keys.add(key)
    if not rows.keys:
        raise ValueError(f"{stream.name}: there are no samples in it")
    if part_names.keys().isdisjoint(SUFFIXES):
        raise ValueError(
            f"{stream.name}: none of its {len(rows.keys)} samples has a picture ({', '.join(SUFFIXES)}); their parts "
            f"are {_listed(name for name, _ in part_names.most_common())}, and {_FIRST_DOT}"
        )
    return rows


def _parts(stream: _Stream) -> Iterator[tuple[str, str, Member]]:
    """(key, part's name, member); left out is what belongs to no sample: a README, webdataset's own notes."""
    for member in members(stream):
        where = f"{stream.name} at byte {member.offset}"
        _check_name(member.name, where)
        split = _SPLIT.match(member.name)
        if split is None or _META.match(member.name) or _is_clutter(member.name):
            continue
        check_key(split[1], where)
        yield split[1], split[2].lower(), member


def _sample(
    group: Iterable[tuple[str, str, Member]], path: str, earlier_keys: set[str], part_names: Counter[str]
) -> dict[str, Member]:
    """The parts of one sample by name; they are counted in `part_names`."""
    parts: dict[str, Member] = {}
    for key, name, member in group:
        where = f"{path} at byte {member.offset}"
        if key in earlier_keys:
            raise ValueError(
                f"{where}: key {key!r} comes a second time; keys must be unique, and a sample's parts adjacent "
                "(tar --sort=name)"
            )
        if name in parts:
            raise ValueError(f"{where}: key {key!r} has two parts {name!r}")
        parts[name] = member
        part_names[name] += 1
        if len(part_names) > _MAX_PARTS:
            raise ValueError(
                f"{where}: more than {_MAX_PARTS} different part names; are there dots in the keys? {_FIRST_DOT}"
            )
    return parts


def _label(parts: Mapping[str, Member], where: str, num_classes: int) -> int:
    if "cls" not in parts:
        raise ValueError(
            f"{where} has no label: its parts are {_listed(parts)}, and .cls is not among them ({_FIRST_DOT}); "
            "labels=none reads all samples as one class"
        )
    return parse_label(parts["cls"].start, where, num_classes)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"{name!r}" for name in itertools.islice(names, 8))


def _is_clutter(name: str) -> bool:
    """Whether the file comes from an operating system: hidden, a Mac's resource fork, a folder's thumbnails."""
    components = name.split("/")
    return components[-1].startswith(".") or components[-1] in _CLUTTER or "__MACOSX" in components


def _check_name(name: str, where: str) -> None:
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{where}: member {name!r} leads out of the data set")


def members(stream: _Stream) -> Iterator[Member]:
    """The regular files of a tar, with its extension headers applied. Raises ValueError as `index_tar` says."""
    common: dict[str, str] = {}
    special: dict[str, str] = {}
    while (header := stream.header()) != _ZERO:
        at = stream.tell() - _BLOCK
        kind, name, size = _parse_header(header, stream.name, at)
        if kind in _EXTENSIONS:
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
    where = f"{stream.name} at byte {at}: member {name!r}"
    if kind in _REFUSED:
        raise ValueError(f"{where} is {_REFUSED[kind]}; a data set may have regular files only")
    if any(key.startswith("GNU.sparse") for key in attributes):
        raise ValueError(f"{where} is a sparse file; a data set may have regular files only (no tar --sparse)")
    if kind not in (*_REGULAR, _DIRECTORY, _VOLUME_LABEL):
        raise ValueError(f"{where} is of the unknown type {kind!r}; a data set may have regular files only")
    if "size" in attributes:
        if not attributes["size"].isascii() or not attributes["size"].isdigit():
            raise ValueError(f"{where} has the size {attributes['size']!r}")
        size = int(attributes["size"])
    if kind == _DIRECTORY:
        _check_name(name, where)
        size = 0
    offset, crc32, start = stream.tell(), 0, b""
    for chunk in stream.contents(size, name):
        start = start or chunk[: MAX_LABEL_BYTES + 1]
        crc32 = zlib.crc32(chunk, crc32)
    if kind in _REGULAR:
        yield Member(name, offset, size, crc32, start)


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
    """The attributes that a GNU long-name or PAX header gives to the next member (POSIX.1-2001)."""
    if size > _MAX_EXTENSION:
        raise ValueError(f"{stream.name}: the extension header at byte {at} claims {size} bytes")
    data = b"".join(stream.contents(size, "an extension header"))
    if kind in (b"L", b"K"):
        text = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        return {"path" if kind == b"L" else "linkpath": text}
    attributes = {}
    while data.strip(b"\0"):
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        record = data[len(digits) + 1 : length]
        if length <= len(digits) + 1 or length > len(data) or not record.endswith(b"\n") or b"=" not in record:
            raise ValueError(f"{stream.name}: the PAX header at byte {at} is malformed")
        key, _, value = record[:-1].partition(b"=")
        attributes[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return attributes


def _finish(stream: _Stream) -> None:
    """After the first zero block: another one, then nothing but zeros, in whole blocks."""
    at = stream.tell() - _BLOCK
    zeros = _BLOCK
    while data := stream.read(_CHUNK):
        if data.count(0) != len(data):
            raise ValueError(f"{stream.name}: there is data after the end mark at byte {at}; are these tars joined?")
        zeros += len(data)
        if zeros > _MAX_PADDING:
            raise ValueError(f"{stream.name}: zeros without end after the end mark at byte {at}")
    if zeros < 2 * _BLOCK or zeros % _BLOCK:
        raise ValueError(f"{stream.name}: cut short at byte {stream.tell()}, inside the end mark at byte {at}")
