"""A node's copies of remote shards: fetched once, verified, whole or absent, and never removed while in use."""

import hashlib
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.web import Web, serving

from vqscale.data import cache as cache_module
from vqscale.data import remote
from vqscale.data.cache import Cache, NoRoom, RemoteTar

SIZE, COUNT = 50_000, 6


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    (tmp_path / "web").mkdir()
    for n in range(COUNT):
        (tmp_path / "web" / f"{n}.tar").write_bytes(hashlib.shake_256(str(n).encode()).digest(SIZE))
    with serving(tmp_path / "web") as web:
        yield web


@pytest.fixture
def tars(web: Web, tmp_path: Path) -> list[RemoteTar]:
    """The remote shards, with a cache that has room for them all."""
    cache = Cache(tmp_path / "cache", SIZE * COUNT)
    cache.make_folder()
    contents = [(web.folder / f"{n}.tar").read_bytes() for n in range(COUNT)]
    return [
        RemoteTar(f"{web.url}/{n}.tar", SIZE, hashlib.sha256(data).hexdigest(), cache)
        for n, data in enumerate(contents)
    ]


def with_room(tars: list[RemoteTar], count: int) -> list[RemoteTar]:
    return [replace(tar, cache=replace(tar.cache, limit=SIZE * count)) for tar in tars]


def contents(tar: RemoteTar) -> bytes:
    """Opened, read, closed."""
    with open(tar.open(), "rb") as file:
        return file.read()


def kept(tars: list[RemoteTar]) -> set[int]:
    """Which shards have a copy."""
    return {n for n, tar in enumerate(tars) if tar._copy.exists()}


def leftovers(tars: list[RemoteTar]) -> list[str]:
    return sorted(path.name for path in tars[0].cache.shards.iterdir() if path.suffix not in (".tar", ".TAG", ""))


def test_a_shard_is_fetched_once_and_is_what_was_indexed(web: Web, tars: list[RemoteTar]) -> None:
    for _ in range(3):
        assert contents(tars[0]) == (web.folder / "0.tar").read_bytes()
    assert web.downloads() == {"0.tar": 1} and leftovers(tars) == []


def test_a_break_is_taken_up_where_it_was(web: Web, tars: list[RemoteTar]) -> None:
    web.will["0.tar"].extend(["500", "cut 20000", "404", "slow"])
    assert contents(tars[0]) == (web.folder / "0.tar").read_bytes()
    assert web.asked[-1] == ("0.tar", 20000)


def test_wrong_bytes_of_the_right_length_are_never_kept(web: Web, tars: list[RemoteTar]) -> None:
    web.will["0.tar"].append("wrong 777")
    assert contents(tars[0]) == (web.folder / "0.tar").read_bytes()  # the second time it was right
    web.will["1.tar"].extend(["wrong 777"] * 2)
    expected = rf"{web.url}/1.tar: {SIZE} bytes, sha256 .{{12}}…, where {SIZE}, {tars[1].sha256[:12]}… were indexed"
    with pytest.raises(OSError, match=expected):
        tars[1].open()
    assert kept(tars) == {0}


@pytest.mark.parametrize("length", [0, SIZE - 1, SIZE + 1, 3 * SIZE])
def test_another_length_is_never_kept(web: Web, tars: list[RemoteTar], length: int) -> None:
    (web.folder / "0.tar").write_bytes(bytes(length))
    with pytest.raises(OSError, match="damaged, or another file"):
        tars[0].open()
    assert kept(tars) == set() and tars[0]._part.exists() is False


def test_a_first_answer_that_was_longer_leaves_nothing_behind(web: Web, tars: list[RemoteTar]) -> None:
    web.will["0.tar"].append("long 999")
    for _ in range(2):
        assert contents(tars[0]) == (web.folder / "0.tar").read_bytes()
    assert len(web.asked) == 2 and tars[0]._copy.stat().st_size == SIZE


