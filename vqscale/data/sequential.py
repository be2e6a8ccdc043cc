"""Shards -> batches that visit every sample once, in stored order: evaluation and extraction.

In: a data set and a `read`.  Out: batches as in training plus `weight`: 1 for a sample that counts, 0 for padding or a
sample that could not be read, so that weighted sums are exact at any number of ranks.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vqscale.batch import Batch
from vqscale.data.cache import Cache
from vqscale.data.loader import Read, TarDataset


@dataclass(frozen=True)
class SequentialBatches:
    """Batches at fixed lists of positions (-1 = padding); can be iterated more than once."""

    dataset: TarDataset
    positions: Sequence[list[int]]
    workers: int
    bad_path: Path | None = None
    pin_memory: bool = False

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Generator[Batch, None, None]:
        return self.dataset.batches(self.positions, self.bad_path, self.workers, self.pin_memory)


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
    step = batch * world_size
    positions = [_padded(first + rank * batch, batch, total) for first in range(0, total, step)]
    return SequentialBatches(dataset, positions, workers, bad_path)


def read_runs(
    folder: str | Path,
    runs: Sequence[range],
    *,
    read: Read,
    block: int,
    workers: int = 0,
    bad_path: Path | None = None,
    cache: Cache | None = None,
    pin_memory: bool = False,
) -> SequentialBatches:
    """Runs of consecutive positions in fixed blocks; each run's last block is padded with weight 0.

    So a sample is in the same batch at any world size. `position` counts samples over the whole data set in stored
    order.
    """
    blocks = [_padded(first, block, run.stop) for run in runs for first in range(run.start, run.stop, block)]
    dataset = TarDataset(folder, read, weighted=True, cache=cache)
    return SequentialBatches(dataset, blocks, workers, bad_path, pin_memory)


def _padded(first: int, size: int, stop: int) -> list[int]:
    """`size` positions from `first` on; -1 from `stop` on."""
    return [position if position < stop else -1 for position in range(first, first + size)]
