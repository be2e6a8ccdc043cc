"""A web server on this machine that serves a folder, counts, and fails on demand."""

import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Web:
    """`url`: the folder's. `asked`: (name, first byte) of each request. `will[name]`: what to do to the next ones.

    Words: `404` or another status; `cut N`: break off after N bytes; `wrong N`: flip a bit of byte N; `long N`: N bytes
    too many; `slow`: 20 pieces, 10 ms apart; `silent`: never answer. `ranges`: whether ranges are understood; `length`:
    whether a Content-Length is sent.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[tuple[str, int]] = []
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
            name = self.path.split("?")[0].lstrip("/")
            span = self.headers.get("Range", "bytes=0-") if web.ranges else "bytes=0-"
            first = int(span.removeprefix("bytes=").rstrip("-"))
            web.asked.append((name, first))
            word, _, number = (web.will[name].popleft() if web.will[name] else "").partition(" ")
            if word == "silent":
                web.over.wait(60)
            elif word.isdigit() or not (web.folder / name).is_file():
                self.send_error(int(word or 404))
            else:
                with contextlib.suppress(ConnectionError):
                    self._send((web.folder / name).read_bytes(), first, word, int(number or 0))

        def _send(self, data: bytes, first: int, word: str, number: int) -> None:
            if word == "wrong":
                data = data[:number] + bytes([data[number] ^ 1]) + data[number + 1 :]
            data += bytes(number if word == "long" else 0)
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            if web.length:
                self.send_header("Content-Length", str(len(data) - first))
            self.end_headers()
            body = data[first : number if word == "cut" else None]
            step = -(-len(body) // 20) if word == "slow" else len(body)
            for at in range(0, len(body), max(step, 1)):
                self.wfile.write(body[at : at + step])
                time.sleep(0.01 if word == "slow" else 0)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
