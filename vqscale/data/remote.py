"""Bytes at a URL, front to back, in spite of connections that break.

In: an `http(s)://`, `s3://` or `gs://` URL or, where that is allowed, a `pipe:` command.  Out: a file to be read once.
A broken connection is resumed at the byte where it broke; a server that sends too slowly, without end, or other bytes
than it was asked for is given up. No command runs but a pipe that is allowed, and messages show no secrets.
"""

import base64
import contextlib
import io
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote_to_bytes, urlsplit, urlunsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from webdataset.gopen import gopen

from vqscale.data.processes import made_progress
from vqscale.text import printable, redact_url

_TRIES = 5  # in a row without a new byte
_SLOW_TRIES = 2  # in a row that were too slow
_PAUSE = 0.5  # seconds before the second try; doubled before each further one
_LONGEST_PAUSE = 120.0  # seconds that a server may ask for with Retry-After
READ_TIMEOUT = 60.0  # seconds without a byte after which a connection counts as broken
_LEAST_RATE = 1000  # bytes per second of waiting, over READ_TIMEOUT, below which it does too
_MOST_BYTES = 200 * 10**9  # in one tar
_RETRIED = (404, 408, 423, 425, 429)  # of the 4xx; a 404 may be the last moment of an upload
_CHUNK = 1 << 20
_clock, _sleep = time.monotonic, time.sleep


def is_url(name: str) -> bool:
    """Whether a shard's name is a URL (or a pipe) and not a path."""
    return "://" in name or name.startswith("pipe:")


def check_url(url: str, allow_pipe: bool) -> None:
    """Raises ValueError for a URL that would not be opened."""
    scheme = _scheme(url)
    if scheme == "pipe" and not allow_pipe:
        raise ValueError(f"{redact_url(url)}: a pipe: runs a command; allow_pipe=true allows it")
    if scheme != "pipe" and scheme not in _OPENERS:
        raise ValueError(f"{redact_url(url)}: shards are read from {', '.join(f'{s}://' for s in _OPENERS)}")
    if scheme.startswith("http"):
        _request(url)


def open_tar(tar: Path | str, allow_pipe: bool = False) -> "BinaryIO | RemoteFile":
    """A tar to be read once, front to back: a file, or a URL's bytes. Raises FileNotFoundError or ValueError."""
    if isinstance(tar, str) and is_url(tar):
        return RemoteFile(tar, allow_pipe)
    if not Path(tar).is_file():
        raise FileNotFoundError(f"{tar}: there is no such tar")
    return open(tar, "rb")


@dataclass
class _Stream:
    """The bytes of one connection. size: of the whole, where it is known; version: differs when the contents do."""

    file: Any
    start: int
    size: int | None
    version: str | None = None


