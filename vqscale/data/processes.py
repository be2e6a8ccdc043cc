"""Independent jobs over processes, stopped early on request.

In: a module's function, and picklable jobs.  Out: results in the order of completion. A worker ends with the process
that started it, and ignores stop signals, which its parent handles.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
_POLL_SECONDS = 0.5


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, stop: Callable[[], Any] = lambda: False
) -> Iterator[tuple[Job, Result]]:
    """(job, result) in the order of completion. workers: processes; 0 = one per core, 1 = this process itself.

    When `stop()` becomes true no further job is started, and the results of running jobs are the last. A job's error
    is raised after the other running jobs have ended.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        for job in jobs:
            if stop():
                return
            yield job, function(job)
        return
    yield from _over_processes(function, jobs, workers, stop)


def _over_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, stop: Callable[[], Any]
) -> Iterator[tuple[Job, Result]]:
    # Not fork: the parent runs threads (torch, gloo) whose locks a forked child would inherit.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, __name__])
    pending = iter(jobs)
    running: dict[Future[Result], Job] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        while True:
            while len(running) < 2 * workers and not stop() and (job := next(pending, None)) is not None:
                running[pool.submit(function, job)] = job
            if not running:
                return
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
            if stop():
                for future in [future for future in running if future.cancel()]:
                    del running[future]


def _start_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if torch := sys.modules.get("torch"):  # not imported by jobs that do not need it
        torch.set_num_threads(1)  # as many processes as cores


def _end_with_parent() -> None:
    """The kernel's signal on a parent's death does not help: the fork server is the parent, and it lives on."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
