"""The same global batches at any number of ranks, workers and micro-batches, from any position; nothing lost unseen."""

import gc
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.streams import build, global_stream, rank_stream, reader

from vqscale.data.images import ImageReader
from vqscale.data.parts import OpenFiles
from vqscale.data.shards import Manifest

# Ranks are forked from the test's process, which has threads: newer Pythons warn of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
SAMPLES, STEPS = 37, 7  # 7 steps of 12: over two epoch borders


@pytest.fixture(scope="module")
def expected(images: Path) -> list[list[tuple[str, int, int, int]]]:
    return rank_stream(build(images), STEPS)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_topology_does_not_change_global_batches(images: Path, expected: Any, world: int, workers: int) -> None:
    assert global_stream(images, world, STEPS, workers=workers) == expected


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 4), (1, 5), (2, 3), (2, 4), (4, 2)])
def test_accumulation_does_not_change_global_batches(images: Path, expected: Any, world: int, micro: int) -> None:
    assert global_stream(images, world, 3, micro_batch=micro) == expected[:3]


def test_the_stream_is_what_it_should_be(expected: Any) -> None:
    flat = [sample for step in expected for sample in step]
    assert [sample[2] for sample in flat] == list(range(12 * STEPS))
    assert all(sample[3] == 0 for sample in flat)
    assert np.bincount([sample[1] for sample in flat[:37]], minlength=10).tolist() == [4] * 7 + [3] * 3
    assert len({sample[0] for sample in flat}) > 0.95 * len(flat)  # augmentation differs between epochs


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_types(images: Path, workers: int) -> None:
    loader = build(images, micro_batch=5, workers=workers)
    batch = next(iter(loader))
    assert (loader.local_batch, loader.micro_batch, loader.micro_batches_per_step) == (12, 4, 3)
    kinds = {"image": torch.uint8, "label": torch.int64, "position": torch.int64, "bad": torch.uint8}
    assert {name: value.dtype for name, value in batch.items()} == kinds


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("steps_done", [1, 4])
def test_resume_at_another_number_of_ranks(images: Path, expected: Any, steps_done: int, world: int) -> None:
    """Reading ahead does not move the state; the state read by JSON continues exactly."""
    first = build(images, workers=1)
    batches = iter(first)
    for _ in range(steps_done):
        next(batches)
        first.advance()
    batches.close()
    state = json.loads(json.dumps(first.state_dict()))
    assert state["consumed_samples"] == 12 * steps_done
    rest = global_stream(images, world, STEPS - steps_done, state=state, workers=1)
    assert rest == expected[steps_done:]


def test_a_start_far_away_is_instant(images: Path) -> None:
    state = {**build(images).state_dict(), "consumed_samples": 24_000_000_000}
    began = time.perf_counter()
    batch = next(iter(build(images, state=state)))
    assert batch["position"][0] == 24_000_000_000 and time.perf_counter() - began < 2


@pytest.mark.parametrize(
    "change", [{"dataset": "sha256:0"}, {"seed": 6}, {"shuffle_window": 3}, {"order": "feistel-v2"}, {"version": 2}]
)
def test_a_foreign_state_is_refused(images: Path, change: dict[str, Any]) -> None:
    state = {**build(images).state_dict(), **change}
    with pytest.raises(ValueError, match=f"{next(iter(change))}={next(iter(change.values()))}"):
        build(images, state=state)


def test_state_is_as_documented(images: Path) -> None:
    assert build(images).state_dict() == {
        "version": 1,
        "order": "feistel-v1",
        "seed": 5,
        "consumed_samples": 0,
        "shuffle_window": 2,
        "dataset": Manifest.load(images).fingerprint,
        "num_samples": 37,
        "bad_samples": {"decode": 0, "io": 0, "crc": 0},
    }


def test_a_global_batch_that_does_not_fit_is_refused(images: Path) -> None:
    with pytest.raises(ValueError, match="global_batch=12 is not divisible by 5 ranks; 10 or 15"):
        build(images, world_size=5)


def test_nothing_draws_from_the_global_generator(images: Path) -> None:
    before = torch.get_rng_state()
    next(iter(build(images, workers=1)))
    assert torch.equal(before, torch.get_rng_state())


