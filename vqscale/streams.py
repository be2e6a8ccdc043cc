"""Standard output and error that cannot end the program: what cannot be written is lost, and nothing else.

In: the process's streams, which may be closed, a pipe whose reader is gone or asleep, or a full disk.  Out:
`sys.stdout` and `sys.stderr` that raise no error.
"""

import atexit
import contextlib
import os
import select
import sys
from typing import Any

_PATIENCE = 1.0  # seconds that a run waits for the reader of its output


class Stream:
    """A text stream whose writes never raise. What it cannot show in its encoding is escaped."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._impatient = False
        self._stalled = False
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream was closed
            if not self._impatient or self._has_room():
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if not self._impatient or self._has_room():
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def lose_rather_than_wait(self) -> None:
        """From here on a reader that sleeps, such as a pager, costs lines and not time."""
        self._impatient = True

    def finish(self) -> None:
        """Write what is buffered, if that is possible now, so that Python's own last flush cannot fail."""
        try:
            if self._impatient and not self._has_room():
                raise BlockingIOError
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def _has_room(self) -> bool:
        """Whether a write would not block; once it would have, only a look is taken."""
        ready = select.select([], [self._stream.fileno()], [], 0.0 if self._stalled else _PATIENCE)[1]
        self._stalled = not ready
        return not self._stalled


def install() -> None:
    """Replace the process's standard streams; those that are closed become `os.devnull`."""
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would take the number, and what is printed
            os.open(os.devnull, mode)  # takes the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, Stream(open(os.devnull, "w") if stream is None else stream))  # noqa: SIM115 - to the end
    atexit.register(_finish)


def lose_rather_than_wait() -> None:
    """For a run: see `Stream.lose_rather_than_wait`. Streams that are no `Stream` are left alone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Stream):
            stream.lose_rather_than_wait()


def _finish() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Stream):
            stream.finish()