class RemoteFile:
    """The contents of a URL, as a file to be read once. A context manager.

    compare_versions: whether another ETag after a break is an error; without it the reader must know a checksum.
    """

    def __init__(self, url: str, allow_pipe: bool = False, compare_versions: bool = True):
        check_url(url, allow_pipe)
        self.name = redact_url(url)
        self.at = 0
        self._url = url
        self._compare_versions = compare_versions
        self._stream: _Stream | None = None
        self._first: _Stream | None = None  # what the first connection said of size and version
        self._failures = 0
        self._slow = 0
        self._ended = False

    def __enter__(self) -> "RemoteFile":
        return self

    def __exit__(self, *_error: Any) -> None:
        self._disconnect()

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end. Raises OSError naming the URL when it does not give them."""
        data = self._some(size)
        while len(data) < size and (more := self._some(size - len(data))):
            data += more
        return data

    def _some(self, size: int) -> bytes:
        while True:
            try:
                data = self._next(size)
            except Exception as error:  # the clouds' clients raise what they like
                self._disconnect()
                self._pause_or_raise(error)
                continue
            if data:
                self._failures = 0
                made_progress()
            self.at += len(data)
            return data

    def _next(self, size: int) -> bytes:
        if self._ended:
            return b""
        if self.at >= _MOST_BYTES:
            raise _Final(f"more than {_MOST_BYTES:,} bytes, which is no shard")
        stream = self._stream or self._connect()
        if stream.size is not None and (size := min(size, stream.size - self.at)) <= 0:
            return b""
        # read1: what arrives before a break is kept.
        data = getattr(stream.file, "read1", stream.file.read)(size)
        if not data and stream.size is not None:
            raise ConnectionError("the connection was cut")
        if not data:
            stream.file.close()  # here a pipe says how its command ended
            self._ended = True
        return data

    def _connect(self) -> _Stream:
        opener = _open_pipe if self._url.startswith("pipe:") else _OPENERS[_scheme(self._url)]
        stream = self._stream = opener(self._url, self.at)
        first = self._first = self._first or stream
        if _differ(stream.size, first.size):
            raise _Final(f"changed while it was read: {first.size} bytes, then {stream.size}")
        stream.size = first.size if stream.size is None else stream.size
        if self._compare_versions and _differ(stream.version, first.version):
            raise _Final("changed while it was read: other contents of the same size")
        while stream.start < self.at:  # from the beginning again: a server without ranges, or a pipe
            passed = stream.file.read(min(_CHUNK, self.at - stream.start))
            if not passed:
                raise ConnectionError("the connection was cut")
            stream.start += len(passed)
        return stream

    def _disconnect(self) -> None:
        with contextlib.suppress(Exception):
            if self._stream is not None:
                self._stream.file.close()
        self._stream = None

    def _pause_or_raise(self, error: Exception) -> None:
        self._failures += 1
        self._slow = self._slow + 1 if isinstance(error, _TooSlow) else 0
        pause = _PAUSE * 2 ** (self._failures - 1)
        code = 0
        if isinstance(error, HTTPError):
            code, pause = error.code, max(pause, _retry_after(error))
            error.close()
        final = isinstance(error, (_Final, ImportError)) or (300 <= code < 500 and code not in _RETRIED)
        if final or self._failures >= _TRIES or self._slow >= _SLOW_TRIES:
            of = f" of {self._first.size}" if self._first and self._first.size is not None else ""
            reason = error.reason if isinstance(error, URLError) and not code else error
            line = (str(reason) or type(error).__name__).strip().splitlines()[0]
            after = f"after {self.at}{of} bytes, attempt {self._failures}"
            raise OSError(f"{self.name}: {printable(redact_url(line))} ({after})") from None
        _sleep(pause)


class _Final(Exception):
    """Trying again would not help."""


class _TooSlow(ConnectionError):
    """Bytes arrive, but too few of them."""


def _differ(now: Any, before: Any) -> bool:
    return None not in (now, before) and now != before


def _scheme(url: str) -> str:
    return url.split(":", 1)[0].lower()


# --- http -------------------------------------------------------------------------------------------------------------


def _open_http(url: str, at: int) -> _Stream:
    try:
        response = _OPENER.open(_request(url, at), timeout=READ_TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{at}":  # all of it had arrived
            return _Stream(io.BytesIO(), at, at)
        raise
    try:
        return _stream_of(response, at)
    except Exception:
        response.close()
        raise


def _stream_of(response: HTTPResponse, at: int) -> _Stream:
    """The answer to a request for the bytes from `at`. Raises ConnectionError when it is none."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise _Final(f"comes compressed on the way (Content-Encoding: {encoding}), which was not asked for")
    version = response.headers.get("ETag", "").removeprefix("W/") or response.headers.get("Last-Modified")
    if response.status != 206:
        return _Stream(response, 0, response.length, version)
    span = response.headers.get("Content-Range", "")
    bounds = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", span)
    if bounds is None or int(bounds[1]) > at:
        raise ConnectionError(f"asked for the bytes from {at}, got {span or 'no Content-Range'}")
    return _Stream(response, int(bounds[1]), None if bounds[2] == "*" else int(bounds[2]), version)