# --- bad samples ------------------------------------------------------------------------------------------------------


def damage(folder: Path) -> dict[tuple[int, int], int]:
    """Three kinds of damage; {(shard, row): expected flag}."""
    manifest = Manifest.load(folder)
    index = manifest.index(folder, 2)
    tar = folder / "000002.tar"
    data = bytearray(tar.read_bytes())
    data[int(index.offset["png"][4]) + 30] ^= 4  # a flipped bit
    tar.write_bytes(data)
    short = manifest.index(folder, 4)
    os.truncate(folder / "000004.tar", int(short.offset["png"][9]) + 10)  # rows 9 and 10 are cut off
    return {(2, 4): 3, (4, 9): 2, (4, 10): 2}


class Picky(ImageReader):
    """Refuses one picture, as a decoder would."""

    def __call__(self, parts: Any, label: int, position: int) -> Any:
        if hashlib.sha256(bytes(parts["png"])).hexdigest() == self.refused:
            raise ValueError("does not decode")
        return super().__call__(parts, label, position)

    refused = ""


def picky(folder: Path) -> Picky:
    index = Manifest.load(folder).index(folder, 0)
    data = (folder / "000000.tar").read_bytes()
    offset, size = int(index.offset["png"][3]), int(index.size["png"][3])
    read = Picky(12, flip=True, crop="random", seed=9)
    read.refused = hashlib.sha256(data[offset : offset + size]).hexdigest()
    return read


def test_bad_samples_are_flagged_named_and_replaced_alike_everywhere(own_images: Path, tmp_path: Path) -> None:
    whole = rank_stream(build(own_images), 4)
    flags = {**damage(own_images), (0, 3): 1}
    options = {"read": picky(own_images), "max_bad_fraction": 0.2}
    first = build(own_images, bad_path=tmp_path / "bad.jsonl", **options)
    stream = [sample for step in rank_stream(first, 4) for sample in step]
    _, shards, rows = first.dataset.order.locate(np.arange(48))
    assert [s[3] for s in stream] == [flags.get(row, 0) for row in zip(shards.tolist(), rows.tolist(), strict=True)]
    for sample, good in zip(stream, (s for step in whole for s in step), strict=True):
        assert (sample == good) == (sample[3] == 0)
    named = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {(line["position"], line["kind"]) for line in named} == {
        (s[2], ("decode", "io", "crc")[s[3] - 1]) for s in stream if s[3]
    }
    damaged = [(Path(line["shard"]).name, line["key"].split("/")[1]) for line in named if line["kind"] == "crc"]
    assert set(damaged) == {("000002.tar", "0012")}
    for world, workers in ((2, 0), (4, 1)):
        again = global_stream(own_images, world, 4, workers=workers, **options)
        assert [sample for step in again for sample in step] == stream


def test_the_budget(own_images: Path) -> None:
    loader = build(own_images, max_bad_fraction=0.05, bad_path=Path("bad.jsonl"))  # 1.85 of 37
    loader.advance()
    loader.count_bad({"decode": 1, "io": 0, "crc": 0})
    loader.advance()
    with pytest.raises(ValueError, match=r"2 of 24 samples .*decode 1, io 0, crc 1.*more than the 1 .*bad.jsonl"):
        loader.count_bad({"decode": 0, "io": 0, "crc": 1})
    assert loader.state_dict()["bad_samples"] == {"decode": 1, "io": 0, "crc": 1}


def test_the_budget_of_one_per_epoch(own_images: Path) -> None:
    lenient = build(own_images, max_bad_fraction=0.001)
    lenient.count_bad({"decode": 1})
    for _ in range(4):
        lenient.advance()
    lenient.count_bad({"decode": 1})  # again, early in the second epoch
    with pytest.raises(ValueError, match="3 of 48"):
        lenient.count_bad({"crc": 1})
    with pytest.raises(ValueError, match="1 of 0"):
        build(own_images, max_bad_fraction=0).count_bad({"decode": 1})


