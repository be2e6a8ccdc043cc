"""When a collective times out, or a job stands still, the rank that did not come is named."""

import datetime
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from support.distributed import started
from support.training import TinyConfig, config, train

from vqscale import rundir, runtime, topology
from vqscale.rollcall import describe

HOSTS = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("entered", "line"),
    [
        ({0: 12, 1: 9, 2: 12}, "the others wait for rank 1 on b: 9 of 12 collectives entered"),
        ({0: 9, 1: 9, 2: 12}, "the others wait for rank 0 on a, rank 1 on b: 9 of 12 collectives entered"),
        ({0: 12, 2: 12}, "the others wait for rank 1 on b: no answer"),
        ({1: 12, 2: 9}, "the others wait for rank 2 on c: 9 of 12 collectives entered"),
        ({0: 12, 1: 12, 2: 12}, ""),
        ({}, ""),
    ],
)
def test_the_ranks_that_the_others_wait_for_are_named(entered: dict[int, int], line: str) -> None:
    assert describe(entered, HOSTS) == line


def test_a_thousand_missing_ranks_are_one_line_of_eight() -> None:
    line = describe({0: 5}, ["host"] * 1024)
    assert line.count("rank ") == 8 and ", …: no answer" in line


def _train_where_one_rank_never_comes(settings: TinyConfig) -> Any:
    topology.GROUP_TIMEOUT = datetime.timedelta(seconds=4)

    def on_step(run: runtime.Run, seen: int) -> None:
        if seen == 40 and run.topology.rank == 1:
            time.sleep(600)

    train(settings, on_step=on_step)


def test_a_collective_that_times_out_names_the_rank_that_did_not_come(tmp_path: Path) -> None:
    with started(_train_where_one_rank_never_comes, 2, config(tmp_path)) as ranks:
        until = time.monotonic() + 60
        while rundir.read_status(tmp_path).get("state") in (None, "running"):
            assert time.monotonic() < until, ranks.output()
            time.sleep(0.05)
    line = f"the others wait for rank 1 on {socket.gethostname()}: "
    assert line in (tmp_path / "log" / "0.log").read_text()
    status = rundir.read_status(tmp_path)
    assert status["state"] == "failed" and line in status["reason"] and "imed out" in status["reason"]
