"""The check of the shards: each looked at by one rank, errors on all, few calls before the first step."""

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.file_calls import FileCalls, counted
from support.many_shards import FACTS, SAMPLES, make_many_shards, pretending

from vqscale.data import shardcheck
from vqscale.data.codes import CodeReader
from vqscale.data.images import ImageReader
from vqscale.data.loader import Loader, build_loader
from vqscale.data.shards import Manifest

BUDGET = 2000  # file-system calls of a rank before the first step


class Together:
    """A gather over threads that stand for ranks."""

    def __init__(self, ranks: int):
        self.values: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=30)

    def of(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            return list(self.values)

        return gather


def on_all_ranks(folder: Path, ranks: int = 2, **options: Any) -> list[Any]:
    """The loader of each rank, or the error."""
    together = Together(ranks)

    def build(rank: int) -> Any:
        try:
            return loader_of(folder, rank=rank, world_size=ranks, gather=together.of(rank), **options)
        except (OSError, ValueError) as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(build, range(ranks)))


def loader_of(folder: Path, **options: Any) -> Loader:
    return build_loader(folder, read=ImageReader(12), **{"global_batch": 8, "shuffle_window": 2, **options})


def test_every_shard_is_looked_at_by_one_rank(images: Path) -> None:
    with counted(images) as calls:
        alone = on_all_ranks(images, 1)
    with counted(images) as shared:
        ranks = on_all_ranks(images, 2)
    assert all(isinstance(loader, Loader) for loader in alone + ranks)
    assert (calls.of("stat"), shared.of("stat")) == (5 + 1, 5 + 2)  # five tars, and each rank's dataset.json


def test_an_error_of_one_rank_is_raised_on_all(own_images: Path, caplog: pytest.LogCaptureFixture) -> None:
    (own_images / "000004.tar").unlink()
    errors = on_all_ranks(own_images, 4)
    assert {type(error) for error in errors} == {FileNotFoundError} and len({str(error) for error in errors}) == 1
    assert "000004.tar is missing" in str(errors[0])
    (own_images / "000001.tar").unlink()
    assert {str(error) for error in on_all_ranks(own_images, 4)} <= {
        f"shard {own_images / name} is missing; {own_images} lists it with {size} samples"
        for name, size in (("000004.tar", 11), ("000001.tar", 1))
    }
    assert "000001.tar is missing" in caplog.text and "000004.tar is missing" in caplog.text + str(errors[0])


def test_samples_lost_on_several_ranks_are_added_up(own_images: Path) -> None:
    for name in ("000002.tar", "000004.tar"):
        os.truncate(own_images / name, 5000)
    loaders = on_all_ranks(own_images, 2, max_bad_fraction=0.9)
    lost = {loader.check._lost for loader in loaders}
    assert len(lost) == 1
    one_less = (lost.pop() - 1) / 37
    errors = on_all_ranks(own_images, 2, max_bad_fraction=one_less)
    assert all("is cut short: 5000 of" in str(error) for error in errors) and len({str(e) for e in errors}) == 1


def test_what_is_not_needed_at_the_start_is_looked_at_beside_the_training(
    own_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shardcheck, "AT_START", 1)
    monkeypatch.setattr(shardcheck, "PAUSE", 0.0)
    read_last = int(loader_of(own_images, shuffle_window=1).dataset.order.shards_from(0)[-1])
    (own_images / f"{read_last:06d}.tar").unlink()
    loader = loader_of(own_images, shuffle_window=1, global_batch=1, max_bad_fraction=1.0)
    with pytest.raises(FileNotFoundError, match=f"{read_last:06d}.tar is missing"):
        for batch in itertools.islice(loader, 1000):
            assert not batch["bad"].any()
            loader.check._rest or threading.Event().wait(0.01)  # type: ignore[union-attr]
    assert loader.check is not None and not loader.check._rest


def test_the_order_of_the_check_is_that_of_reading(images: Path) -> None:
    order = loader_of(images, shuffle_window=2).dataset.order
    for position in (0, 20, 36, 40, 3 * 37 + 30):
        window = order.window_shards(position)[1].tolist()
        numbers = order.shards_from(position).tolist()
        assert numbers[: len(window)] == window and sorted(numbers) == list(range(5))
        following = order.window_shards(position, 1)
        if following[0] % 3:  # of the same epoch
            assert numbers[len(window) : len(window) + len(following[1])] == following[1].tolist()


def calls_before_step_1(folder: Path, rank: int, ranks: int, workers: int) -> FileCalls:
    """What a trainer's rank asks of the data set's folder until its first batch is there."""
    with pretending(folder), counted(folder) as calls:
        manifest = Manifest.load(folder)
        reader = CodeReader(manifest.extra["levels"], num_codes=FACTS["num_codes"])
        options = {"rank": rank, "world_size": ranks, "workers": workers}
        loader = build_loader(
            folder, read=reader, global_batch=8 * ranks, shuffle_window=64, gather=lambda value: [value], **options
        )
        stream = iter(loader)
        batch = next(stream)
        stream.close()
    assert len(batch["label"]) == 8 and not batch["bad"].any()
    return calls


@pytest.mark.parametrize("workers", [0, 4])
def test_no_rank_of_1024_makes_more_than_2000_calls_before_step_1_with_half_a_million_shards(
    tmp_path: Path, workers: int
) -> None:
    folder = tmp_path / "many"
    make_many_shards(folder, count := 500_000, window=64, ahead=1024 * 8 // (64 * SAMPLES) + 40)
    for rank in (0, 1023):
        calls = calls_before_step_1(folder, rank, 1024, workers)
        assert count // 1024 < calls.total < BUDGET, calls.by_kind()
