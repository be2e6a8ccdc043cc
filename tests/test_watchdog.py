"""A run that stands still ends in time, with every rank's stacks in the log."""

import itertools
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_ranks, started
from support.training import TinyConfig, train

from vqscale import rundir, runtime
from vqscale.data.processes import made_progress
from vqscale.rollcall import RollCall
from vqscale.topology import bring_up
from vqscale.watchdog import Watchdog

SECONDS = 5


def settings(run_dir: Path) -> TinyConfig:
    return TinyConfig(run_dir=str(run_dir), trackers=[], watchdog_seconds=SECONDS, save_every=8)


def _fall_asleep_here(seconds: float) -> None:
    time.sleep(seconds)


def _train_and_hang(config: TinyConfig, how: str) -> Any:
    def on_step(run: runtime.Run, seen: int) -> None:
        if seen == 40 and run.topology.rank == run.topology.world_size - 1:
            (run.run_dir / "hanging").touch()
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            _fall_asleep_here(600)

    train(config, on_step=on_step)


@pytest.mark.parametrize(
    ("how", "world"), [("asleep", 1), pytest.param("asleep", 2, marks=pytest.mark.slow), ("stopped", 2)]
)
def test_ranks_that_stand_still_write_their_stacks_and_end(tmp_path: Path, how: str, world: int) -> None:
    with started(_train_and_hang, world, settings(tmp_path), how) as ranks:
        until = time.monotonic() + 60
        while not (tmp_path / "hanging").exists():
            assert time.monotonic() < until and ranks.alive(), ranks.output()
            time.sleep(0.02)
        hanging = time.monotonic()
        codes = ranks.wait(60)
        took = time.monotonic() - hanging
        assert took < SECONDS + 10, ranks.output()
        assert set(codes) <= {1, -signal.SIGKILL} and 1 in codes
        printed = ranks.output()
        assert f"no progress for {SECONDS} s: the stacks of all ranks are in" in printed
    logs = [(tmp_path / "log" / f"{rank}.log").read_text() for rank in range(world)]
    assert all("most recent call first" in text for text in logs)
    assert "_fall_asleep_here" in logs[-1] or how == "stopped"
    assert "in on_step" in logs[-1]
    status = rundir.read_status(tmp_path)
    assert status["state"] == "failed" and status["reason"].startswith(f"no progress for {SECONDS} s")
    if world > 1:
        missing = f"the others wait for rank 1 on {socket.gethostname()}: "
        assert missing in status["reason"] and missing in printed
    results = run_ranks(train, world, replace(settings(tmp_path), watchdog_seconds=600))
    consumed = sorted(p for r in results for p in r["consumed"])
    assert consumed == list(range(consumed[0], 160)) and 8 <= consumed[0] <= 40


def _stand_still_together(folder: Path) -> None:
    """All ranks' reports return at the same moment, as when a step that all wait for never ends."""
    topology = bring_up(settings(folder))

    def meet(_reason: str) -> None:
        (folder / f"{topology.rank}.here").touch()
        while len(list(folder.glob("*.here"))) < topology.world_size:
            time.sleep(0.001)

    tell_others = Watchdog._tell_others

    def tell_slowly(watchdog: Watchdog, number: signal.Signals) -> None:
        if number == signal.SIGKILL:
            (folder / f"{topology.rank}.kills").touch()
            time.sleep(0.5)  # the others decide meanwhile
        tell_others(watchdog, number)

    Watchdog._tell_others = tell_slowly  # type: ignore[method-assign]
    counts = itertools.chain([0], itertools.repeat(1))  # some progress, then none
    Watchdog(0.4, folder / f"{topology.rank}.log", topology, counts.__next__, meet, RollCall(topology))
    _fall_asleep_here(60)


def test_of_ranks_that_end_at_the_same_moment_one_kills_the_others(tmp_path: Path) -> None:
    with started(_stand_still_together, 3, tmp_path) as ranks:
        codes = ranks.wait(60)
    assert set(codes) <= {1, -signal.SIGKILL} and 1 in codes  # the others are killed, or end before that
    assert len(list(tmp_path.glob("*.kills"))) == 1  # each other could be killed by a second one before it ends


def test_a_run_that_makes_progress_is_left_alone(tmp_path: Path) -> None:
    config = replace(settings(tmp_path), step_seconds=0.4)  # longer than the limit in all
    (result,) = run_ranks(train, 1, config)
    assert len(result["applied"]) == 20
    assert "no progress" not in (tmp_path / "log" / "0.log").read_text()


def _ask_for_stacks(config: TinyConfig) -> int:
    train(config, on_step=lambda run, seen: os.kill(os.getpid(), signal.SIGQUIT) if seen == 40 else None)
    return 0


def test_quit_writes_the_stacks_and_goes_on(tmp_path: Path) -> None:
    assert run_ranks(_ask_for_stacks, 1, replace(settings(tmp_path), watchdog_seconds=600)) == [0]
    assert "in fit" in (tmp_path / "log" / "0.log").read_text()


def _read_slowly_in_a_worker(config: TinyConfig, progresses: bool) -> list[int]:
    """A training step waits, longer than the limit, for a loader's worker that does or does not get on."""

    def on_step(run: runtime.Run, seen: int) -> None:
        if seen == 16:
            child = os.fork()
            if child == 0:
                for _ in range(30):
                    time.sleep(0.1)
                    if progresses:
                        made_progress()
                os._exit(0)
            os.waitpid(child, 0)

    return train(config, on_step=on_step)["applied"]


@pytest.mark.parametrize("progresses", [True, False])
def test_bytes_that_a_worker_reads_are_progress(tmp_path: Path, progresses: bool) -> None:
    config = replace(settings(tmp_path), watchdog_seconds=1, total_images=24)
    with started(_read_slowly_in_a_worker, 1, config, progresses) as ranks:
        assert ranks.wait(60) == [0 if progresses else 1], ranks.output()
