"""Crash-safe files: the one owner of atomic writes, JSON, JSON lines and checksums of files.

In: paths, bytes, plain values.  Out: files of which a reader, or a crash, sees the
old version or the new one, never a part.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

SEAL = "checksum"
_FULL_FSYNC = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: its fsync leaves data in the drive's cache


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, which takes the place of `path` when the block ends well, durably, and
    vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # should it be a link
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some file systems cannot
        fsync(path.parent)


def prepare_folder(path: Path) -> None:
    """Make a folder, or remove from it the temporary files of processes that were killed."""
    path.mkdir(exist_ok=True)
    for temporary in path.glob(".*.tmp"):
        temporary.unlink()


def open_to_append(path: Path) -> TextIO:
    """A text file to add lines to. Raises OSError for a link, ValueError for a pipe or a device."""
    return open(path, "a", encoding="utf-8", errors="backslashreplace", opener=open_own)


def open_own(name: str | Path, flags: int) -> int:
    """A descriptor of a file that the program writes. Raises OSError for a link, ValueError for a pipe or a device."""
    return _open_regular(name, flags | os.O_NOFOLLOW)


def _open_regular(name: str | Path, flags: int) -> int:
    """Not of a pipe or a device, which may have no end."""
    descriptor = os.open(name, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{name} is not a regular file")
    return descriptor


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace a file's content; text is written as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file. Raises ValueError for NaN and infinity, which are no JSON."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or {} where there is none that can be read."""
    try:
        with open(path, "rb", opener=_open_regular) as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with a checksum of all its other entries, for files that no other checksum covers."""
    return {**value, SEAL: _checksum(value)}


def check_seal(path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """The object of a file without its seal. Raises ValueError where the seal is broken; older files have none."""
    rest = {key: entry for key, entry in value.items() if key != SEAL}
    if SEAL in value and value[SEAL] != _checksum(rest):
        raise ValueError(f"{path}: was damaged, or was edited: its {SEAL} is {_checksum(rest)}, not {value[SEAL]}")
    if SEAL not in value and (name := _misnamed_seal(value)):
        raise ValueError(f"{path}: was damaged: its {SEAL} stands under {name!r}")
    return rest


def _misnamed_seal(value: Mapping[str, Any]) -> str:
    for name, entry in value.items():
        if isinstance(entry, str) and entry.startswith("sha256:"):
            if entry == _checksum({key: other for key, other in value.items() if key != name}):
                return name
    return ""


def _checksum(value: Mapping[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_jsonl(path: Path, last_bytes: int = 0) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, or of its last bytes. Torn lines are skipped; a missing file has none."""
    try:
        with open(path, "rb", opener=_open_regular) as file:
            if last_bytes:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            lines = file.read().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value


def sha256_of(path: Path) -> str:
    """The hexadecimal sha256 of a file, read in blocks."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Make a file's content, or the renames inside a folder, durable. Raises OSError where that fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if _FULL_FSYNC is not None:
            with contextlib.suppress(OSError):  # network file systems cannot
                fcntl.fcntl(descriptor, _FULL_FSYNC)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
