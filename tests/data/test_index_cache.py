"""Indexes through the node's cache: read once, verified, counted, and replaced like the copies of tars."""

import errno
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.file_calls import counted

from vqscale.data import cache as cache_module
from vqscale.data.cache import Cache, NoRoom, RemoteTar, Tars
from vqscale.data.images import ImageReader
from vqscale.data.sequential import sequential_batches
from vqscale.data.shards import Manifest, ShardInfo
from vqscale.stages import index
from vqscale.stages.index import IndexConfig

SHARDS = 5
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def indexed(images: Path, tmp_path: Path) -> Path:
    """A folder that has indexes and no tars, so that the files opened in it are the description and the indexes."""
    index.main(IndexConfig(run_dir=str(tmp_path / "run"), source=str(images), workers=1, device="cpu"))
    return tmp_path / "run" / "train"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10**9, keep_indexes=True)


def read(folder: Path, cache: Cache, workers: int = 0) -> tuple[list[Any], int]:
    """(all pixels, how many of the folder's files were opened for them)."""
    with counted(folder) as calls:
        batches = sequential_batches(folder, read=ImageReader(12), batch=5, workers=workers, cache=cache)
        pixels = [batch["image"].tolist() for batch in batches]
    return pixels, calls.of("open")


def copies(cache: Cache, suffix: str = ".index") -> list[Path]:
    return sorted(path for path in cache.shards.iterdir() if path.suffix == suffix)


def test_a_node_reads_each_index_once(indexed: Path, cache: Cache) -> None:
    without = read(indexed, replace(cache, keep_indexes=False), workers=3)
    assert without[1] > 1 + SHARDS and not cache.folder.exists()  # each worker reads those that it needs
    first, second = read(indexed, cache, workers=3), read(indexed, cache)
    assert first == (without[0], 1 + SHARDS) and second == (without[0], 1)
    assert len(copies(cache)) == SHARDS and not copies(cache, ".part")


def test_processes_that_ask_at_once_share_one_read(indexed: Path, cache: Cache) -> None:
    tars = Tars(indexed, Manifest.load(indexed), cache)
    context = multiprocessing.get_context("fork")
    with counted(indexed) as calls:
        processes = [context.Process(target=lambda: [tars.read_index(n) for n in range(SHARDS)]) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
    assert [process.exitcode for process in processes] == [0] * 6 and calls.of("open") == SHARDS


def test_a_damaged_copy_is_not_used_and_is_replaced(indexed: Path, cache: Cache) -> None:
    pixels, _ = read(indexed, cache)
    data = copies(cache)[0].read_bytes()
    for damaged in (b"", data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        copies(cache)[0].write_bytes(damaged)
        assert read(indexed, cache) == (pixels, 2) and copies(cache)[0].read_bytes() == data


def test_an_index_that_is_not_the_one_described_is_named_and_not_kept(indexed: Path, cache: Cache) -> None:
    path = indexed / "000002.index.safetensors"
    path.write_bytes((indexed / "000003.index.safetensors").read_bytes())
    tars = Tars(indexed, Manifest.load(indexed), cache)
    with pytest.raises(ValueError, match="000002.index.safetensors: indexes another tar"):
        tars.read_index(2)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="000002.index.safetensors: this shard's index is missing"):
        tars.read_index(2)
    assert copies(cache) == [] == copies(cache, ".part")


def test_copies_of_indexes_count_and_those_unused_for_longest_go_first(indexed: Path, cache: Cache) -> None:
    pixels, _ = read(indexed, cache)
    for age, path in enumerate(copies(cache)):
        os.utime(path, (age, age))
    (own := cache.shards / "notes.index").write_text("the user's")
    all_copies = copies(cache)
    size = sum(path.stat().st_size for path in all_copies if path != own)
    part, descriptor = _part(cache)
    cache_module._make_room(replace(cache, limit=size), all_copies[0].stat().st_size + 1, part, descriptor, ahead=True)
    assert copies(cache) == sorted([*all_copies[2:]]) and own.exists()
    with pytest.raises(NoRoom):
        cache_module._make_room(replace(cache, limit=9), 10, part, descriptor, ahead=True)
    os.close(descriptor)
    part.unlink()
    assert copies(cache) == [own]
    full = replace(cache, limit=0)
    assert read(indexed, full) == (pixels, 1 + SHARDS) and copies(full) == [own] and not copies(full, ".part")


def _part(cache: Cache) -> tuple[Path, int]:
    part = cache.shards / f"{'f' * 64}.part"
    return part, os.open(part, os.O_RDWR | os.O_CREAT)


def test_the_number_of_copies_is_bounded(indexed: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MOST_INDEXES", 2)
    read(indexed, cache)
    assert len(copies(cache)) == 3


def test_a_cache_that_went_away_costs_reads_and_nothing_else(indexed: Path, cache: Cache) -> None:
    manifest = Manifest.load(indexed)
    tars = Tars(indexed, manifest, cache)
    cache.shards.rename(cache.folder / "away")
    assert tars.read_index(1).keys == manifest.index(indexed, 1).keys


def test_without_file_locks_indexes_are_read_from_where_they_are(
    indexed: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache_module.fcntl, "flock", no_locks)
    tars = Tars(indexed, Manifest.load(indexed), cache)
    open_before = len(os.listdir("/proc/self/fd"))
    assert len(tars.read_index(0)) == 7 and copies(cache) == [] == copies(cache, ".part")
    with pytest.raises(ValueError, match=r"cache_dir=.*: No locks available while keeping https://host/0.tar"):
        RemoteTar("https://host/0.tar", 1, "0" * 64, cache).open()
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_description_cannot_name_files_outside_the_cache(indexed: Path, cache: Cache, tmp_path: Path) -> None:
    manifest = Manifest.load(indexed)
    shards = [replace(shard, index_sha256="../outside") for shard in manifest.shards]
    Manifest.of("images", shards, manifest.classes).save(indexed)
    with pytest.raises(ValueError, match=r"was damaged or changed: .* has ../outside"):
        Tars(indexed, Manifest.load(indexed), cache).read_index(0)
    assert not list(tmp_path.rglob("outside*"))


def test_indexes_of_earlier_versions_have_no_copies(indexed: Path, cache: Cache) -> None:
    manifest = Manifest.load(indexed)
    shards: list[ShardInfo] = [replace(shard, index_sha256="") for shard in manifest.shards]
    Manifest.of("images", shards, manifest.classes).save(indexed)
    assert read(indexed, cache)[1] == 1 + SHARDS and copies(cache) == []
