"""A data set whose shards are URLs is indexed by streaming, and trained on as if it were local."""

import gc
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.streams import build, global_stream, rank_stream
from support.web import Web, serving

from vqscale.data import cache as cache_module
from vqscale.data import parts, remote, tarindex
from vqscale.data.cache import Cache, RemoteTar
from vqscale.data.images import ImageReader
from vqscale.data.loader import Loader
from vqscale.data.sequential import sequential_batches
from vqscale.data.shards import Manifest
from vqscale.data.verify import verify_shard
from vqscale.evaluation import results
from vqscale.evaluation.inputs import DataSet
from vqscale.evaluation.results import first_of_each_class
from vqscale.stages import index
from vqscale.stages.index import IndexConfig

# Ranks are forked from the test's process, which has threads: newer Pythons warn of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
STEPS = 4  # of 12, over an epoch border


@pytest.fixture
def web(own_images: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """Serves `own_images`: five shards of 37 images."""
    monkeypatch.setattr(remote, "_PAUSE", 0.001)
    with serving(own_images) as web:
        yield web


def config(web: Web, run_dir: Path, **changes: Any) -> IndexConfig:
    source = web.url + "/{000000..000004}.tar"
    made = IndexConfig(run_dir=str(run_dir), source=source, classes_from=str(web.folder), workers=1, device="cpu")
    return replace(made, **changes)


@pytest.fixture
def indexed(web: Web, tmp_path: Path) -> Path:
    """The data set at the URLs, as `vqscale index` makes it; the requests that took are forgotten."""
    index.main(config(web, tmp_path / "run"))
    web.asked.clear()
    return tmp_path / "run" / "train"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_indexing_streams_each_shard_once_and_keeps_only_the_index(web: Web, tmp_path: Path) -> None:
    web.will["000002.tar"].extend(["503", "cut 3000", "slow"])
    index.main(config(web, tmp_path / "run", workers=2))
    assert web.downloads() == {f"{n:06d}.tar": 1 + (n == 2) for n in range(5)}  # 503 was the other one
    found, local = Manifest.load(tmp_path / "run" / "train"), Manifest.load(web.folder)
    assert found.fingerprint == local.fingerprint  # sha256 of every shard among it
    for n in range(5):
        mine, theirs = (m.index(f, n) for m, f in ((found, tmp_path / "run" / "train"), (local, web.folder)))
        assert mine.keys == theirs.keys and np.array_equal(mine.labels, theirs.labels)
        for column in ("offset", "size", "crc32"):
            assert {k: v.tolist() for k, v in getattr(mine, column).items()} == {
                k: v.tolist() for k, v in getattr(theirs, column).items()
            }
    assert list((tmp_path / "run").rglob("*.tar")) == [] and found.shards[3].name == f"{web.url}/000003.tar"
    web.asked.clear()
    index.main(config(web, tmp_path / "run"))
    assert web.asked == []


def test_what_cannot_be_indexed_is_named(web: Web, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=rf"{web.url}/000005.tar: HTTP Error 404"):
        index.main(config(web, tmp_path / "a", source=web.url + "/{000003..000005}.tar"))
    os.truncate(web.folder / "000001.tar", 700)
    with pytest.raises(ValueError, match=rf"{web.url}/000001.tar: cut short at byte 700"):
        index.main(config(web, tmp_path / "b"))
    assert not list(tmp_path.rglob("run/*/dataset.json"))


def test_a_tar_without_end_is_given_up(
    web: Web, indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarindex, "_MAX_PADDING", 10**6)
    web.will["000001.tar"].extend(["endless"] * 2)
    with pytest.raises(ValueError, match=rf"{web.url}/000001.tar: zeros without end after the end mark at byte"):
        index.main(config(web, tmp_path / "run2"))
    (difference,) = verify_shard((indexed, 1, False))
    assert f"{web.url}/000001.tar: " in difference and "indexed with" in difference


def test_verify_says_per_shard_what_differs(
    web: Web, indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = config(web, tmp_path / "check", source=str(indexed.parent), verify=True)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in indexed.iterdir())
    index.main(check)
    assert "verified: 5 tars are whole" in capsys.readouterr().err and sum(web.downloads().values()) == 5
    at = Manifest.load(indexed).index(indexed, 2).offset["png"][4]
    for name, damage in (
        ("000002.tar", lambda d: d[: at + 9] + b"!" + d[at + 10 :]),
        ("000004.tar", lambda d: d[:3000]),
    ):
        (web.folder / name).write_bytes(damage((web.folder / name).read_bytes()))
    (web.folder / "000000.tar").unlink()
    with pytest.raises(ValueError, match="5 differences in 5 tars; the first: .*000000.tar: HTTP Error 404"):
        index.main(check)
    said = capsys.readouterr().err
    key = Manifest.load(indexed).index(indexed, 2).key(4)
    assert f"000002.tar: {key}.png is damaged (crc32 differs)" in said
    assert "000004.tar: ends at byte 3000, before " in said and said.count("sha256") == 2
    assert sorted((path.name, path.stat().st_mtime_ns) for path in indexed.iterdir()) == before


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 0), (2, 1), (4, 1)])
def test_the_same_global_batches_as_from_local_shards(
    web: Web, indexed: Path, cache: Cache, world: int, workers: int
) -> None:
    expected = rank_stream(build(web.folder), STEPS)
    assert global_stream(indexed, world, STEPS, workers=workers, cache=cache) == expected
    assert web.asked == [(name, 0) for name, _ in web.asked] and len(web.asked) == 5  # once each, for all of them


