"""Ranks of one process: each is a thread with a topology of its own, whose `gather` waits for the others."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from vqscale.topology import Topology


class Together:
    """A gather over threads that stand for ranks."""

    def __init__(self, ranks: int):
        self.values: list[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=30)

    def of(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()  # else a fast rank would give its next value meanwhile
            return values

        return gather


@dataclass(frozen=True)
class ThreadRank(Topology):
    """One of the ranks."""

    together: Any = field(repr=False, default=None)

    def gather(self, value: Any) -> list[Any]:
        return self.together.of(self.rank)(value)


def on_ranks(count: int, work: Callable[[Topology], Any]) -> list[Any]:
    """What `work` gives on each of so many ranks, or its ValueError or OSError."""
    together = Together(count)

    def of_rank(rank: int) -> Any:
        try:
            return work(ThreadRank(rank, count, 0, count, 1, "ddp", torch.device("cpu"), together=together))
        except (OSError, ValueError) as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(of_rank, range(count)))
