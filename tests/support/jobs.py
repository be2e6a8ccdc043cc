"""A user's folder beside a private Slurm: submitting the scripts of slurm/ and reading what became of their runs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from support.cluster import Cluster
from support.stages import CONFIGS

from vqscale.engine.checkpoint import find_latest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm"


@dataclass(frozen=True)
class Site:
    """A private cluster and the folder that its user works in."""

    slurm: Cluster
    folder: Path

    def submit(self, script: str, *words: str, flags: tuple[str, ...] = (), **variables: str) -> str:
        """The id of a new job of one of the scripts."""
        return self.slurm.sbatch(*flags, str(SCRIPTS / script), *words, cwd=self.folder, **variables)

    def pipeline(self, configs: str) -> str:
        """What slurm/pipeline.sh says."""
        return self.slurm.run(str(SCRIPTS / "pipeline.sh"), configs, cwd=self.folder)

    def status(self, runs: str, *words: str) -> str:
        """What `vqscale status` says."""
        return self.slurm.run(sys.executable, "-m", "vqscale", "status", runs, *words, cwd=self.folder)

    def completed(self, job: str) -> str:
        """The log of a job that must end well."""
        state, text = self.slurm.ended(job), self.slurm.log(job)
        assert state == "COMPLETED", f"{state}: {text[-4000:]}"
        return text

    def write_config(self, experiment: str, name: str, **changes: object) -> str:
        """configs/EXPERIMENT/NAME.yaml from the debug experiment's; returns its path in the folder."""
        values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | {"threads": 1, "device": "cpu"} | changes
        path = Path("configs") / experiment / f"{name}.yaml"
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(yaml.safe_dump(values))
        return str(path)

    def run_alone(self, *words: str) -> None:
        """A command without Slurm, in the same folder: what the jobs are compared with."""
        done = subprocess.run(
            words,
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def read(self, run_dir: str, name: str) -> dict[str, Any]:
        return json.loads((self.folder / run_dir / name).read_text())

    def losses(self, run_dir: str) -> list[float]:
        lines = (self.folder / run_dir / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    def checkpoints(self, run_dir: str) -> list[str]:
        return sorted(path.name for path in (self.folder / run_dir / "checkpoints").glob("0*"))

    @contextlib.contextmanager
    def held(self, run_dir: str) -> Iterator[None]:
        """The first rank stands still after its first checkpoint, so that nothing ends before a fault arrives."""
        self.slurm.until(lambda: self.checkpoints(run_dir), f"a checkpoint of {run_dir}")
        pid = self.read(run_dir, "status.json")["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def warn(self, job: str) -> None:
        """As before the end of the time limit, for which Slurm itself looks every 30 s only."""
        self.slurm.run("scancel", "--signal=USR2", "--batch", job)
        self.slurm.until(lambda: "warned" in self.slurm.log(job), "the script is warned")

    def differing(self, run_dir: str, other: str) -> list[str]:
        """Names of the tensors (weights, optimizer, averages, codebooks) that differ in the last checkpoints."""
        one, two = (find_latest(self.folder / path / "checkpoints") for path in (run_dir, other))
        assert one is not None and two is not None and one.images_seen == two.images_seen
        expected = two.read("")
        assert expected
        return [name for name, tensor in one.read("").items() if not torch.equal(tensor, expected[name])]