def test_a_failure_is_remembered_for_a_while(web: Web, tars: list[RemoteTar], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch asks for one shard many times; the server is asked once."""
    data = (web.folder / "0.tar").read_bytes()
    (web.folder / "0.tar").unlink()
    for _ in range(3):
        with pytest.raises(OSError, match=rf"{web.url}/0.tar: HTTP Error 404"):
            tars[0].open()
    assert len(web.asked) == 5
    (web.folder / "0.tar").write_bytes(data)
    monkeypatch.setattr(cache_module, "_RETRY_AFTER_SECONDS", 0)
    assert contents(tars[0]) == data and leftovers(tars) == []


def in_processes(work: Callable[[int], Any], count: int) -> list[Any]:
    """`work(n)` in `count` processes at once; what they return, or their exit codes."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [context.Process(target=lambda n=n: pipes[n][1].send(work(n))) for n in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    return [receive.recv() if receive.poll() else p.exitcode for (receive, _), p in zip(pipes, processes, strict=True)]


pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def test_processes_and_threads_share_one_download(web: Web, tars: list[RemoteTar]) -> None:
    web.will["0.tar"].append("slow")

    def work(_: int) -> list[str]:
        found: list[str] = []
        threads = [
            threading.Thread(target=lambda: found.append(hashlib.sha256(contents(tars[0])).hexdigest()))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    assert in_processes(work, 4) == [[tars[0].sha256] * 3] * 4
    assert web.asked == [("0.tar", 0)]


def test_a_killed_download_is_never_taken_for_whole(web: Web, tars: list[RemoteTar]) -> None:
    for cut in (0, SIZE // 2):
        web.will["0.tar"].extend([f"cut {cut}", "silent"])
        process = multiprocessing.get_context("fork").Process(target=tars[0].open)
        process.start()
        while len(web.asked) < 2:
            time.sleep(0.01)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert tars[0]._part.stat().st_size == SIZE and not tars[0]._copy.exists()  # its room was claimed
        web.asked.clear()
    assert contents(tars[0]) == (web.folder / "0.tar").read_bytes()
    assert web.asked == [("0.tar", 0)] and leftovers(tars) == []


def test_another_shard_clears_what_a_killed_download_left(web: Web, tars: list[RemoteTar]) -> None:
    tars[1]._part.write_bytes(bytes(SIZE))
    contents(with_room(tars, 1)[0])
    assert leftovers(tars) == []


def test_a_full_disk_ends_the_run_and_leaves_nothing(web: Web, tars: list[RemoteTar]) -> None:
    def work(_: int) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 1, SIZE - 1))
        with pytest.raises(ValueError) as error:
            tars[0].open()
        return str(error.value)

    (line,) = in_processes(work, 1)
    assert line == f"cache_dir={tars[0].cache.folder}: File too large while keeping {web.url}/0.tar"
    assert kept(tars) == set() and leftovers(tars) == []


def test_a_disk_that_fills_up_during_the_download(
    web: Web, tars: list[RemoteTar], monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(cache_module, "_CHUNK", 10_000)

    def write(descriptor: int, data: Any, at: int) -> int:
        if at >= 20_000:
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data[:3000], at)

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(ValueError, match=f"No space left on device while keeping {web.url}/0.tar"):
        tars[0].open()
    assert kept(tars) == set() and leftovers(tars) == []
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: pwrite(descriptor, data[:3000], at))
    assert contents(tars[0]) == (web.folder / "0.tar").read_bytes()  # a write that takes a part is gone on with


def test_the_longest_unused_go_first(web: Web, tars: list[RemoteTar]) -> None:
    tars = with_room(tars, 3)
    for n in (0, 1, 2, 0, 3, 4):
        contents(tars[n])
        time.sleep(0.01)  # times of use that differ
    assert kept(tars) == {0, 3, 4}
    assert sum(path.stat().st_size for path in tars[0].cache.shards.glob("*.tar")) == 3 * SIZE


def test_what_is_in_use_stays_even_over_the_limit(web: Web, tars: list[RemoteTar]) -> None:
    tars = with_room(tars, 2)
    held = [tars[n].open() for n in range(3)]
    assert kept(tars) == {0, 1, 2}
    with pytest.raises(NoRoom, match="full of shards in use"):
        tars[3].open(ahead=True)
    assert kept(tars) == {0, 1, 2} and leftovers(tars) == []
    os.close(held[1])
    os.close(held[2])
    os.close(tars[3].open(ahead=True))
    assert kept(tars) == {0, 3} and "3.tar" in web.downloads()
    assert os.pread(held[0], SIZE, 0) == (web.folder / "0.tar").read_bytes()
    os.close(held[0])


def test_another_process_use_counts_and_ends_with_it(web: Web, tars: list[RemoteTar]) -> None:
    tars = with_room(tars, 2)
    held = multiprocessing.get_context("fork").Process(target=lambda: (tars[0].open(), time.sleep(60)))
    held.start()
    while kept(tars) != {0}:
        time.sleep(0.01)
    for n in (1, 2):
        contents(tars[n])
    assert kept(tars) == {0, 2}
    os.kill(held.pid or 0, signal.SIGKILL)
    held.join()
    contents(tars[3])
    assert kept(tars) == {2, 3}


def test_readers_and_evictions_at_once(web: Web, tars: list[RemoteTar]) -> None:
    """Room for two of six: nobody ever reads anything but what was indexed."""
    tars = with_room(tars, 2)

    def work(rank: int) -> int:
        for step in range(30):
            tar = tars[(step * (rank + 1) + rank) % COUNT]
            assert hashlib.sha256(contents(tar)).hexdigest() == tar.sha256
        return 30

    assert in_processes(work, 4) == [30] * 4
    contents(tars[0])
    assert len(kept(tars)) <= 2 and leftovers(tars) == []