def test_shards_that_are_not_what_was_indexed(own_images: Path) -> None:
    whole = (own_images / "000004.tar").read_bytes()
    os.truncate(own_images / "000004.tar", 5000)
    with pytest.raises(ValueError, match=rf"000004.tar is cut short: 5000 of {len(whole)} bytes; \d+ samples are lost"):
        build(own_images)
    (own_images / "000004.tar").write_bytes(whole + bytes(512))
    with pytest.raises(ValueError, match="000004.tar has .* another file"):
        build(own_images)
    (own_images / "000004.tar").unlink()
    with pytest.raises(FileNotFoundError, match="000004.tar is missing; .* 11 samples"):
        build(own_images)


def test_bad_samples_are_logged_where_their_list_cannot_be_written(
    own_images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(own_images)
    loader = build(own_images, global_batch=37, bad_path=tmp_path / "missing" / "bad.jsonl", max_bad_fraction=0.2)
    assert sorted(next(iter(loader))["bad"].tolist())[-3:] == [2, 2, 3]
    assert "bad.jsonl cannot be written (No such file or directory)" in caplog.text and '"kind": "crc"' in caplog.text


def test_when_nothing_can_be_read_it_says_so(own_images: Path) -> None:
    loader = build(own_images, read=lambda *_: (_ for _ in ()).throw(ValueError("never decodes")))
    with pytest.raises(OSError, match="none of 64 samples drawn.*never decodes"):
        next(iter(loader))


# --- how it reads -----------------------------------------------------------------------------------------------------


def test_handles_are_opened_by_the_process_that_reads(images: Path) -> None:
    files = OpenFiles([images / "000000.tar"])
    assert len(files.read([(0, 0, 512)])[0]) == 512  # type: ignore[arg-type]
    (mine,) = files._open.values()
    pid = os.fork()
    if pid == 0:
        files.read([(0, 0, 512)])
        (theirs,) = files._open.values()
        os._exit(0 if theirs != mine else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_workers_finalize_nothing_that_they_inherit(images: Path, tmp_path: Path) -> None:
    class Left:
        """Garbage of the process that forks, which only the collector of cycles finds."""

        def __init__(self) -> None:
            self.me, self.finalized_by = self, tmp_path

        def __del__(self) -> None:
            (self.finalized_by / str(os.getpid())).touch()

    def collecting(*parts_label_position: Any) -> dict[str, Any]:
        gc.collect()
        return read(*parts_label_position)

    read = reader()
    gc.disable()
    try:
        Left()
        batches = iter(build(images, workers=2, read=collecting))
        next(batches)
        batches.close()
        assert not list(tmp_path.iterdir())
    finally:
        gc.enable()
    gc.collect()
    assert [file.name for file in tmp_path.iterdir()] == [str(os.getpid())]  # it was garbage, and is not kept


def test_slow_storage_gets_many_reads_in_flight(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread

    def slow(*arguments: int) -> bytes:
        time.sleep(0.02)
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", slow)
    files = OpenFiles([images / "000000.tar"])
    began = time.perf_counter()
    assert all(isinstance(data, bytes) for data in files.read([(0, 64 * n, 64) for n in range(96)]))
    assert time.perf_counter() - began < 96 * 0.02 / 4


def test_no_more_handles_than_a_quarter_of_what_the_process_may_have(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (8, 8))
    files = OpenFiles([images / f"{n:06d}.tar" for n in range(5)])
    for n in range(5):
        files.read([(n, 0, 10)])
        assert len(files._open) <= 3


def test_fewer_handles_than_shards(images: Path) -> None:
    files = OpenFiles([images / f"{n:06d}.tar" for n in range(5)], limit=2)
    for _ in range(3):
        for n in range(5):
            files.read([(n, 0, 10)])
            assert len(files._open) <= 3


def test_ranks_cover_each_position_once(images: Path) -> None:
    seen: list[int] = []
    for rank in range(3):
        loader = build(images, rank=rank, world_size=3, micro_batch=2)
        loader.state.consumed_samples = 24
        positions = loader.positions()
        seen += [position for _ in range(4) for position in next(positions)]
    assert sorted(seen) == list(range(24, 48))
