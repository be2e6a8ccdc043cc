import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.work import die, stand_still, work

from vqscale.data.processes import run_jobs


def test_in_this_process() -> None:
    assert list(run_jobs(abs, [-1, 2, -3], workers=1)) == [(-1, 1), (2, 2), (-3, 3)]


def test_over_processes() -> None:
    assert dict(run_jobs(abs, [-1, 2, -3, 4, -5], workers=2)) == {-1: 1, 2: 2, -3: 3, 4: 4, -5: 5}


def test_one_process_per_core_where_the_system_knows_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert dict(run_jobs(abs, [-1, 2, -3], workers=0)) == {-1: 1, 2: 2, -3: 3}


def test_the_error_of_a_job_is_raised() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(run_jobs(int, ["1", "x", "3"], workers=2))


@pytest.mark.parametrize(("workers", "most"), [(1, 3), (2, 3 + 4)])
def test_stop_begins_no_further_job(workers: int, most: int) -> None:
    done: list[int] = []
    for job, _ in run_jobs(abs, list(range(100)), workers, stop=lambda: len(done) >= 3):
        done.append(job)
    assert 3 <= len(done) <= most and sorted(done) == list(range(len(done)))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_works_asks_and_one_that_stands_still_does_not(workers: int) -> None:
    asked: list[float] = []
    list(run_jobs(stand_still, [0.9, 1.0], workers, lambda: asked.append(time.monotonic())))
    assert len(asked) <= 4  # before and after the jobs
    asked.clear()
    list(run_jobs(work, [4, 4], workers, lambda: asked.append(time.monotonic())))
    assert len(asked) >= 4


def test_a_killed_worker_is_an_error_with_its_remedy() -> None:
    with pytest.raises(ValueError, match="was killed, as for lack of memory: fewer workers="):
        list(run_jobs(die, [1, 2], 2))


def test_killed_outright_the_parent_leaves_no_orphans() -> None:
    program = "import time; from vqscale.data.processes import run_jobs; list(run_jobs(time.sleep, [99.0] * 4, 2))"
    parent = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        wait_for(lambda: count_in_session(parent.pid) >= 4)  # itself, the fork server, two workers
        time.sleep(1)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: count_in_session(parent.pid) == 0)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def count_in_session(session: int) -> int:
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                count += os.getsid(int(entry.name)) == session and " Z " not in (entry / "stat").read_text()
            except OSError:
                continue  # it ended meanwhile
    return count


def test_processes_that_cannot_be_started_are_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr("concurrent.futures.process.ProcessPoolExecutor.submit", fail)
    with pytest.raises(OSError, match=r"cannot be started: AF_UNIX path too long; TMPDIR is too long.*workers=1"):
        list(run_jobs(abs, [1, 2], 2))
