"""What the job scripts themselves cost on many nodes: commands, and seconds until the program starts.

The program is a shell script here that answers at once, so that only the scripts, Slurm and the nodes take time.
"""

import os
from pathlib import Path

import pytest
from support import cluster
from support.jobs import SCRIPTS

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

NODES = 64
COMMANDS = ("srun", "scontrol", "sbatch", "squeue")
PROGRAM = """\
#!/bin/sh
echo "$(date +%s.%N) $SLURM_JOB_ID $SLURMD_NODENAME $*" >>{log}
case $* in
*show=run_dir,*) printf 'run\\tabsent\\t0\\n' ;;
*show=verdict,*) printf 'done\\tall of it\\tnone\\n' ;;
esac
"""
SHIM = """\
#!/bin/sh
echo "$SLURM_JOB_ID {name}" >>{log}
exec {real} "$@"
"""


class Job:
    """One job of a script, and what was called on its behalf."""

    def __init__(self, slurm: cluster.Cluster, folder: Path, nodes: int, **variables: str):
        self._folder, path = folder, f"{folder / 'bin'}:{slurm.environment['PATH']}"
        here = {"PATH": path, "PYTHON": str(folder / "bin" / "program"), "VQSCALE_SITE": os.devnull} | variables
        script = str(SCRIPTS / "train_vqvae2.sh")
        self.id = slurm.sbatch(f"--nodes={nodes}", script, "configs/debug/train_vqvae.yaml", cwd=folder, **here)
        assert slurm.ended(self.id) == "COMPLETED", slurm.log(self.id)
        self._lines = [line.split() for line in (folder / "program.log").read_text().splitlines()]
        self._lines = [line for line in self._lines if line[1] == self.id]

    def commands(self) -> dict[str, int]:
        """How often the script has asked Slurm for something."""
        called = (self._folder / "commands.log").read_text().splitlines()
        return {name: called.count(f"{self.id} {name}") for name in COMMANDS}

    def launches(self) -> list[str]:
        """The node of each launcher."""
        return [line[2] for line in self._lines if "accelerate.commands.launch" in line]

    def seconds(self) -> tuple[float, float]:
        """From the script's first question to the first launcher, and from there to the last."""
        times = [float(line[0]) for line in self._lines]
        launched = [float(line[0]) for line in self._lines if "accelerate.commands.launch" in line]
        return min(launched) - times[0], max(launched) - min(launched)


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_a_job_of_64_nodes_asks_slurm_no_more_than_one_of_two(tmp_path: Path) -> None:
    if not cluster.is_installed():
        pytest.skip("Slurm is not installed")
    with cluster.started(tmp_path / "cluster", nodes=NODES) as slurm:
        write_script(tmp_path / "bin" / "program", PROGRAM.format(log=tmp_path / "program.log"))
        for name in COMMANDS:
            real = slurm.run("which", name).strip()
            write_script(tmp_path / "bin" / name, SHIM.format(name=name, log=tmp_path / "commands.log", real=real))
        for checks in ({}, {"HEALTH_CHECK": "true"}):
            small, large = (Job(slurm, tmp_path, nodes, **checks) for nodes in (2, NODES))
            assert small.commands() == large.commands()
            assert large.commands()["srun"] == 1 + len(checks)
            assert sorted(large.launches()) == sorted(slurm.nodes)
            for job in (small, large):
                first, last = job.seconds()
                told = f"{len(job.launches())} nodes, {checks}: {first:.2f} s, the last {last:.2f} s later"
                print(told, job.commands())
