"""A stand-in for the Hugging Face Hub on this machine: the part of its HTTP API that a push and a download take."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

TOKEN = "hf_of_the_stand_in"
# What the Hub takes in a card's front matter, as far as cards here have it.
LICENCES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "other"}
PIPELINES = {"unconditional-image-generation", "image-feature-extraction", "image-classification"}


class Hub:
    """`repositories[name]`: its commits, oldest first, as (sha, files). `private`: names. `asked`: "METHOD path" of
    each request. `down`: answer 503 to all."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}  # uploaded by sha256, of files that git-lfs takes
        self.asked: list[str] = []
        self.down = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        commits = self.repositories.setdefault(name, [])
        files = (commits[-1][1] if commits else {}) | files
        sha = hashlib.sha1(repr((name, len(commits), files)).encode()).hexdigest()
        commits.append((sha, files))
        return sha

    def downloads(self) -> list[str]:
        """Names of the files that were sent, in order."""
        return [line.split("/resolve/")[1].split("/", 1)[1] for line in self.asked if re.match("GET .*/resolve/", line)]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub for the length of a `with`."""
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


def settings(hub: Hub, cache: Path) -> dict[str, str]:
    """The environment of a process that uses it."""
    off = {name: "1" for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY")}
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_TOKEN": TOKEN, **off}


def use_here(monkeypatch: pytest.MonkeyPatch, hub: Hub, cache: Path) -> None:
    """The same in this process, where huggingface_hub has read its environment already. No token is set."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def card_errors(text: str) -> list[str]:
    """What the Hub would refuse in a card's front matter."""
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    facts = yaml.safe_load(front[1]) if front else {}
    errors = [f'"license" must be one of [{", ".join(sorted(LICENCES))}]'] * (
        facts.get("license", "mit") not in LICENCES
    )
    errors += ['"pipeline_tag" is not known'] * (facts.get("pipeline_tag", "image-classification") not in PIPELINES)
    for key in ("tags", "datasets", "metrics"):
        errors += [f'"{key}" must be a list of names'] * (not all(isinstance(one, str) for one in facts.get(key, [])))
    return errors


class _NotThere(Exception):
    """Its text is the X-Error-Code."""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._route(b"")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            self._route(self._body())

        do_PUT = do_POST

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _route(self, body: bytes) -> None:
            path = self.path.split("?")[0]
            hub.asked.append(f"{self.command} {path}")
            may_write = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/lfs/")
            if hub.down:
                return self._send(503, b"{}")
            if self.command in ("POST", "PUT") and not may_write:
                return self._send(401, b'{"error": "Invalid username or password."}')
            for pattern, answer in _ROUTES.items():
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    try:
                        return self._send(*answer(hub, body, may_write, *map(unquote, match.groups())))
                    except _NotThere as error:
                        return self._send(404, b"{}", {"X-Error-Code": str(error)})
            self._send(501, b"{}")

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def _json(value: Any, status: int = 200) -> tuple[int, bytes]:
    return status, json.dumps(value).encode()


def _find(hub: Hub, may_read: bool, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
    if name not in hub.repositories or (name in hub.private and not may_read):
        raise _NotThere("RepoNotFound")
    commits = hub.repositories[name]
    if revision == "main":
        return commits[-1] if commits else ("0" * 40, {})
    for sha, files in commits:
        if sha == revision:
            return sha, files
    raise _NotThere("RevisionNotFound")


def _create(hub: Hub, body: bytes, _: bool) -> tuple[int, bytes]:
    about = json.loads(body)
    name = f"{about['organization']}/{about['name']}"
    if name in hub.repositories:
        return _json({"url": f"{hub.url}/{name}", "error": "You already created this model repo"}, 409)
    hub.repositories[name] = []
    if about.get("private") or about.get("visibility") == "private":
        hub.private.add(name)
    return _json({"url": f"{hub.url}/{name}", "name": name})


def _validate(_hub: Hub, body: bytes, _: bool) -> tuple[int, bytes]:
    errors = card_errors(json.loads(body)["content"])
    return _json({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _preupload(hub: Hub, body: bytes, may_read: bool, name: str, revision: str) -> tuple[int, bytes]:
    _find(hub, may_read, name, revision)
    paths = [file["path"] for file in json.loads(body)["files"]]
    modes = {path: "lfs" if _is_large(path) else "regular" for path in paths}
    return _json({"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]})


def _batch(hub: Hub, body: bytes, _: bool, _name: str) -> tuple[int, bytes]:
    objects = [
        {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}} for one in json.loads(body)["objects"]
    ]
    return _json({"transfer": "basic", "objects": objects})


def _put(hub: Hub, body: bytes, _: bool, oid: str) -> tuple[int, bytes]:
    assert hashlib.sha256(body).hexdigest() == oid
    hub.large[oid] = body
    return 200, b""


def _commit(hub: Hub, body: bytes, _: bool, name: str, _revision: str) -> tuple[int, bytes]:
    files = {}
    for line in map(json.loads, body.splitlines()):
        about = line["value"]
        if line["key"] == "file":
            files[about["path"]] = base64.b64decode(about["content"])
        elif line["key"] == "lfsFile":
            files[about["path"]] = hub.large[about["oid"]]
    sha = hub.commit(name, files)
    return _json({"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha})


def _info(hub: Hub, _: bytes, may_read: bool, name: str, revision: str = "main") -> tuple[int, bytes]:
    sha, files = _find(hub, may_read, name, revision)
    return _json({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in sorted(files)]})


def _etag(path: str, data: bytes) -> str:
    return (hashlib.sha256(data) if _is_large(path) else hashlib.sha1(b"blob %d\0%b" % (len(data), data))).hexdigest()


def _tree(hub: Hub, _: bytes, may_read: bool, name: str, revision: str) -> tuple[int, bytes]:
    entries: list[dict[str, Any]] = []
    for path, data in sorted(_find(hub, may_read, name, revision)[1].items()):
        oid = _etag(path, data)
        large = {"lfs": {"oid": oid, "size": len(data), "pointerSize": 134}} if _is_large(path) else {}
        entries.append({"type": "file", "path": path, "size": len(data), "oid": oid[:40], **large})
    return _json(entries)


def _resolve(
    hub: Hub, _: bytes, may_read: bool, name: str, revision: str, path: str
) -> tuple[int, bytes, dict[str, str]]:
    sha, files = _find(hub, may_read, name, revision)
    if path not in files:
        raise _NotThere("EntryNotFound")
    return 200, files[path], {"X-Repo-Commit": sha, "ETag": f'"{_etag(path, files[path])}"'}


_NAME, _REVISION = r"([^/]+/[^/]+?)", r"([^/]+)"
_ROUTES: dict[str, Any] = {
    "POST /api/repos/create": _create,
    "POST /api/validate-yaml": _validate,
    f"POST /api/models/{_NAME}/preupload/{_REVISION}": _preupload,
    f"POST /{_NAME}.git/info/lfs/objects/batch": _batch,
    r"PUT /lfs/(\w+)": _put,
    f"POST /api/models/{_NAME}/commit/{_REVISION}": _commit,
    f"GET /api/models/{_NAME}": _info,
    f"GET /api/models/{_NAME}/revision/{_REVISION}": _info,
    f"GET /api/models/{_NAME}/tree/{_REVISION}": _tree,
    f"(?:GET|HEAD) /{_NAME}/resolve/{_REVISION}/(.+)": _resolve,
}