def test_ranks_share_a_cache_that_is_too_small_for_all(
    web: Web, indexed: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_RETRY_SECONDS", 0.01)
    expected = rank_stream(build(web.folder, shuffle_window=1), STEPS)
    sizes = sorted(shard.bytes for shard in Manifest.load(indexed).shards)
    small = replace(cache, limit=sum(sizes[-2:]))
    assert global_stream(indexed, 2, STEPS, workers=2, cache=small, shuffle_window=1) == expected


def test_a_run_begun_on_local_shards_goes_on_with_remote_ones(web: Web, indexed: Path, cache: Cache) -> None:
    expected = rank_stream(build(web.folder), STEPS)
    state = {**build(web.folder).state_dict(), "consumed_samples": 24}
    assert rank_stream(build(indexed, state=state, cache=cache), STEPS - 2) == expected[2:]


def test_faults_on_the_way_change_nothing(web: Web, indexed: Path, cache: Cache) -> None:
    expected = rank_stream(build(web.folder), STEPS)
    for n, words in enumerate((["cut 100", "404"], ["wrong 600"], ["500", "slow"], ["cut 0", "cut 2000"], ["slow"])):
        web.will[f"{n:06d}.tar"].extend(words)
    assert rank_stream(build(indexed, cache=cache, max_bad_fraction=0), STEPS) == expected


def test_a_shard_that_stays_away_is_counted_or_ends_the_run(
    web: Web, indexed: Path, cache: Cache, tmp_path: Path
) -> None:
    gone = 2
    (web.folder / f"{gone:06d}.tar").write_bytes(bytes(9))
    whole = build(
        web.folder.parent / "run" / "train", cache=cache, max_bad_fraction=0.4, bad_path=tmp_path / "bad.jsonl"
    )
    stream = [sample for step in rank_stream(whole, 3) for sample in step]
    _, shards, _ = whole.dataset.order.locate(np.arange(36))
    assert [sample[3] for sample in stream] == np.where(shards == gone, 2, 0).tolist() and (shards == gone).any()
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {line["shard"] for line in lines} == {f"{web.url}/000002.tar"} and len(lines) == (shards == gone).sum()
    assert "damaged, or another file" in lines[0]["error"]
    strict = build(indexed, cache=cache, max_bad_fraction=0)
    strict.advance()
    with pytest.raises(ValueError, match=r"13 of 12 samples could not be used \(decode 0, io 13"):
        strict.count_bad({"io": 13})


def wait_for(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def remote_tars(loader: Loader) -> list[RemoteTar]:
    return [tar for tar in loader.dataset.files.tars if isinstance(tar, RemoteTar)]


def test_the_next_window_is_fetched_while_this_one_is_read(web: Web, indexed: Path, cache: Cache) -> None:
    loader = build(indexed, cache=cache, shuffle_window=1, global_batch=1)
    order = [int(loader.dataset.order.window_shards(0, ahead)[1][0]) for ahead in range(3)]
    loader.dataset[0]
    wait_for(lambda: remote_tars(loader)[order[1]]._copy.exists())
    time.sleep(0.1)
    assert sorted(web.downloads()) == sorted(f"{n:06d}.tar" for n in order[:2])


def test_windows_in_use_are_not_evicted_and_old_ones_are(
    web: Web, indexed: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two windows exactly: two epochs are read, and at no time is there more on the disk."""
    monkeypatch.setattr(parts, "_RETRY_SECONDS", 0.01)
    sizes = sorted(shard.bytes for shard in Manifest.load(indexed).shards)
    small = replace(cache, limit=sum(sizes[-2:]))
    loader = build(indexed, cache=small, shuffle_window=1, global_batch=1)
    most = 0
    for position in range(74):
        assert loader.dataset[position]["bad"].tolist() == [0]
        number, (now,) = loader.dataset.order.window_shards(position)
        following = int(loader.dataset.order.window_shards(position, 1)[1][0])
        wait_for(lambda n=following: remote_tars(loader)[n]._copy.exists())
        assert remote_tars(loader)[int(now)]._copy.exists()
        most = max(most, sum(path.stat().st_size for path in small.shards.glob("*.[pt]a*")))
    assert sizes[-1] < most <= small.limit
    with pytest.raises(ValueError, match=r"does not hold two windows of this data set: 4 shards"):
        build(indexed, cache=small, shuffle_window=2)


def test_evaluation_reads_remote_shards_too(web: Web, indexed: Path, cache: Cache) -> None:
    def pixels(folder: Path) -> list[Any]:
        batches = sequential_batches(folder, read=ImageReader(12), batch=5, cache=cache)
        return [batch["image"].tolist() for batch in batches]

    assert pixels(indexed) == pixels(web.folder)
    shown = [
        first_of_each_class(DataSet("x", f, Manifest.load(f), cache=cache), 12, per_class=1, most_classes=3)
        for f in (indexed, web.folder)
    ]
    for none in ({"per_class": 0, "most_classes": 3}, {"per_class": 3, "most_classes": 0}):
        assert first_of_each_class(DataSet("x", indexed, Manifest.load(indexed), cache=cache), 12, **none) == {}
    assert {k: [i.tolist() for i in v] for k, v in shown[0].items()} == {
        k: [i.tolist() for i in v] for k, v in shown[1].items()
    }


def test_samples_to_show_come_from_a_bounded_number_of_shards_spread_evenly(
    own_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "_MOST_SHARDS", 2)
    data = DataSet("x", own_images, Manifest.load(own_images))
    for n in (1, 2, 3):
        (own_images / f"{n:06d}.index.safetensors").unlink()  # nobody asks for these
    shown = first_of_each_class(data, 12, per_class=1, most_classes=99)
    in_them = data.images_at([*range(7), *range(26, 37)], 12)  # of the first and the last shard
    firsts = {name: image for image, name in reversed(in_them)}
    assert {name: [image.tolist()] for name, image in firsts.items()} == {
        name: [image.tolist() for image in images] for name, images in shown.items()
    }


def test_a_data_set_cannot_make_a_pipe_run(web: Web, indexed: Path, cache: Cache, tmp_path: Path) -> None:
    """`dataset.json` is data: a command in it runs only where the config allows it."""
    manifest = Manifest.load(indexed)
    command = f"pipe:touch {tmp_path / 'ran'}; cat {web.folder / '000000.tar'}"
    shards = [replace(manifest.shards[0], name=command), *manifest.shards[1:]]
    Manifest.of(manifest.kind, shards, manifest.classes).save(indexed)
    for use in (
        lambda: build(indexed, cache=cache),
        lambda: list(sequential_batches(indexed, read=ImageReader(12), batch=5, cache=cache)),
        lambda: index.main(config(web, tmp_path / "check", source=str(indexed), verify=True)),
    ):
        with pytest.raises(ValueError, match="allow_pipe=true"):
            use()
    assert verify_shard((indexed, 0, False)) != [] and not (tmp_path / "ran").exists()
    expected = rank_stream(build(web.folder), 1)
    assert rank_stream(build(indexed, cache=replace(cache, allow_pipe=True)), 1) == expected
    assert (tmp_path / "ran").exists() and verify_shard((indexed, 0, True)) == []


def test_a_data_set_cannot_name_files_outside_the_cache(web: Web, indexed: Path, cache: Cache, tmp_path: Path) -> None:
    manifest = Manifest.load(indexed)
    shards = [replace(shard, sha256=f"../outside-{n}") for n, shard in enumerate(manifest.shards)]
    Manifest.of(manifest.kind, shards, manifest.classes).save(indexed)
    with pytest.raises(ValueError, match="'../outside-0' is not a sha256"):
        build(indexed, cache=cache)
    assert web.asked == [] and not list(tmp_path.glob("outside*"))


def test_handles_of_a_forgotten_reader_are_closed(images: Path) -> None:
    """Every evaluation makes a new one."""
    gc.collect()  # what earlier tests left in cycles
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        list(sequential_batches(images, read=ImageReader(12), batch=5))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_note_of_a_failure_is_shared(web: Web, indexed: Path, cache: Cache) -> None:
    """Another rank's failure a moment ago counts: nobody waits for the same retries again."""
    (web.folder / "000000.tar").unlink()
    first, second = (build(indexed, cache=cache) for _ in range(2))
    for loader in (first, second):
        with pytest.raises(OSError, match="404"):
            remote_tars(loader)[0].open()
    assert len(web.asked) == 5 and cache_module._RETRY_AFTER_SECONDS > 1
