"""Fixtures that several test folders use."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: many tests start programs that share the cores
sys.path.insert(0, str(Path(__file__).parent))  # for `support`, here and in the processes that tests start

from support import shapes  # noqa: E402

shapes.install([f"vqscale.{folder}" for folder in ("data", "models", "engine", "evaluation")])  # before their import

import torch  # noqa: E402

from vqscale.config import StageConfig  # noqa: E402
from vqscale.topology import Topology, bring_up, take_down  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run outside any launcher, wherever pytest itself was started."""
    for name in (*LAUNCHER, "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def program_log() -> Iterator[logging.Logger]:
    """The program's logger, given back as it was."""
    log = logging.getLogger("vqscale")
    level, propagate = log.level, log.propagate
    yield log
    log.setLevel(level)
    log.propagate = propagate


@pytest.fixture
def topology() -> Iterator[Topology]:
    """This process as the only rank, in a process group that ends with the test."""
    topology = bring_up(StageConfig(device="cpu", threads=1))
    try:
        yield topology
    finally:
        take_down(orderly=True)
