"""Which rank the others wait for, by each rank's own work per step.

In: spans of work that need no other rank: waiting for data, and forward passes.  Out: at each line of metrics.jsonl the
slowest rank and by how much it is slower than the median, and one warning when that lasts.

A whole step cannot tell: every rank's step lasts as long as the slowest one's, because they meet in collectives.  A
forward under single, DDP, ZeRO-1 and ZeRO-2 has no collectives.  FSDP and HSDP gather weights before each unit, ZeRO-3
before each layer, so these are timed there, from after the gathering.
"""

import contextlib
import logging
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from vqscale.engine.parallel import SHARDED
from vqscale.topology import Topology

log = logging.getLogger("vqscale")
SLOW = 0.2  # a lag that is worth a warning
LINES = 3  # in a row, of the same rank


class OwnWork:
    """Times this rank's forward passes."""

    def __init__(self, module: nn.Module, topology: Topology, *, micro_batches: int):
        """module: sharded already. micro_batches: per step."""
        self._micro_batches = micro_batches
        self._forward = _Timer(topology.device)
        self._timers = []
        for part in _gathered_at_once(module, topology.strategy):
            self._timers.append(timer := _Timer(topology.device))
            part.register_forward_pre_hook(timer.start)  # after the strategy's own, so after its gathering
            part.register_forward_hook(timer.stop)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass."""
        self._forward.start()
        yield
        self._forward.stop()

    def seconds_per_step(self, data_wait: float) -> float:
        """This rank's own work since the last call. data_wait: seconds per step."""
        timers = self._timers or [self._forward]
        return data_wait + self._micro_batches * sum(timer.take() for timer in timers)


def _gathered_at_once(module: nn.Module, strategy: str) -> list[nn.Module]:
    """The parts of a model whose forward has no collective once it has begun; none where that is the whole model."""
    if strategy in SHARDED:
        return list(module.wrap_units()) or [module]  # type: ignore[operator]
    if strategy == "zero3":
        return [part for part in module.modules() if _has_weights(part) and not any(map(_has_weights, part.children()))]
    return []


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


class _Timer:
    """The mean length of spans. On a GPU two events time a span. They are read when a later span begins, so that the
    host never waits; spans in between are not timed."""

    def __init__(self, device: torch.device):
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._pending = False  # both events are recorded, and not read
        self._began, self._spans = 0.0, [0.0, 0]  # their seconds, their count

    @torch.compiler.disable  # hooks of compiled units must not become part of their graphs
    def start(self, *_: Any) -> None:
        self._began = time.perf_counter()
        if self._events and (not self._pending or self._events[1].query()):
            if self._pending:
                self._count(self._events[0].elapsed_time(self._events[1]) / 1000)
            self._pending = False
            self._events[0].record()

    @torch.compiler.disable
    def stop(self, *_: Any) -> None:
        if not self._events:
            self._count(time.perf_counter() - self._began)
        elif not self._pending:
            self._events[1].record()
            self._pending = True

    def _count(self, seconds: float) -> None:
        self._spans = [self._spans[0] + seconds, self._spans[1] + 1]

    def take(self) -> float:
        """Seconds per span since the last call; 0 if there was none."""
        (seconds, count), self._spans = self._spans, [0.0, 0]
        return seconds / max(1, count)


class SlowestRank:
    """Compares ranks at each log line, and warns once of each one that stays slow."""

    def __init__(self, topology: Topology):
        """Collective."""
        self._hosts = topology.gather(socket.gethostname())
        self._slow, self._lines = -1, 0
        self._warned: set[int] = set()

    def compare(self, seconds: Sequence[float]) -> dict[str, float]:
        """seconds: own work per step, by rank. Returns `slowest_rank`, and `slowest_rank_lag`: how much longer it works
        than the median rank, as a share of that; nothing for one rank, or where nothing was timed."""
        median = statistics.median(seconds)
        if len(seconds) < 2 or not median > 0:
            return {}
        rank = max(range(len(seconds)), key=lambda rank: seconds[rank])
        lag = seconds[rank] / median - 1
        self._lines = (self._lines + 1 if rank == self._slow else 1) if lag > SLOW else 0
        self._slow = rank
        if self._lines >= LINES and rank not in self._warned:
            self._warned.add(rank)
            log.warning(
                "rank %d on %s is slow: in %d log lines in a row its own work took over %.0f %% longer than the median "
                "rank's, now %.0f %%; the others wait for it",
                *(rank, self._hosts[rank], LINES, 100 * SLOW, 100 * lag),
            )
        return {"slowest_rank": rank, "slowest_rank_lag": lag}
