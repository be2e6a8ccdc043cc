"""OpenMP's threads look for each other for long on free cores, and briefly where other programs are busy."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from vqscale import runtime, waiting
from vqscale.config import StageConfig
from vqscale.topology import cores

CPU = torch.device("cpu")
# Operations with pauses shorter than the 3 ms of a long look: how much a thread works in them says how it looks.
PAUSES = """
import time
import torch
from vqscale.waiting import looking_briefly
threads = 2
torch.set_num_threads(threads)
x = torch.zeros(threads << 16)
def busy():
    x.add_(1)
    start = time.process_time()
    for _ in range(200):
        x.add_(1)
        time.sleep(0.001)
    return time.process_time() - start
long = busy()
with looking_briefly(threads):
    brief = busy()
again = busy()
print(long, brief, again)
"""
# On one core beside another busy process: the share of a second that its thread waits for the core.
CROWDED = """
import os, subprocess, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from vqscale.waiting import waited
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
before, start = waited(), time.monotonic()
while time.monotonic() < start + 1:
    pass
now = waited()
other.kill()
other.wait()
print(sum(now[task] - before.get(task, 0) for task in now) / 1e9)
"""


@pytest.fixture
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of a user, and two threads."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def figures(program: str) -> list[float]:
    """What a program prints, started as by a user who has chosen nothing."""
    environment = {name: value for name, value in os.environ.items() if "GOMP" not in name and "OMP_" not in name}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return [float(word) for word in ended.stdout.split()]


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@pytest.mark.skipif(cores() < 2, reason="on one core OpenMP's threads always look briefly")
def test_threads_that_look_briefly_leave_the_core_and_look_for_long_afterwards() -> None:
    long, brief, again = figures(PAUSES)
    assert brief < 0.5 * min(long, again)


def test_where_there_are_more_cores_than_threads_there_are_more_teams(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP looks briefly only once all of its threads together are more than the cores."""
    for there, threads, teams in ((2, 2, 1), (8, 8, 1), (8, 4, 2), (8, 2, 7), (2, 4, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, there=there: set(range(there)))
        with waiting.looking_briefly(threads):
            assert names().count("openmp team") == teams
            assert threads + teams * (threads - 1) > there
            assert threads + (teams - 1) * (threads - 1) <= max(there, threads)
        assert "openmp team" not in names()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_team_that_cannot_be_made_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "zeros", fail)
    with waiting.looking_briefly(2):
        pass


def test_the_kernel_says_how_long_a_thread_waits_for_a_core() -> None:
    (share,) = figures(CROWDED)
    assert 0.2 < share < 1.1


def switches(shares: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After which looks at the kernel's figures the way of waiting changes; the last share stays until the end."""
    period, changed, done = 0.002, list[int](), threading.Event()
    look, total = 0, 0.0

    def waited() -> dict[str, int]:
        nonlocal look, total
        if look:
            total += shares[min(look, len(shares)) - 1] * period * 1e9
        if look > len(shares):
            done.set()
        look += 1
        # Another thread, which had waited for long, has ended after the first look
        return {"1": int(total)} | ({"2": 10**12} if look == 1 else {})

    @contextlib.contextmanager
    def recorded(threads: int) -> Iterator[None]:
        assert threads == 2
        changed.append(look - 1)
        yield
        changed.append(look - 1)

    monkeypatch.setattr(waiting, "waited", waited)
    monkeypatch.setattr(waiting, "PERIOD", period)
    monkeypatch.setattr(waiting, "looking_briefly", recorded)
    with waiting.adapted(CPU):
        assert done.wait(60)
    assert "waiting" not in names()
    return changed


@pytest.mark.usefixtures("nothing_chosen")
def test_it_changes_with_the_neighbours_and_not_with_every_flicker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert switches([0.01, 0.3, 0.7, 0.3, 0.01, 0.3, 0.01], monkeypatch) == [3, 5]


@pytest.mark.usefixtures("nothing_chosen")
def test_threads_look_for_long_again_when_the_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = switches([0.01, 0.7], monkeypatch)
    assert begun == 2 and ended > 2


@pytest.mark.usefixtures("nothing_chosen")
def test_a_stage_watches_while_it_runs(tmp_path: Path) -> None:
    with runtime.run(StageConfig(run_dir=str(tmp_path / "run"), device="cpu", threads=2), "pack"):
        assert names().count("waiting") == 1
    assert "waiting" not in names()


@pytest.mark.usefixtures("nothing_chosen")
@pytest.mark.parametrize("case", ["GPU", "one thread", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "no figures"])
def test_nothing_is_done_where_it_cannot_help_or_the_user_has_chosen(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "one thread":
        torch.set_num_threads(1)
    elif case == "no figures":
        monkeypatch.setattr(waiting, "_TASKS", tmp_path)
    elif case != "GPU":
        monkeypatch.setenv(case, "passive")
    with waiting.adapted(torch.device("cuda") if case == "GPU" else CPU):
        assert "waiting" not in names()