def test_a_copy_that_a_crash_spoilt_is_fetched_again(web: Web, tars: list[RemoteTar]) -> None:
    contents(tars[0])
    os.truncate(tars[0]._copy, 100)
    assert contents(tars[0]) == (web.folder / "0.tar").read_bytes()
    assert web.downloads() == {"0.tar": 2}


def test_files_of_others_stay_whatever_room_is_needed(web: Web, tars: list[RemoteTar]) -> None:
    cache = tars[0].cache
    names = ["backup.tar", "download.part", f"{'0' * 64}.tar", f"{'0' * 63}.tar", f"{'0' * 64}.part"]
    others = [cache.folder / name for name in names] + [cache.shards / name for name in ("backup.tar", "download.part")]
    for path in others:
        path.write_bytes(bytes(2 * SIZE))
    for tar in with_room(tars, 1):
        contents(tar)
    assert kept(tars) == {COUNT - 1}
    assert all(path.read_bytes() == bytes(2 * SIZE) for path in others)


@pytest.mark.parametrize("name", ["copy", "part", "lock"])
def test_no_link_is_followed(web: Web, tars: list[RemoteTar], tmp_path: Path, name: str) -> None:
    (tmp_path / "precious").write_bytes(bytes(SIZE))
    path = {"copy": tars[0]._copy, "part": tars[0]._part, "lock": tars[0].cache.shards / "lock"}[name]
    path.symlink_to(tmp_path / "precious")
    with pytest.raises((OSError, ValueError), match="symbolic link"):
        tars[0].open()
    assert (tmp_path / "precious").read_bytes() == bytes(SIZE)


def test_folders_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cache_dir=.*file/x cannot be made: Not a directory"):
        Cache(tmp_path / "file" / "x").make_folder()
    monkeypatch.setattr(os, "getuid", lambda: -1)
    with pytest.raises(ValueError, match=rf"belongs to user {tmp_path.stat().st_uid}"):
        Cache(tmp_path).make_folder()


def as_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_link, "is a link"),
        (lambda folder: (folder.rmdir(), folder.touch()), "is no folder"),
        (lambda folder: folder.chmod(0o777), "may be written by others"),
        (lambda folder: folder.chmod(0o770), "may be written by others"),
        (lambda folder: None, "has no CACHEDIR.TAG: it was not made by vqscale"),
    ],
)
def test_a_sub_folder_that_is_not_safely_ours(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    cache = Cache(tmp_path)
    cache.shards.mkdir(mode=0o700)
    change(cache.shards)
    with pytest.raises(ValueError, match=rf"cache_dir={tmp_path}: {cache.shards} {message}; choose another"):
        cache.make_folder()


def test_the_default_folder_is_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may make a link of its name in the system's folder for temporary files."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "default").symlink_to("victim")
    monkeypatch.setattr(Cache, "folder", tmp_path / "default")
    with pytest.raises(ValueError, match="default is a link"):
        Cache(tmp_path / "default").make_folder()
    assert list((tmp_path / "victim").iterdir()) == []
    (tmp_path / "chosen").symlink_to("victim")
    Cache(tmp_path / "chosen").make_folder()  # a link that the user named


def test_many_make_the_folder_at_once(tmp_path: Path) -> None:
    in_processes(lambda _: Cache(tmp_path / "cache").make_folder(), 8)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Cache(tmp_path / "cache").shards.name]
    assert (Cache(tmp_path / "cache").shards / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28")


@pytest.mark.parametrize(
    "words", [["claims 1000"], ["empty"], ["gzip"], ["range 500"], ["wrong 5"], ["endless"], ["etag x; cut 9"]]
)
def test_what_a_server_says_is_believed_after_the_checksum(web: Web, tars: list[RemoteTar], words: list[str]) -> None:
    web.will["0.tar"].extend(words + ["etag y"])
    if words == ["gzip"]:
        with pytest.raises(OSError, match="Content-Encoding: gzip"):
            tars[0].open()
    else:
        assert contents(tars[0]) == (web.folder / "0.tar").read_bytes()
    assert leftovers(tars) == ([tars[0]._note.name] if words == ["gzip"] else [])


def test_two_windows_must_fit() -> None:
    Cache(limit=10 * 10**9).check_size([5 * 10**9, 5 * 10**9])
    with pytest.raises(ValueError, match=r"cache_gigabytes=9 .* 2 shards of up to 10 GB together"):
        Cache(limit=9 * 10**9).check_size([5 * 10**9, 5 * 10**9])
