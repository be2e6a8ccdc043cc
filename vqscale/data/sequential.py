"""Shards -> batches that visit every sample once, in stored order: evaluation and extraction.

In: a data set and a `read`.  Out: batches as in training plus `weight`: 1 for a sample that counts, 0 for padding or a
sample that could not be read, so that weighted sums are exact at any number of ranks.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vqscale.batch import Batch
from vqscale.data.cache import Cache
from vqscale.data.loader import Read, TarDataset, record_bad_samples
from vqscale.data.shards import Manifest
from vqscale.data.workers import run_workers


@dataclass(frozen=True)
class SequentialBatches:
    """Batches at fixed lists of positions (-1 = padding); can be iterated more than once."""

    dataset: TarDataset
    positions: Sequence[list[int]]
    workers: int
    bad_path: Path | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Generator[Batch, None, None]:
        with closing(run_workers(self.dataset, self.positions, workers=self.workers)) as batches:
            for batch in batches:
                record_bad_samples(batch, self.dataset, self.bad_path)
                yield batch


def sequential_batches(
    folder: str | Path,
    *,
    read: Read,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    limit: int = 0,
    bad_path: Path | None = None,
    cache: Cache | None = None,
) -> SequentialBatches:
    """Every sample (the first `limit`, if that is not 0) exactly once over all ranks, `batch` at a time.

    Every rank gets the same number of batches of the same size: the end is padded with samples of weight 0.
    """
    dataset = TarDataset(folder, read, weighted=True, cache=cache)
    total = min(len(dataset), limit) if limit else len(dataset)
    count = -(-total // (batch * world_size))
    positions = np.arange(count * world_size * batch)
    positions[total:] = -1
    mine = positions.reshape(count, world_size, batch)[:, rank]
    return SequentialBatches(dataset, mine.tolist(), workers, bad_path)


def read_shard_blocks(
    folder: str | Path,
    shards: Sequence[int],
    *,
    read: Read,
    block: int,
    workers: int = 0,
    bad_path: Path | None = None,
    cache: Cache | None = None,
) -> SequentialBatches:
    """The rows of whole shards, in order, in fixed blocks; a shard's last block is padded with weight 0.

    So a row is in the same batch at any world size. Each shard takes ceil(num_samples / block) batches; `position`
    counts samples over the whole data set in stored order.
    """
    sizes = [shard.num_samples for shard in Manifest.load(folder).shards]
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    runs = [range(starts[shard], starts[shard + 1]) for shard in shards]
    return read_runs(folder, runs, read=read, block=block, workers=workers, bad_path=bad_path, cache=cache)


def read_runs(
    folder: str | Path,
    runs: Sequence[range],
    *,
    read: Read,
    block: int,
    workers: int = 0,
    bad_path: Path | None = None,
    cache: Cache | None = None,
) -> SequentialBatches:
    """Runs of consecutive positions in fixed blocks; each run's last block is padded with weight 0."""
    blocks = []
    for run in runs:
        for first in range(run.start, run.stop, block):
            positions = np.arange(first, first + block)
            blocks.append(np.where(positions < run.stop, positions, -1).tolist())
    return SequentialBatches(TarDataset(folder, read, weighted=True, cache=cache), blocks, workers, bad_path)
