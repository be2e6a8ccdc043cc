"""A web server on this machine that serves a folder, counts, and fails on demand."""

import contextlib
import gzip
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class Web:
    """`url`: the folder's. `asked`: (name, first byte) of each request, `headers`: what came with it.
    `will[name]`: what to do to the next ones, as "etag x; cut 1000".

    `404` or another status, `429 7`: with `Retry-After: 7`; `to URL`: a redirect; `silent`: never answer;
    `crawl`: headers in single bytes.
    Of the contents: `wrong N`: flip a bit of byte N; `long N`: N bytes too many; `empty`; `gzip`: compressed.
    Of the headers: `etag X`; `claims N`: a Content-Length; `whole`: no range, `range N`: another one, `bare`: unnamed.
    Of sending: `cut N`: break off after N bytes; `reset N`: the same with a reset; `chunked`; `endless`; `slow`: 20
    pieces, 10 ms apart; `drip`: single bytes. `ranges`: whether ranges are understood; `length`: whether a
    Content-Length is sent.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[tuple[str, int]] = []
        self.headers: list[dict[str, str]] = []
        self.will: dict[str, deque[str]] = defaultdict(deque)
        self.ranges = self.length = True
        self.over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def downloads(self) -> dict[str, int]:
        """How often each file was asked for from its first byte."""
        names = [name for name, first in self.asked if first == 0]
        return {name: names.count(name) for name in names}

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Web]:
    """A server for the length of a `with`."""
    web = Web(folder)
    try:
        yield web
    finally:
        web.close()


def _handler(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = unquote(self.path.split("?")[0]).lstrip("/")
            span = self.headers.get("Range", "bytes=0-") if web.ranges else "bytes=0-"
            first = int(span.removeprefix("bytes=").rstrip("-"))
            web.asked.append((name, first))
            web.headers.append(dict(self.headers))
            words = web.will[name].popleft() if web.will[name] else ""
            will = {word: value for word, _, value in (part.strip().partition(" ") for part in words.split(";"))}
            path = web.folder / name
            status = next(filter(str.isdigit, will), "" if path.is_file() else "404")
            if "silent" in will:
                web.over.wait(60)
            elif "crawl" in will:
                with contextlib.suppress(ConnectionError):
                    self._write(b"HTTP/1.1 200 OK\r\nX: " + bytes(1000), {"drip": ""}, cut=True)
            elif "to" in will:
                self._answer(302, {"Location": will["to"]})
            elif status:
                self._answer(int(status), {"Retry-After": will[status]} if will.get(status) else {})
            elif first and first >= path.stat().st_size:
                self._answer(416, {"Content-Range": f"bytes */{path.stat().st_size}"})
            else:
                with contextlib.suppress(ConnectionError):
                    self._send(path.read_bytes(), first, will)

        def _answer(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def _send(self, data: bytes, first: int, will: dict[str, str]) -> None:
            if "wrong" in will:
                number = int(will["wrong"])
                data = data[:number] + bytes([data[number] ^ 1]) + data[number + 1 :]
            data = b"" if "empty" in will else data + bytes(int(will.get("long", 0)))
            data = gzip.compress(data) if "gzip" in will else data
            first = 0 if "whole" in will or "empty" in will else int(will.get("range", first))
            headers = {"ETag": will["etag"]} if "etag" in will else {}
            headers |= {"Content-Encoding": "gzip"} if "gzip" in will else {}
            if first and "bare" not in will:
                headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            if "chunked" in will:
                headers["Transfer-Encoding"] = "chunked"
            elif web.length and "endless" not in will:
                headers["Content-Length"] = will.get("claims", str(len(data) - first))
            self._answer(206 if first else 200, headers)
            cut = int(will["cut"]) if "cut" in will else int(will["reset"]) if "reset" in will else len(data)
            self._write(data[first:cut], will, cut="cut" in will or "reset" in will)
            while "endless" in will and not web.over.is_set():
                self.wfile.write(bytes(1 << 16))
            if "reset" in will:
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        def _write(self, body: bytes, will: dict[str, str], cut: bool) -> None:
            step, pause = len(body), 0.0
            if "slow" in will:
                step, pause = -(-len(body) // 20), 0.01
            if "drip" in will:
                step, pause = 1, 0.001
            for at in range(0, len(body), max(step, 1)):
                piece = body[at : at + step]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if "chunked" in will else piece)
                time.sleep(pause)
            if "chunked" in will and not cut:
                self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