def _request(url: str, at: int = 0) -> Request:
    """Blanks and other characters encoded, user and password in a header. Raises ValueError for what is no URL."""
    try:
        parts = urlsplit(url)
        path, query = (quote(part, safe="%/:;=@&+$,!'()*~?[]") for part in (parts.path, parts.query))
        known = bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", parts.netloc)
    except ValueError:  # of a port or a character
        known = False
    if not known:
        raise ValueError(f"{redact_url(url)}: not a URL; %-encode special characters of its user and password")
    user, _, host = parts.netloc.rpartition("@")
    headers = {"User-Agent": "vqscale"} | ({"Range": f"bytes={at}-"} if at else {})
    if user:
        pair = unquote_to_bytes(user if ":" in user else f"{user}:")
        headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
    return Request(urlunsplit((parts.scheme, host, path, query, "")), headers=headers)


def _retry_after(error: HTTPError) -> float:
    """Seconds for which a server asks to be left alone, within bounds."""
    value = error.headers.get("Retry-After", "")
    if value.isdigit():
        return min(float(value), _LONGEST_PAUSE)
    with contextlib.suppress(ValueError, TypeError):
        return min(parsedate_to_datetime(value).timestamp() - time.time(), _LONGEST_PAUSE)
    return 0.0


class _Redirects(HTTPRedirectHandler):
    """To http(s) only; a password stays with its host."""

    http_error_308 = HTTPRedirectHandler.http_error_302

    def redirect_request(
        self, request: Request, answer: Any, code: int, message: str, headers: Any, url: str
    ) -> Request:
        answer.close()  # whatever it holds is not read
        if _scheme(url) not in ("http", "https"):
            raise _Final(f"leads to {redact_url(url)}, which is neither http nor https")
        following = _request(url)
        same = following.host == request.host and following.type in (request.type, "https")
        kept = {"Range", "Authorization"} if same else {"Range"}
        following.headers = {key: request.headers[key] for key in kept & request.headers.keys()} | dict(
            following.headers
        )
        return following


class _Pace(io.RawIOBase):
    """What a socket receives. Raises _TooSlow when the seconds spent in waiting brought too little."""

    def __init__(self, raw: io.RawIOBase):
        self._raw, self._seconds, self._bytes = raw, 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        before = _clock()
        count = self._raw.readinto(buffer) or 0
        self._seconds += _clock() - before
        self._bytes += count
        if self._seconds >= READ_TIMEOUT:
            if self._bytes < _LEAST_RATE * self._seconds:
                raise _TooSlow(f"too slow: {self._bytes} bytes in {self._seconds:.0f} s")
            self._seconds, self._bytes = 0.0, 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.fp: Any = io.BufferedReader(_Pace(self.fp.detach()))


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response


class _Handler(HTTPHandler):
    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_Connection, request)


class _SecureHandler(HTTPSHandler):
    def https_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, request)


_OPENER = build_opener(_Redirects, _Handler, _SecureHandler)


# --- clouds and pipes -------------------------------------------------------------------------------------------------


def _open_cloud(url: str, at: int) -> _Stream:
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{error}; `pip install 'vqscale[cloud]'` has what it takes") from None
    file = system.open(path, "rb", block_size=8 * _CHUNK, cache_type="readahead")
    file.seek(at)
    return _Stream(file, at, file.size, getattr(file, "details", {}).get("ETag"))


def _open_pipe(url: str, _at: int) -> _Stream:
    return _Stream(gopen(url, "rb"), 0, None)


_OPENERS: dict[str, Callable[[str, int], _Stream]] = {
    "http": _open_http,
    "https": _open_http,
    "s3": _open_cloud,
    "gs": _open_cloud,
}
