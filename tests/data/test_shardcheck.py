"""The check of the shards: each looked at by one rank, errors on all, few calls before the first step."""

import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest
from support.file_calls import counted
from support.many_shards import calls_before_step_1, calls_of_an_evaluation, make_many_shards
from support.ranks import on_ranks

from vqscale.data import shardcheck
from vqscale.data.images import ImageReader
from vqscale.data.loader import Loader, build_loader
from vqscale.topology import Topology

BUDGET = 2000  # file-system calls of a rank before the first step


def on_all_ranks(folder: Path, ranks: int = 2, **options: Any) -> list[Any]:
    """The loader of each rank, or the error."""

    def build(topology: Topology) -> Loader:
        return loader_of(folder, rank=topology.rank, world_size=ranks, gather=topology.gather, **options)

    return on_ranks(ranks, build)


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
    assert (check := loader.check) is not None
    with pytest.raises(FileNotFoundError, match=f"{read_last:06d}.tar is missing"):
        for batch in itertools.islice(loader, 1000):
            assert not batch["bad"].any()
            if not check._rest:
                time.sleep(0.01)  # for what was found last
    assert not check._rest


def test_the_order_of_the_check_is_that_of_reading(images: Path) -> None:
    order = loader_of(images, shuffle_window=2).dataset.order
    for position in (0, 20, 36, 40, 3 * 37 + 30):
        window = order.window_shards(position)[1].tolist()
        numbers = order.shards_from(position).tolist()
        assert numbers[: len(window)] == window and sorted(numbers) == list(range(5))
        following = order.window_shards(position, 1)
        if following[0] % 3:  # of the same epoch
            assert numbers[len(window) : len(window) + len(following[1])] == following[1].tolist()


def test_no_rank_of_1024_makes_more_than_2000_calls_before_step_1_with_half_a_million_shards(tmp_path: Path) -> None:
    make_many_shards(folder := tmp_path / "many", count := 500_000, ranks := 1024)
    for rank, workers in ((0, 16), (ranks - 1, 0)):
        calls = calls_before_step_1(folder, rank, ranks, workers)
        assert count // ranks < calls.total < BUDGET, calls.by_kind()


def test_calls_before_step_1_do_not_grow_with_the_shards_of_other_ranks_nor_an_evaluation_s_with_any(
    tmp_path: Path,
) -> None:
    totals = []
    for count in (6_000, 12_000):
        make_many_shards(folder := tmp_path / str(count), count, ranks=64)
        calls = [measure(folder, 5, 64, 0) for measure in (calls_before_step_1, calls_of_an_evaluation)]
        totals.append([each.total for each in calls])
    grown = totals[1][0] - totals[0][0]
    assert abs(grown - 6_000 // 64) < 5 and totals[1][1] == totals[0][1] < 100, totals
