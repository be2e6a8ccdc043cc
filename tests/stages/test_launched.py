"""Training under the launchers themselves: two machines that are one, and a rank that dies and is started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.stages import CONFIGS, run_stage
from support.ties import agree_until_a_tie

from vqscale.engine.checkpoint import find_latest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = ["total_images=640", "log_every=32", "evaluate_every=640", "save_every=128", "workers=0", "threads=1"]

pytestmark = pytest.mark.slow


def start(launcher: list[str], run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    """`vqscale train_vqvae` on the debug config under a launcher; its output goes beside the run directory."""
    words = [
        "-m",
        "vqscale",
        "train_vqvae",
        str(CONFIGS / "train_vqvae.yaml"),
        f"run_dir={run_dir}",
        *SMALL,
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with run_dir.with_suffix(".log").open("a") as log:
        command = [str(BIN / launcher[0]), *launcher[1:], *words]
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)


def finish(processes: list[subprocess.Popen[str]], run_dir: Path) -> dict[str, Any]:
    try:
        codes = [process.wait(240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    status: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    assert codes == [0] * len(codes) and status["state"] == "done", run_dir.with_suffix(".log").read_text()[-3000:]
    return status


def _rank(words: list[str]) -> int:
    return run_stage("train_vqvae", "train_vqvae", *SMALL, *words)


def train_whole(run_dir: Path, *overrides: str) -> None:
    """The same on two ranks that no launcher started, in one go."""
    words = [f"run_dir={run_dir}", "strategy=fsdp", *overrides]
    assert run_ranks(_rank, 2, words, timeout=240) == [0, 0]


@pytest.fixture(scope="module")
def alone(whole_chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a single process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as here:
        here.chdir(whole_chain.parents[1])
        assert run_stage("train_vqvae", "train_vqvae", f"run_dir={run_dir}", *SMALL) == 0
    return run_dir


def steps(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in steps(run_dir)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_two_machines_train_as_one(chain: Path, alone: Path, strategy: str) -> None:
    run_dir = chain.parent / "two"
    launcher = ["accelerate", "launch", "--config_file", str(ROOT / "launch" / f"{strategy}.yaml")]
    launcher += ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    launcher += ["--main_process_port", str(free_port()), "--rdzv_backend", "static"]
    machines = [start([*launcher, "--machine_rank", str(rank)], run_dir) for rank in (0, 1)]
    finish(machines, run_dir)
    command = json.loads((run_dir / "command.json").read_text())
    assert (command["strategy"], command["world_size"], command["nodes"]) == (strategy, 2, 2)
    agree_until_a_tie(steps(run_dir), steps(alone), 1e-5)


def test_a_rank_that_dies_under_torchrun_is_started_again_and_ends_at_the_same_bits(chain: Path) -> None:
    launcher = ["torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    whole, killed = chain.parent / "whole", chain.parent / "killed"
    train_whole(whole)
    process = start(launcher, killed, "strategy=fsdp")
    until = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("0*")):
        assert time.monotonic() < until and process.poll() is None, killed.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)
    os.kill(json.loads((killed / "status.json").read_text())["pid"], signal.SIGKILL)
    finish([process], killed)
    command = json.loads((killed / "command.json").read_text())
    assert command["restarts"] == 1 and 0 < command["resumed_from"] < 640
    assert losses(killed) == losses(whole)
    one, other = (find_latest(run_dir / "checkpoints") for run_dir in (whole, killed))
    assert one is not None and other is not None
    expected = one.read("")
    assert [name for name, tensor in other.read("").items() if not torch.equal(tensor, expected[name])] == []


def test_a_launcher_that_is_killed_alone_takes_its_ranks_along(chain: Path) -> None:
    launcher = ["torchrun", "--standalone", "--nproc-per-node", "2"]
    run_dir = chain.parent / "orphans"
    longer = ["strategy=fsdp", "total_images=1280"]
    process = start(launcher, run_dir, *longer)
    until = time.monotonic() + 120
    while not list((run_dir / "checkpoints").glob("0*")):
        assert time.monotonic() < until and process.poll() is None, run_dir.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert json.loads((run_dir / "status.json").read_text())["pid"] in ranks and len(ranks) == 2
    process.kill()
    killed = time.monotonic()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < killed + 10, "ranks train on without their launcher"
        time.sleep(0.05)
    whole = chain.parent / "whole"
    finish([start(launcher, run_dir, *longer)], run_dir)  # at once: the folder is free again
    train_whole(whole, *longer)
    assert json.loads((run_dir / "command.json").read_text())["resumed_from"] > 0
    assert losses(run_dir) == losses(whole)
