"""A data set of very many shards for the price of one: every shard is a copy of the same small tar.

In: how many.  Out: a folder whose description lists them all. The tars that are read first exist, as links to one
file. While `pretending` is on, `os.stat` answers for the others too: half a million files would take minutes to make.
"""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.file_calls import FileCalls, counted

from vqscale.data.codes import CodeReader, pack_codes
from vqscale.data.loader import build_loader
from vqscale.data.order import ShuffleOrder
from vqscale.data.sequential import sequential_batches
from vqscale.data.shards import Manifest, ShardWriter
from vqscale.data.shardtable import ShardTable, survey
from vqscale.data.workers import batches_ahead
from vqscale.topology import ALONE

SAMPLES = 20  # in each shard
FACTS = {"levels": {"top": [2, 2]}, "views": 1, "num_codes": 4096}


WINDOW = 64  # shards shuffled together
BATCH = 8  # samples of a rank
_ROUNDS = 4  # batches of an evaluation
_FIRST_READ = 1 + 16 * batches_ahead(16)  # batches of a rank whose tars exist: for up to 16 workers


def make_many_shards(folder: Path, count: int, ranks: int) -> None:
    """A data set of `count` shards of codes; those exist that the first batches of so many ranks are read from."""
    folder.mkdir()
    with ShardWriter(folder / "one.tar") as writer:
        for n in range(SAMPLES):
            writer.write(f"k{n:02d}", {**pack_codes({"top": np.full((1, 2, 2), n, np.uint16)}), "cls": b"0"})
    rows = np.repeat(survey(ALONE, 1, lambda _: writer.info), count)
    names = [f"{n:06d}.tar" for n in range(count)]
    table = ShardTable.of_rows(rows, names, ["one.index.safetensors"] * count)
    Manifest.of("codes", table, ["a"], {"resolution": 8}, FACTS).save(folder)
    needed = min(count, ranks * BATCH * _FIRST_READ // SAMPLES + 2 * WINDOW)
    shuffled = ShuffleOrder([SAMPLES] * count, 0, WINDOW)
    windows = [shuffled.window_shards(0, ahead)[1].tolist() for ahead in range(-(-needed // WINDOW))]
    for n in {*itertools.chain(*windows), *range(needed)}:
        os.link(folder / "one.tar", folder / f"{n:06d}.tar")


@contextlib.contextmanager
def pretending(folder: Path) -> Iterator[None]:
    """`os.stat` finds every tar of the folder. Count inside of it, so that these calls are counted."""
    stat, one = os.stat, os.stat(folder / "one.tar")

    def of_any(path, *arguments, **options):  # type: ignore[no-untyped-def]
        is_tar = isinstance(path, str | os.PathLike) and os.fspath(path).endswith(".tar")
        return one if is_tar else stat(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", of_any)
        yield


def calls_before_step_1(folder: Path, rank: int, ranks: int, workers: int) -> FileCalls:
    """What a trainer's rank asks of the data set's folder until its first batch is there."""
    with pretending(folder), counted(folder) as calls:
        loader = build_loader(
            folder,
            read=_reader(folder),
            global_batch=BATCH * ranks,
            rank=rank,
            world_size=ranks,
            shuffle_window=WINDOW,
            workers=workers,
            gather=lambda value: [value],
        )
        stream = iter(loader)
        batch = next(stream)
        if workers:
            _wait_for_read_ahead(calls, 1 + workers * batches_ahead(workers))
        stream.close()
        for thread in threading.enumerate():
            if thread.daemon:
                thread.join(5)
    assert len(batch["label"]) == BATCH and not batch["bad"].any()
    return calls


def _wait_for_read_ahead(calls: FileCalls, batches: int) -> None:
    """Until the workers have read so many batches; each sample is one positioned read."""
    give_up = time.monotonic() + 60
    while calls.of("read") < batches * BATCH:
        assert time.monotonic() < give_up, f"{calls.of('read')} reads of {batches * BATCH}"
        time.sleep(0.01)
    time.sleep(0.2)  # they also fill the page cache, in the background


def calls_of_an_evaluation(folder: Path, rank: int, ranks: int, workers: int) -> FileCalls:
    """What a rank asks of the data set's folder to read its four batches of an evaluation."""
    with pretending(folder), counted(folder) as calls:
        batches = sequential_batches(
            folder,
            read=_reader(folder),
            batch=BATCH,
            rank=rank,
            world_size=ranks,
            workers=workers,
            limit=BATCH * ranks * _ROUNDS,
        )
        for batch in batches:
            assert not batch["bad"].any()
    return calls


def _reader(folder: Path) -> CodeReader:
    """As a stage makes it: of the data set's description."""
    extra = Manifest.load(folder).extra
    return CodeReader(extra["levels"], num_codes=extra["num_codes"])
