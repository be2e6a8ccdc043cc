"""What lies at a URL is read whole, or the error says which URL and why."""

import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.web import Web, serving

from vqscale.data import remote
from vqscale.data.remote import RemoteFile, shown

DATA = hashlib.shake_256(b"some bytes").digest(300_000)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "x.tar").write_bytes(DATA)
    with serving(tmp_path / "web") as web:
        yield web


def read(url: str, step: int = 70_000, allow_pipe: bool = False) -> bytes:
    with RemoteFile(url, allow_pipe) as file:
        pieces = list(iter(lambda: file.read(step), b""))
    assert all(len(piece) == step for piece in pieces[:-1])
    return b"".join(pieces)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["500", "404", "503"],
        ["cut 0"],
        ["cut 1", "cut 99000", "cut 200001"],
        ["slow"],
        ["cut 120000", "500", "500", "cut 130000", "503", "slow"],
    ],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_every_byte_arrives_once(web: Web, words: list[str], ranges: bool) -> None:
    web.ranges = ranges
    web.will["x.tar"].extend(words)
    assert read(f"{web.url}/x.tar") == DATA
    assert len(web.asked) == len([word for word in words if word != "slow"]) + 1
    firsts = [first for _, first in web.asked]
    assert firsts == sorted(firsts) and (max(firsts) > 0) == (ranges and any("cut 1" in word for word in words))


def test_a_server_that_names_no_length(web: Web) -> None:
    web.length = False
    assert read(f"{web.url}/x.tar") == DATA


def test_silence_is_a_break(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SILENCE", 0.2)
    web.will["x.tar"].extend(["cut 500", "silent"])
    assert read(f"{web.url}/x.tar") == DATA
    assert web.asked == [("x.tar", 0), ("x.tar", 500), ("x.tar", 500)]


def test_the_error_names_the_url_and_the_reason(web: Web) -> None:
    with pytest.raises(OSError, match=rf"{web.url}/no.tar: HTTP Error 404: Not Found \(after 0 bytes, attempt 5\)"):
        read(f"{web.url}/no.tar?signature=secret")
    web.will["x.tar"].append("403")
    with pytest.raises(OSError, match=r"403: Forbidden \(after 0 bytes, attempt 1\)"):
        read(f"{web.url}/x.tar")
    web.will["x.tar"].extend(["cut 1000"] * 6)
    with pytest.raises(OSError, match=r"x.tar: the connection was cut \(after 1000 of 300000 bytes, attempt 5\)"):
        read(f"{web.url}/x.tar")
    web.close()
    with pytest.raises(OSError, match=r"x.tar: .*refused \(after 0 bytes, attempt 5\)"):
        read(f"{web.url}/x.tar")


def test_pauses_double(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(OSError):
        read(f"{web.url}/no.tar")
    assert pauses == [0.001 * 2**n for n in range(4)]


def test_a_file_that_changes_while_it_is_read(web: Web) -> None:
    web.will["x.tar"].append("cut 1000")
    with RemoteFile(f"{web.url}/x.tar") as file:
        file.read(1000)
        (web.folder / "x.tar").write_bytes(DATA[:-5])
        with pytest.raises(OSError, match="changed while it was read: 300000 bytes, then 299995"):
            file.read(1000)


def test_secrets_are_not_shown() -> None:
    assert shown("https://user:password@host:8/a/b.tar?signature=secret#x") == "https://host:8/a/b.tar"


def test_pipes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(DATA)
    assert read(f"pipe:cat {tmp_path / 'x'}", allow_pipe=True) == DATA
    with pytest.raises(ValueError, match="allow_pipe=true allows it"):
        read(f"pipe:touch {tmp_path / 'ran'}")
    assert not (tmp_path / "ran").exists()


def test_a_pipe_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    with pytest.raises(OSError, match=r"pipe:head -c 9 .* exit 3 .*after [09] bytes, attempt 5"):
        read("pipe:head -c 9 /dev/zero; exit 3", allow_pipe=True)


class Bucket(MemoryFileSystem):
    """An object store in memory, under a scheme that is real."""

    protocol = ("s3",)
    store: dict = {}
    breaks = 0

    def _open(self, path: str, *arguments: object, **options: object):  # type: ignore[no-untyped-def]
        file = super()._open(path, *arguments, **options)
        if Bucket.breaks:
            Bucket.breaks -= 1
            raise TimeoutError("the store is busy")
        return file


def test_object_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    with fsspec.open("s3://bucket/x.tar", "wb") as file:
        file.write(DATA)
    Bucket.breaks = 2
    assert read("s3://bucket/x.tar") == DATA and Bucket.breaks == 0


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(OSError, match=r"gs://b/x.tar: Please install gcsfs; `pip install 'vqscale\[cloud\]'"):
        read("gs://b/x.tar")
