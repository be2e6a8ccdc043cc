"""Four machines of two ranks, joined by a slow network that loses frames: one is lost, and the run goes on with three.

As a script, this file is one rank: JOURNAL WORDS...
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_ranks
from support.network import INTERFACE, Network, Node, network, why_not
from support.stages import run_stage
from support.ties import agree_until_a_tie

from vqscale.data.loader import Loader

ROOT = Path(__file__).parents[2]
TORCHRUN = Path(sys.executable).parent / "torchrun"
RANKS_PER_NODE, PATIENCE = 2, 15  # seconds without progress
WORDS = ["total_images=720", "global_batch=24", "save_every=96", "log_every=24", "evaluate_every=0", "workers=0"]
WORDS += ["trackers=[]", f"watchdog_seconds={PATIENCE}"]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


def train(journal: str, words: Sequence[str]) -> int:
    """One rank, which writes down what it consumes: a line per step, [position, digest] of each of its samples."""
    samples, advance, batches = [], Loader.advance, Loader.__iter__

    def watched(self: Loader) -> Any:
        for batch in batches(self):
            for position, image, label in zip(batch["position"], batch["image"], batch["label"], strict=True):
                digest = hashlib.sha256(image.numpy().tobytes() + label.numpy().tobytes()).hexdigest()
                samples.append((int(position), digest))
            yield batch

    def advanced(self: Loader) -> None:
        advance(self)
        consumed = [sample for sample in samples if sample[0] < self.state.consumed_samples]
        with open(f"{journal}-{self.rank}.jsonl", "a") as file:
            file.write(json.dumps(consumed) + "\n")
        del samples[: len(consumed)]

    Loader.__iter__, Loader.advance = watched, advanced  # type: ignore[method-assign]
    return run_stage("train_vqvae", "train_vqvae", *words)


def consumed(journal: str) -> dict[int, str]:
    """Position -> digest, of all ranks; a position that was consumed again had the same sample."""
    found: dict[int, str] = {}
    for path in Path().glob(f"{journal}-*.jsonl"):
        for position, digest in (sample for line in path.read_text().splitlines() for sample in json.loads(line)):
            assert found.setdefault(position, digest) == digest, position
    return found


def launch(nodes: Sequence[Node], port: int, run_dir: str) -> list["subprocess.Popen[bytes]"]:
    """torchrun on each of these machines, as one would by hand."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    here = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
    started = []
    for number, node in enumerate(nodes):
        words = [str(TORCHRUN), "--nnodes", str(len(nodes)), "--node-rank", str(number)]
        words += [
            "--nproc-per-node",
            str(RANKS_PER_NODE),
            "--master-addr",
            nodes[0].address,
            "--master-port",
            str(port),
        ]
        words += [__file__, run_dir, f"run_dir={run_dir}", "strategy=fsdp", *WORDS]
        with open(f"{run_dir}.log", "a") as log:
            started.append(node.start(words, stdout=log, stderr=log, env={**os.environ, **here}))
    return started


def tail(run_dir: str) -> str:
    return Path(f"{run_dir}.log").read_text()[-4000:]


def until_past(images: int, launchers: Sequence["subprocess.Popen[bytes]"], run_dir: str) -> None:
    """There is a checkpoint of so many images, and training has gone on from it."""
    limit = time.monotonic() + 240
    while not Path(run_dir, "checkpoints", f"{images:012d}").is_dir() or steps(run_dir)[-1]["images_seen"] <= images:
        assert time.monotonic() < limit and not [p for p in launchers if p.poll() is not None], tail(run_dir)
        time.sleep(0.02)


def lose_a_node(net: Network, run_dir: str) -> None:
    """The last one, once there is something to go on from. The others notice by themselves, and say why they end."""
    launchers = launch(net.nodes, 29_500, run_dir)
    until_past(96, launchers, run_dir)
    net.unplug(net.nodes[-1])  # first, so that no connection is closed
    net.nodes[-1].kill()
    lost = time.monotonic()
    codes = [launcher.wait(240) for launcher in launchers[:-1]]
    seconds = time.monotonic() - lost
    print(f"the other nodes ended {seconds:.1f} s later; of {net.frames:,} frames {net.lost:,} were lost")
    assert 0 not in codes and seconds < PATIENCE + 30, tail(run_dir)
    status = json.loads(Path(run_dir, "status.json").read_text())
    assert status["state"] == "failed" and f"no progress for {PATIENCE} s" in json.dumps(status), status


def steps(run_dir: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_run_on_four_nodes_goes_on_with_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    assert run_stage("pack", "pack", "workers=1") == 0
    assert run_ranks(train, 1, "alone", ["run_dir=alone", *WORDS], timeout=240) == [0]
    with network(4, delay=0.001, loss=0.001) as net:
        lose_a_node(net, "nodes")
        codes = [launcher.wait(240) for launcher in launch(net.nodes[:-1], 29_501, "nodes")]
        assert codes == [0, 0, 0], tail("nodes")
        assert net.lost > 0
    command = json.loads(Path("nodes", "command.json").read_text())
    assert (command["world_size"], command["nodes"], command["strategy"]) == (6, 3, "fsdp")
    assert 96 <= command["resumed_from"] < 720
    assert consumed("nodes") == consumed("alone") and consumed("alone").keys() == set(range(720))
    agree_until_a_tie(steps("nodes"), steps("alone"), 1e-5)


if __name__ == "__main__":
    sys.exit(train(sys.argv[1], sys.argv[2:]))
