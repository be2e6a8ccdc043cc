"""Bytes at a URL, front to back, in spite of connections that break.

In: an `http(s)://`, `s3://` or `gs://` URL or, where that is allowed, a `pipe:` command.  Out: a file to be read once.
A connection that breaks is taken up again at the byte where it broke. Nothing is run but a pipe that is allowed.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from webdataset.gopen import gopen

_TRIES = 5  # in a row without a new byte
_PAUSE = 0.5  # seconds before the second of them; doubled before each further one
_SILENCE = 60.0  # seconds without a byte after which a connection counts as broken
_FINAL = (400, 401, 403, 405, 410)  # answers that asking again does not change; a 404 may be an upload's last moment
_CHUNK = 1 << 20


def is_url(name: str) -> bool:
    """Whether a shard's name is a URL (or a pipe) and not a path."""
    return "://" in name or name.startswith("pipe:")


def shown(url: str) -> str:
    """The URL for messages: without a query or password, which may be secrets."""
    if url.startswith("pipe:"):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check_url(url: str, allow_pipe: bool) -> None:
    """Raises ValueError for what would not be opened."""
    scheme = url.split(":", 1)[0]
    if scheme == "pipe" and not allow_pipe:
        raise ValueError(f"{url}: a pipe: runs a command; allow_pipe=true allows it")
    if scheme != "pipe" and scheme not in _OPENERS:
        raise ValueError(f"{shown(url)}: shards are read from {', '.join(f'{s}://' for s in _OPENERS)}")


def open_tar(place: Path | str, allow_pipe: bool = False) -> "BinaryIO | RemoteFile":
    """A tar to be read once, front to back: a file, or a URL's bytes. Raises FileNotFoundError or ValueError."""
    if isinstance(place, str) and is_url(place):
        return RemoteFile(place, allow_pipe)
    if not Path(place).is_file():
        raise FileNotFoundError(f"{place}: there is no such tar")
    return open(place, "rb")


@dataclass
class _Connection:
    stream: Any
    start: int  # the byte that comes first
    size: int | None  # of the whole, where it is known
    version: str = ""  # says when the contents are no longer the same


class RemoteFile:
    """What lies at a URL, as a file to be read once. A context manager."""

    def __init__(self, url: str, allow_pipe: bool = False):
        check_url(url, allow_pipe)
        self.name = shown(url)
        self.at = 0
        self._url = url
        self._connection: _Connection | None = None
        self._first: _Connection | None = None  # what the first connection said of size and version
        self._failures = 0
        self._ended = False

    def __enter__(self) -> "RemoteFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hang_up()

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end. Raises OSError, naming the URL, when they cannot be had."""
        found = self._some(size)
        while len(found) < size and (more := self._some(size - len(found))):
            found += more
        return found

    def _some(self, size: int) -> bytes:
        while True:
            try:
                data = self._next(size)
            except Exception as error:  # the clouds' clients raise what they like
                self._hang_up()
                if isinstance(error, HTTPError):
                    error.close()
                self._pause_or_raise(error)
                continue
            if data:
                self._failures = 0
            self.at += len(data)
            return data

    def _next(self, size: int) -> bytes:
        if self._ended:
            return b""
        connection = self._connection or self._connect()
        if connection.size is not None and (size := min(size, connection.size - self.at)) <= 0:
            return b""
        # read1: what arrives before a break is kept.
        data = getattr(connection.stream, "read1", connection.stream.read)(size)
        if not data and connection.size is not None:
            raise ConnectionError("the connection was cut")
        if not data:
            connection.stream.close()  # here a pipe says how its command ended
            self._ended = True
        return data

    def _connect(self) -> _Connection:
        opener = _open_pipe if self._url.startswith("pipe:") else _OPENERS[self._url.split(":", 1)[0]]
        found = self._connection = opener(self._url, self.at)
        first = self._first = self._first or found
        if (found.size, found.version) != (first.size, first.version):
            raise _Changed(f"changed while it was read: {first.size} bytes, then {found.size}, or other contents")
        while found.start < self.at:  # from the beginning again: a server without ranges, or a pipe
            passed = found.stream.read(min(_CHUNK, self.at - found.start))
            if not passed:
                raise ConnectionError("the connection was cut")
            found.start += len(passed)
        return found

    def _hang_up(self) -> None:
        with contextlib.suppress(Exception):
            if self._connection is not None:
                self._connection.stream.close()
        self._connection = None

    def _pause_or_raise(self, error: Exception) -> None:
        self._failures += 1
        final = isinstance(error, (_Changed, ImportError)) or getattr(error, "code", 0) in _FINAL
        if final or self._failures >= _TRIES:
            of = f" of {self._first.size}" if self._first and self._first.size is not None else ""
            reason = error.reason if isinstance(error, URLError) and not isinstance(error, HTTPError) else error
            after = f"after {self.at}{of} bytes, attempt {self._failures}"
            raise OSError(f"{self.name}: {reason or type(error).__name__} ({after})") from None
        time.sleep(_PAUSE * 2 ** (self._failures - 1))


class _Changed(Exception):
    """The same URL, other contents."""


def _open_http(url: str, at: int) -> _Connection:
    headers = {"User-Agent": "vqscale"} | ({"Range": f"bytes={at}-"} if at else {})
    response: HTTPResponse = urlopen(Request(url, headers=headers), timeout=_SILENCE)
    version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    if response.status == 206:
        span, _, size = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        return _Connection(response, int(span.partition("-")[0]), int(size) if size.isdigit() else None, version)
    length = response.headers.get("Content-Length", "")
    return _Connection(response, 0, int(length) if length.isdigit() else None, version)


def _open_cloud(url: str, at: int) -> _Connection:
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{error}; `pip install 'vqscale[cloud]'` has what it takes") from None
    file = system.open(path, "rb", block_size=8 * _CHUNK, cache_type="readahead")
    file.seek(at)
    return _Connection(file, at, file.size, str(getattr(file, "details", {}).get("ETag", "")))


def _open_pipe(url: str, _at: int) -> _Connection:
    return _Connection(gopen(url, "rb"), 0, None)


_OPENERS: dict[str, Callable[[str, int], _Connection]] = {
    "http": _open_http,
    "https": _open_http,
    "s3": _open_cloud,
    "gs": _open_cloud,
}
