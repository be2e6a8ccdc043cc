"""Independent jobs over processes, stopped early on request.

In: a module's function, and picklable jobs.  Out: results in the order of completion. A worker ends with the process
that started it, and ignores stop signals, which its parent handles.
"""

import contextlib
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from signal import SIG_IGN, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, signal
from typing import Any, TypeVar

from vqscale import progress
from vqscale.topology import cores

Job = TypeVar("Job")
Result = TypeVar("Result")
_POLL_SECONDS = 0.5
BEAT_SECONDS = 0.2  # a job's progress is passed on at most this often


_Beat = Callable[[], Any]
_REMEDIES = {  # by a pattern of the reason
    "AF_UNIX path too long": "TMPDIR is too long for a socket, set it to a shorter path",
    "open files|ancdata": "raise the limit of open files (ulimit -n)",
    "space left|Bus error": "free or enlarge the shared memory in /dev/shm (docker run --shm-size)",
    "exited unexpectedly": "free memory or the shared memory in /dev/shm (docker run --shm-size)",
    "allocate memory|MemoryError": "free memory",
    "temporary directory": "set TMPDIR to a folder that can be written",
    "such file": "make /dev/shm and TMPDIR folders that can be written",
    "denied|Read-only": "make /dev/shm and TMPDIR writable",
}
_beat: _Beat | None = None  # of this process
_last_beat = 0.0


def made_progress() -> None:
    """A job calls this after each image, or block of bytes: it counts as progress for the watchdog."""
    global _last_beat
    progress.advance()  # seen by the watchdog from a loader's worker too
    now = time.monotonic()
    if _beat is not None and now - _last_beat >= BEAT_SECONDS:
        _last_beat = now
        _beat()


def worker_failure(what: str, error: BaseException, instead: str) -> OSError:
    """The error of a process that cannot be started, or cannot send: what, the reason, the remedy, and what to do
    `instead`."""
    reason = " ".join(str(error).split()) or type(error).__name__
    remedies = [f"{remedy}, or " for sign, remedy in _REMEDIES.items() if re.search(sign, reason)]
    return OSError(f"{what}: {reason}; {''.join(remedies[:1])}{instead}")


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, stop: Callable[[], Any] = lambda: False
) -> Iterator[tuple[Job, Result]]:
    """(job, result) in the order of completion. workers: processes; 0 = one per core, 1 = this process itself.

    When `stop()` becomes true no further job is started, and the results of running jobs are the last. It is called
    only after progress, by whichever process, so that a run may take the call for a sign of life. A job's error is
    raised after the other running jobs have ended; ValueError when a process was killed.
    """
    workers = min(workers or cores(), len(jobs))
    yield from (
        _in_this_process(function, jobs, stop) if workers <= 1 else _over_processes(function, jobs, workers, stop)
    )


def _in_this_process(
    function: Callable[[Job], Result], jobs: Sequence[Job], stop: Callable[[], Any]
) -> Iterator[tuple[Job, Result]]:
    for job in jobs:
        if stop():
            return
        _set_beat(stop)
        try:
            result = function(job)
        finally:
            _set_beat(None)
        yield job, result


def _over_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, stop: Callable[[], Any]
) -> Iterator[tuple[Job, Result]]:
    # Not fork: the parent runs threads (torch, gloo) whose locks a forked child would inherit.
    context = multiprocessing.get_context(start_method("forkserver"))
    context.set_forkserver_preload([function.__module__, __name__])
    with _starting():
        beats = context.Value("Q")
    pending = iter(jobs)
    running: dict[Future[Result], Job] = {}
    stopping, seen = bool(stop()), 0
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(beats,)) as pool:
        while True:
            while len(running) < 2 * workers and not stopping and (job := next(pending, None)) is not None:
                with _starting():
                    running[pool.submit(function, job)] = job
            if not running:
                return
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), _result(future)
            if done or beats.value != seen:
                stopping, seen = bool(stop()), beats.value
            if stopping:
                for future in [future for future in running if future.cancel()]:
                    del running[future]


def start_method(preferred: str) -> str:
    """How processes start: as preferred, but on macOS afresh, because its own libraries crash in forked ones."""
    return "spawn" if sys.platform == "darwin" else preferred


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise worker_failure("worker processes cannot be started", error, "work in one process (workers=1)") from None


def _result(future: "Future[Result]") -> Result:
    try:
        return future.result()
    except BrokenProcessPool:
        raise ValueError("a worker process was killed, as for lack of memory: fewer workers= need less of it") from None


def _set_beat(beat: _Beat | None) -> None:
    global _beat
    _beat = beat


def _start_worker(beats: Any) -> None:
    def beat() -> None:
        with beats.get_lock():
            beats.value += 1

    _set_beat(beat)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    ignore_stop_signals()
    if torch := sys.modules.get("torch"):  # not imported by jobs that do not need it
        torch.set_num_threads(1)  # as many processes as cores


def ignore_stop_signals() -> None:
    """Slurm signals every process of a step; whether a worker stops is its parent's decision."""
    for number in (SIGTERM, SIGINT, SIGHUP, SIGXCPU, SIGUSR1, SIGUSR2):
        signal(number, SIG_IGN)


def _end_with_parent() -> None:
    """The kernel's signal on a parent's death does not help: the fork server is the parent, and it lives on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
