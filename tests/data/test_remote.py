"""The contents of a URL are read whole, or the error says which URL and why."""

import base64
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.web import Web, serving

from vqscale.data import remote
from vqscale.data.remote import RemoteFile, check_url

DATA = hashlib.shake_256(b"some bytes").digest(300_000)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "x.tar").write_bytes(DATA)
    with serving(tmp_path / "web") as web:
        yield web


def read(url: str, step: int = 70_000, allow_pipe: bool = False, compare_versions: bool = True) -> bytes:
    with RemoteFile(url, allow_pipe, compare_versions) as file:
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
    monkeypatch.setattr(remote, "READ_TIMEOUT", 0.2)
    web.will["x.tar"].extend(["cut 500", "silent"])
    assert read(f"{web.url}/x.tar") == DATA
    assert web.asked == [("x.tar", 0), ("x.tar", 500), ("x.tar", 500)]


def test_the_error_names_the_url_and_the_reason(web: Web) -> None:
    with pytest.raises(
        OSError, match=rf"{web.url}/no.tar\?s=\*\*\*: HTTP Error 404: Not Found \(after 0 bytes, attempt 5\)"
    ):
        read(f"{web.url}/no.tar?s=secret")
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
    monkeypatch.setattr(remote, "_sleep", pauses.append)
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


@pytest.mark.parametrize(
    "words",
    [
        ["chunked"],
        ["chunked; cut 1000"],
        ["chunked; cut 300000"],  # all of it, but for the last word
        ["cut 1000", "whole"],
        ["cut 1000", "range 500"],
        ["cut 1000", "range 2000"],
        ["cut 1000", "range 2000; bare"],
        ["range 500"],
        ["reset 0", "reset 1000", "cut 1000; chunked", "reset 90000"],
        ['etag "x"; cut 1000', 'etag "x"'],
        ['etag "x"; cut 1000', 'etag W/"x"'],
        ['etag W/"x"; cut 1000', 'etag "x"; cut 2000', "whole"],
        ["500", "502", "503", "504"],
        ["to {url}/x.tar", "cut 1000", "to {url}/x.tar"],
        ["to x.tar"],
    ],
)
def test_a_server_that_errs_gives_every_byte_once(web: Web, words: list[str]) -> None:
    web.will["x.tar"].extend(word.format(url=web.url) for word in words)
    assert read(f"{web.url}/x.tar") == DATA and not web.will["x.tar"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["claims 400000"], "changed while it was read: 400000 bytes, then 300000"),
        (["cut 1000", "long 5"], "changed while it was read: 300000 bytes, then 300005"),
        (["cut 1000", "empty"], "changed while it was read: 300000 bytes, then 0"),
        (["etag x; cut 1000", "etag y"], "changed while it was read: other contents"),
        (["cut 1000"] + ["range 2000"] * 4, r"asked for the bytes from 1000, got bytes 2000-\d+/300000 .* attempt 5"),
        (["cut 1000"] + ["range 1000; bare"] * 4, "asked for the bytes from 1000, got no Content-Range"),
        (["gzip"], r"Content-Encoding: gzip.* attempt 1"),
        (["500"] * 5, "HTTP Error 500.* attempt 5"),
        (["416"], "HTTP Error 416.* attempt 1"),
        (["451"], "HTTP Error 451.* attempt 1"),
        (["302"], "HTTP Error 302.* attempt 1"),
        (["to {url}/x.tar"] * 9, "HTTP Error 302.* attempt 1"),
        (["to ftp://u:SECRET@h/x?a=SECRET"], r"leads to ftp://\*\*\*@h/x\?a=\*\*\*, which is neither.* attempt 1"),
        (["to file:///etc/passwd"], "HTTP Error 302.*not allowed.* attempt 1"),
        (["to http://u:SEC/RET@h/x"] * 5, "not a URL"),
    ],
)
def test_a_server_that_lies_is_given_up(web: Web, words: list[str], message: str) -> None:
    web.will["x.tar"].extend(word.format(url=web.url) for word in words)
    with pytest.raises(OSError, match=f"^{web.url}/x.tar: .*{message}") as error:
        read(f"{web.url}/x.tar")
    assert "RET" not in str(error.value) and "\n" not in str(error.value)


def test_what_the_headers_claim_is_all_there_is(web: Web) -> None:
    """Only a checksum tells, which the cache has."""
    web.will["x.tar"].extend(["claims 1000", "empty"])
    assert read(f"{web.url}/x.tar") == DATA[:1000]
    assert read(f"{web.url}/x.tar") == b""


def test_another_version_is_the_readers_to_judge_who_knows_a_checksum(web: Web) -> None:
    web.will["x.tar"].extend(["etag x; cut 1000", "etag y"])
    assert read(f"{web.url}/x.tar", compare_versions=False) == DATA


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["429 7", "503 9"], [7, 9]),
        (["503", "429 0"], [0.001, 0.002]),
        (["503 99999"], [120]),
        (["503 Fri, 31 Dec 9999 23:59:59 GMT"], [120]),
        (["503 Fri, 31 Dec 1999 23:59:59 GMT", "429 soon"], [0.001, 0.002]),
    ],
)
def test_a_server_is_left_alone_as_long_as_it_asks(
    web: Web, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: list[float]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote, "_sleep", pauses.append)
    web.will["x.tar"].extend(words)
    assert read(f"{web.url}/x.tar") == DATA and pauses == expected


@pytest.mark.parametrize("words", ["drip", "drip; chunked", "crawl"])
def test_single_bytes_are_no_progress(web: Web, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    seconds = iter(range(10**6))
    monkeypatch.setattr(remote, "_clock", lambda: next(seconds))
    web.will["x.tar"].extend([words] * 3)
    with pytest.raises(OSError, match=r"too slow: \d+ bytes in 60 s .* attempt [12]\)"):
        read(f"{web.url}/x.tar")
    assert len(web.asked) == 2


def test_a_body_without_end_is_given_up(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_MOST_BYTES", 10**6)
    web.will["x.tar"].append("endless")
    with pytest.raises(OSError, match=r"more than 1,000,000 bytes.* attempt 1\)"):
        read(f"{web.url}/x.tar")


def test_users_and_passwords_stay_with_their_host(web: Web, tmp_path: Path) -> None:
    url = web.url.replace("http://", "http://user:p%40ss@")
    with serving(web.folder) as other:
        web.will["x.tar"].extend([f"to {web.url}/x.tar", f"to {other.url}/x.tar"])
        assert read(f"{url}/x.tar") == DATA
    expected = "Basic " + base64.b64encode(b"user:p@ss").decode()
    assert [headers["Authorization"] for headers in web.headers] == [expected] * 2
    assert len(other.headers) == 1 and "Authorization" not in other.headers[0]


@pytest.mark.parametrize("name", ["a b.tar", "ä.tar", "100%25.tar"])
def test_names_are_encoded(web: Web, name: str) -> None:
    (web.folder / unquote(name)).write_bytes(DATA)
    assert read(f"{web.url}/{name}?sig=A B") == DATA
    with pytest.raises(OSError, match=rf"{web.url}/no {name}\?sig=\*\*\*: HTTP Error 404"):
        read(f"{web.url}/no {name}?sig=SECRET SECRET")


@pytest.mark.parametrize(
    "url",
    ["http://u:SEC/RET@h/x", "http://h:port/x", "http:///x", "http://h:0/x", "http://u:SECRET@/x", "http://h h/x"],
)
def test_what_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="not a URL") as error:
        check_url(url, allow_pipe=False)
    assert "RET" not in str(error.value)


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
