"""Signs of progress for the watchdog, of this process and of those that are forked from it.

In: a call of `advance` for every image, block of bytes or step.  Out: a count that rises while work is done.
"""

import contextlib
import ctypes
import multiprocessing
from typing import Any

_count: Any = ctypes.c_uint64(0)


def advance() -> None:
    """A piece of work was done. Cheap; two processes at once may count once."""
    _count.value += 1


def total() -> int:
    return int(_count.value)


def share() -> None:
    """From here on, processes that are forked, or that take `counter()`, count together with this one."""
    global _count
    with contextlib.suppress(OSError):  # no room for it: then only this process counts
        _count = multiprocessing.RawValue(ctypes.c_uint64, _count.value)


def counter() -> Any:
    """What a child process that is not forked is given when it starts, for its `count_in`."""
    return _count


def count_in(counter: Any) -> None:
    """From here on, this process adds to its parent's counter."""
    global _count
    _count = counter
