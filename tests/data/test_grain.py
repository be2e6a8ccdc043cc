"""grain's elastic iterator, given our order, as an oracle: the same global batches at any number of ranks, and the same
one-integer state, across a change of the number of ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqscale.data.loader import build_loader
from vqscale.data.order import ShuffleOrder
from vqscale.data.shards import Manifest

grain = pytest.importorskip("grain")
GLOBAL_BATCH = 12


class Ordered:
    """Our order as grain's random access source: the (position, label) of three epochs."""

    def __init__(self, folder: Path):
        sizes = [shard.num_samples for shard in Manifest.load(folder).shards]
        self._order, self._first = ShuffleOrder(sizes, seed=5, window=2), np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return 3 * self._order.num_samples

    def __getitem__(self, position: int) -> np.ndarray:
        _, shards, rows = self._order.locate(np.array([position]))
        return np.array([position, (self._first[shards[0]] + rows[0]) % 10])  # the images' labels, as they were packed


def grain_batches(source: Ordered, world: int, steps: int, state: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """`steps` global batches from `state` on, and the state after them."""
    data = grain.MapDataset.source(source)
    ranks = [
        grain.experimental.ElasticIterator(data, GLOBAL_BATCH, grain.sharding.ShardOptions(rank, world))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.set_state(state)
    batches = [sorted(tuple(map(int, s)) for rank in ranks for s in next(rank)) for _ in range(steps)]
    states = [rank.get_state() for rank in ranks]
    assert all(each == states[0] for each in states)
    return batches, states[0]


def our_batches(folder: Path, world: int, steps: int, consumed: int) -> tuple[list[Any], int]:
    loaders = [
        build_loader(
            folder,
            read=lambda parts, label, position: {},
            global_batch=GLOBAL_BATCH,
            seed=5,
            shuffle_window=2,
            rank=rank,
            world_size=world,
            workers=0,
        )
        for rank in range(world)
    ]
    for loader in loaders:
        loader.load_state_dict(loader.state_dict() | {"consumed_samples": consumed})
    streams, batches = [iter(loader) for loader in loaders], []
    for _ in range(steps):
        parts = [next(stream) for stream in streams]
        batches.append(sorted((int(p), int(c)) for b in parts for p, c in zip(b["position"], b["label"], strict=True)))
        for loader in loaders:
            loader.advance()
    return batches, loaders[0].state_dict()["consumed_samples"]


@pytest.mark.parametrize("worlds", [(1, 2), (2, 4), (4, 1)])
def test_grain_agrees_across_a_change_of_ranks(images: Path, worlds: tuple[int, int]) -> None:
    before, after = worlds
    source = Ordered(images)
    first, state = grain_batches(source, before, 4, {"global_next_index": 0})
    second, end = grain_batches(source, after, 4, state)
    ours_first, consumed = our_batches(images, before, 4, 0)
    ours_second, ours_end = our_batches(images, after, 4, consumed)
    assert first + second == ours_first + ours_second
    assert (state["global_next_index"], end["global_next_index"]) == (consumed, ours_end) == (48, 96)
