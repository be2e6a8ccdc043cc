"""What an optional part of the evaluations costs: its seconds, and their share of the run's time.

In: spans of the work.  Out: figures for metrics.jsonl, and a line of the log, for each evaluation and at the end.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

import torch

log = logging.getLogger("vqscale")


class SideWork:
    """Adds up this rank's seconds inside `timed`."""

    def __init__(self, name: str, device: torch.device):
        """name: of the part, in the log and, in lower case, in metrics.jsonl."""
        self._name, self._device = name, device
        self._seconds = self._total_seconds = self._total_time = 0.0

    def start(self) -> None:
        """Training begins, or goes on."""
        self._started = time.monotonic()

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around a piece of the work, on a GPU until it is done."""
        started = self._now()
        yield
        self._seconds += self._now() - started

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.monotonic()

    def figures(self) -> dict[str, float]:
        """Of the work of one evaluation, now done: its seconds, and their share of the time since the last one."""
        now, seconds = time.monotonic(), self._seconds
        fraction = seconds / (now - self._started)
        self._total_seconds += seconds
        self._total_time += now - self._started
        self._seconds, self._started = 0.0, now
        log.info("%s: %.1f s, %.1f %% of the training time since the last one", self._name, seconds, 100 * fraction)
        return {f"{self._name.lower()}_seconds": seconds, f"{self._name.lower()}_fraction": fraction}

    def log_total(self) -> None:
        """Of all evaluations since `start`."""
        if self._total_time:
            share = 100 * self._total_seconds / self._total_time
            log.info("%s total: %.1f s, %.1f %% of the training time", self._name, self._total_seconds, share)
