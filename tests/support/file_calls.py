"""Counts what a program asks of a file system.

In: a block of code and the folders that matter.  Out: the calls by kind, the bytes read and written, the seconds.
Forked children, such as a loader's workers, are counted too. Files that native code opens are not seen, but those of
safetensors' `safe_open` are counted. What Python reads from an open file counts in bytes, not in calls.
"""

import contextlib
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors

KINDS = ("open", "stat", "list", "read", "change")
_EVENTS = {
    "open": "open",
    **dict.fromkeys(("os.listdir", "os.scandir"), "list"),
    **dict.fromkeys(
        ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"), "change"
    ),
    **dict.fromkeys(("os.chmod", "os.utime"), "change"),
}
_active: "list[FileCalls]" = []
_hooked: list[bool] = []


@dataclass
class FileCalls:
    """What was counted; `of(kind)` for one kind, `total` for all, under `folders` (all folders if there are none)."""

    folders: tuple[str, ...] = ()
    seconds: float = 0.0
    bytes_read: int = 0  # by this process, from any file
    bytes_written: int = 0
    _counts: Any = field(default_factory=lambda: multiprocessing.Array("Q", len(KINDS)))

    def of(self, kind: str) -> int:
        """Calls of a kind."""
        return int(self._counts[KINDS.index(kind)])

    @property
    def total(self) -> int:
        """Calls of every kind."""
        return sum(self._counts)

    def by_kind(self) -> dict[str, int]:
        """Calls of each kind that occurred."""
        return {kind: count for kind in KINDS if (count := self.of(kind))}

    def add(self, kind: str, path: Any) -> None:
        """Count one call; `path` is None where it is not known."""
        if path is None or self._matters(path):
            with self._counts.get_lock():
                self._counts[KINDS.index(kind)] += 1

    def _matters(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False  # a descriptor: its path was counted when it was opened
        full = os.path.abspath(os.fsdecode(path))
        return not self.folders or any(full == folder or full.startswith(f"{folder}/") for folder in self.folders)


@contextlib.contextmanager
def counted(*folders: str | Path) -> Iterator[FileCalls]:
    """Counts the calls of the block; blocks may be nested."""
    if not _hooked:
        sys.addaudithook(_hear)  # for good: a hook cannot be removed
        _hooked.append(True)
    calls = FileCalls(tuple(os.path.abspath(folder) for folder in folders))
    before, began = _bytes(), time.perf_counter()
    with pytest.MonkeyPatch.context() as patch:
        for holder, name, kind in _functions():
            patch.setattr(holder, name, _counting(getattr(holder, name), kind, calls))
        _active.append(calls)
        try:
            yield calls
        finally:
            _active.remove(calls)
    calls.seconds = time.perf_counter() - began
    calls.bytes_read, calls.bytes_written = (now - then for now, then in zip(_bytes(), before, strict=True))


def _functions() -> Iterator[tuple[Any, str, str]]:
    """(holder, name, kind) of the functions that raise no audit event."""
    yield from ((os, name, "stat") for name in ("stat", "lstat", "access", "readlink", "statvfs"))
    if accessor := getattr(pathlib, "_normal_accessor", None):  # Python 3.10: its paths keep an `os.stat`
        yield accessor, "stat", "stat"
    yield os, "pread", "read"
    safe_open = safetensors.safe_open  # which is replaced while this goes on
    for module in list(sys.modules.values()):
        if vars(module).get("safe_open") is safe_open:
            yield module, "safe_open", "open"


def _counting(function: Callable[..., Any], kind: str, calls: FileCalls) -> Callable[..., Any]:
    def counting(*arguments: Any, **options: Any) -> Any:
        calls.add(kind, None if kind == "read" else arguments[0])
        return function(*arguments, **options)

    return counting


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _active and (kind := _EVENTS.get(event)):
        for calls in _active:
            calls.add(kind, arguments[0])


def _bytes() -> tuple[int, int]:
    """(read, written) so far by this process."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])
