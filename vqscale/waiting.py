"""How OpenMP's threads wait for each other: for long where the cores are free, briefly beside another busy program.

At the end of every operation the threads of GNU's OpenMP, which torch's Linux wheels have, look 300,000 times for each
other before they sleep.  Those milliseconds are well spent on free cores and ruinous on shared ones, where the thread
that is looked for cannot run (benchmarks/neighbour.py).  The number is read once, when torch is loaded, but while the
library has more threads than the process has cores, its threads look 100 times only (`gomp_managed_threads` and
`gomp_throttled_spin_count_var` in its sources).  So where the kernel lets threads of this process wait for a core, more
of them are made, and sleep; they end when the cores are free again.

In: nothing.  Out: the same results, to the bit, since every operation has its threads as before.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from vqscale.topology import cores

log = logging.getLogger("vqscale")
PERIOD = 1.0  # seconds between two looks at the kernel's figures
# Seconds of waiting for a core, of all threads, per second: beside one busy thread 0.7; on free cores 0.01. Looking for
# long pays until a neighbour is busy half of the time, and in between nothing changes.
CROWDED, FREE = 0.4, 0.2
_TASKS = Path("/proc/self/task")
_ASKED = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}  # environment variables by which a user chooses


def waited() -> dict[str, int]:
    """Nanoseconds that each thread of this process has been ready to run and had no core (Linux's schedstat)."""
    found = {}
    for task in _TASKS.iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            found[task.name] = int((task / "schedstat").read_text().split()[1])
    return found


@contextlib.contextmanager
def looking_briefly(threads: int) -> Iterator[None]:
    """Threads that wait in an operation soon sleep. `threads`: how many torch uses per operation."""
    done = threading.Event()
    teams = [_Team(threads, done) for _ in range(1 + max(0, cores() - threads) // (threads - 1))]
    for team in teams:
        team.start()
    try:
        for team in teams:
            team.there.wait()
        yield
    finally:
        done.set()
        for team in teams:
            team.join()


class _Team(threading.Thread):
    """A thread whose operations have threads of their own, which OpenMP keeps for as long as it lives."""

    def __init__(self, threads: int, done: threading.Event):
        super().__init__(name="openmp team", daemon=True)
        self.threads, self.done, self.there = threads, done, threading.Event()

    def run(self) -> None:
        try:
            torch.zeros(self.threads << 16).add_(1)  # twice as long as torch gives to one thread
        finally:
            self.there.set()
        self.done.wait()


@contextlib.contextmanager
def adapted(device: torch.device) -> Iterator[None]:
    """For as long as this lasts, threads look briefly while other programs are busy on the same cores, and for long
    otherwise. Nothing is done where the work is on a GPU or operations have one thread, where the user has chosen by
    OMP_WAIT_POLICY or GOMP_SPINCOUNT, and where the kernel does not say how long threads wait."""
    threads, done = torch.get_num_threads(), threading.Event()
    can_tell = (_TASKS / str(os.getpid()) / "schedstat").is_file()
    if device.type != "cpu" or threads == 1 or not can_tell or not _ASKED.isdisjoint(os.environ):
        yield
        return
    watcher = threading.Thread(target=_watch, args=(threads, done), name="waiting", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _watch(threads: int, done: threading.Event) -> None:
    with contextlib.ExitStack() as brief:
        crowded, before = False, waited()
        while not done.wait(PERIOD):
            now = waited()
            share = sum(spent - before.get(task, 0) for task, spent in now.items()) / (PERIOD * 1e9)
            before = now
            if not crowded and share > CROWDED:
                log.debug("threads wait %.2f s per second for a core: they look for each other briefly now", share)
                brief.enter_context(looking_briefly(threads))
            elif crowded and share < FREE:
                log.debug("cores are free again: threads look for each other for long")
                brief.close()
            else:
                continue
            crowded = not crowded
