"""Stop requests: a signal or a STOP file asks a run to save and end, and its ranks agree on it.

In: signals to any rank, a file STOP in the run directory.  Out: `Leave` out of unfinished work, `Stopped` out of the
run, on all ranks alike; in training, which must not wait, an answer one step late.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vqscale.topology import Topology

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
_MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)  # by `nohup`, and in a script's background
EXIT_UNFINISHED = 75  # of a program that was stopped: saved, and has more to do
STOP_FILE_SECONDS = 1.0  # a run looks for its STOP file at most this often


class Stopped(Exception):
    """The run saved its progress and ended early because it was asked to."""


class Leave(Exception):
    """Work is left early because the run was asked to stop."""


@contextlib.contextmanager
def handling(numbers: Sequence[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, these signals call `handler`."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


class Stoppable:
    """What asks a run to stop, and the ways in which its work can notice.

    Each question counts as progress for the watchdog: ask it after a piece of work.
    """

    def __init__(self, run_dir: Path, topology: Topology, on_progress: Callable[[], None]):
        self.run_dir = run_dir
        self.topology = topology
        self._stop_reason = ""
        self._stop_file_checked = 0.0
        self._on_progress = on_progress

    def signals_caught(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the signals of `SIGNALS` are stop requests, save those that the program was started to ignore."""
        return handling([number for number in SIGNALS if not _is_ignored(number)], self._on_signal)

    def _on_signal(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self._stop_reason:
            raise KeyboardInterrupt
        self._stop_reason = self._stop_reason or signal.Signals(number).name

    def stop_requested(self) -> str:
        """Why this rank was asked to stop (a signal's name, or "STOP file"), or "".

        Ranks can differ: agree with `stop_agreed` before acting in a job of several ranks.
        """
        self._on_progress()
        now = time.monotonic()
        if not self._stop_reason and now - self._stop_file_checked > STOP_FILE_SECONDS:
            self._stop_file_checked = now
            if (self.run_dir / "STOP").exists():
                self._stop_reason = "STOP file"
        return self._stop_reason

    def stop_agreed(self) -> str:
        """The first reason of any rank, the same on all ranks; "" when none was asked. Collective."""
        return self.topology.first_text(self.stop_requested())

    def stop(self, reason: str) -> None:
        """End the run as stopped: removes the STOP file and raises Stopped."""
        if self.topology.is_main:
            with contextlib.suppress(OSError):  # none, or a folder
                (self.run_dir / "STOP").unlink()
        raise Stopped(reason)

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Around work that ranks share without talking to each other: `poll` inside leaves it, and then all ranks stop
        together. Collective."""
        try:
            yield
        except Leave:
            pass
        if reason := self.stop_agreed():
            self.stop(reason)

    def poll(self) -> None:
        """Inside `stoppable`: leave if this rank was asked to stop; the STOP file tells the other ranks."""
        if self.stop_requested():
            with contextlib.suppress(OSError):
                (self.run_dir / "STOP").touch()
            raise Leave

    def poll_signals(self) -> None:
        """Before the first step, with nothing to save: leave on a signal; a STOP file can wait for the step."""
        self._on_progress()
        if self._stop_reason:
            raise Leave

    def poll_together(self) -> None:
        """Between two parts of the same work of all ranks: all of them leave it if any was asked to stop."""
        if self.stop_agreed():
            raise Leave


def _is_ignored(number: signal.Signals) -> bool:
    """torchrun passes on its own signals, even those that its ranks were told to ignore, and waits for their end."""
    from_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return number in _MAY_BE_IGNORED and signal.getsignal(number) == signal.SIG_IGN and not from_torchrun


class Agreement:
    """Stop requests, and counts by name, summed over ranks once per step on the control group, without a wait."""

    def __init__(self, topology: Topology, names: Sequence[str]):
        self._topology = topology
        self._names = names
        self._pending: Any = None
        self._values = torch.zeros(1 + len(names), dtype=torch.int64)

    def exchange(self, stop: bool, counts: Tensor) -> tuple[bool, dict[str, int]]:
        """Post this step's values; returns the previous step's, the same on all ranks. counts: int64 [names]."""
        previous = self.collect()
        self._values = torch.cat([torch.tensor([int(stop)]), counts])
        if self._topology.world_size > 1:
            self._pending = dist.all_reduce(self._values, group=self._topology.control, async_op=True)
        return previous

    def collect(self) -> tuple[bool, dict[str, int]]:
        """Wait for what was posted; afterwards nothing is pending. Counts of zero are left out."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        stop, *counts = self._values.tolist()
        self._values = torch.zeros_like(self._values)
        return bool(stop), {name: count for name, count in zip(self._names, counts, strict=True) if count}
