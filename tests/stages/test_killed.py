"""Stages killed by SIGKILL at random moments, at any number of ranks: what they make in the end is the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.distributed import started
from support.stages import CONFIGS, run_stage

from vqscale.engine.checkpoint import find_latest

pytestmark = pytest.mark.soak

Files = Callable[[Path], dict[str, bytes]]
ROOT = Path(__file__).parents[2]
SMALL = {"extract_codes": ["workers=0", "block=4"], "sample": ["samples_per_class=32", "batch=4", "blocks_per_shard=1"]}


def rank_of_stage(stage: str, overrides: list[str]) -> int:
    return run_stage(stage, stage, *overrides)


def shards(run_dir: Path) -> set[str]:
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*.tar")}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("stage", ["extract_codes", "sample"])
def test_killed_at_random_the_bytes_are_the_same(chain: Path, files: Files, stage: str, world: int) -> None:
    whole, run_dir, chance = Path("whole"), Path("killed"), random.Random(world)
    assert run_stage(stage, stage, f"run_dir={whole}", *SMALL[stage]) == 0
    kills = 0
    while True:
        made = shards(run_dir)
        with started(rank_of_stage, world, stage, [f"run_dir={run_dir}", *SMALL[stage]]) as ranks:
            until = time.monotonic() + 120
            while kills < 3 and shards(run_dir) == made and ranks.alive() and time.monotonic() < until:
                time.sleep(0.005)
            if kills < 3 and ranks.alive():
                time.sleep(chance.uniform(0.0, 0.3))
                ranks.signal(signal.SIGKILL, chance.choice([[0], [world - 1], None]))
                codes = ranks.wait(2)
            else:
                codes = ranks.wait(120)
            if codes == [0] * world:
                break
            assert -signal.SIGKILL in codes, ranks.output()
            kills += 1
    assert kills >= 2
    assert files(run_dir) == files(whole)


def train(run_dir: Path, *overrides: str) -> "subprocess.Popen[str]":
    """`vqscale train_vqvae` as a user starts it, with a loader worker."""
    words = ["train_vqvae", str(CONFIGS / "train_vqvae.yaml"), f"run_dir={run_dir}", "threads=1", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vqscale", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_checkpoint(run_dir: Path, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 180
    while not list((run_dir / "checkpoints").glob("0*")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("victim", ["the loader's worker", "the trainer"])
def test_a_killed_worker_is_an_error_at_once_and_no_worker_outlives_its_trainer(chain: Path, victim: str) -> None:
    run_dir = Path("killed").absolute()
    words = ["save_every=160", "evaluate_every=0", "workers=1"]
    process = train(run_dir, *words)
    wait_for_checkpoint(run_dir, process)
    workers = children(process.pid)
    assert workers
    os.kill(workers[0] if victim == "the loader's worker" else process.pid, signal.SIGKILL)
    killed = time.time()
    output, _ = process.communicate(timeout=120)
    if victim == "the loader's worker":
        # torch raises its own words wherever training is; a batch on its way ends in ours.
        names = ("error: a loader worker has ended", "error: RuntimeError: DataLoader worker (pid")
        assert process.returncode == 1 and any(name in output for name in names), output[-2000:]
        status = json.loads((run_dir / "status.json").read_text())
        assert status["state"] == "failed" and status["time"] - killed < 10
    until = time.monotonic() + 10
    while not all(is_gone(pid) for pid in workers):
        assert time.monotonic() < until, "a worker outlives its trainer"
        time.sleep(0.05)
    again = train(run_dir, *words)  # at once: no orphan may hold the lock
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0 and "resuming at" in output, output[-3000:]
    one, other = (find_latest(folder / "checkpoints") for folder in (run_dir, chain / "train_vqvae"))
    assert one is not None and other is not None
    expected = other.read("")
    assert [name for name, tensor in one.read("").items() if not torch.equal(tensor, expected[name])] == []
