"""The job scripts in a task of an array, with programs in Slurm's place that write down what they are told."""

import os
import subprocess
from pathlib import Path

import pytest
from support.jobs import SCRIPTS

IN_TASK_3 = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}


def told(folder: Path, script: str, **variables: str) -> list[str]:
    """What `script`, after common.sh, tells scontrol and Python."""
    for name, answer in (("scontrol", "JobId=12 JobState=RUNNING"), ("python", "runs/three\tdone\t0")):
        program = folder / name
        program.write_text(f"#!/bin/sh\necho {name} \"$@\" >>{folder}/told\nprintf '%s\\n' '{answer}'\n")
        program.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHON": str(folder / "python"), "VQSCALE_SITE": os.devnull, **variables}
    subprocess.run(["bash", "-c", f". {SCRIPTS}/common.sh; {script}"], env=environment, check=True, cwd=folder)
    return (folder / "told").read_text().splitlines()


@pytest.mark.parametrize(("variables", "job"), [(IN_TASK_3, "12_3"), ({"SLURM_JOB_ID": "12"}, "12")])
def test_a_task_requeues_itself_and_not_its_array(tmp_path: Path, variables: dict[str, str], job: str) -> None:
    assert told(tmp_path, "once_more ExcNodeList=bad", **variables) == [
        f"scontrol show job {job} --oneliner",
        f"scontrol requeuehold {job}",
        f"scontrol update jobid={job} ExcNodeList=bad",
        f"scontrol release {job}",
    ]


def test_a_task_takes_its_line_of_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep.txt").write_text("run_dir=runs/one\nrun_dir=runs/two\nrun_dir=runs/three seed=3\n")
    variables = IN_TASK_3 | {"SLURM_RESTART_COUNT": "1", "SWEEP": "sweep.txt"}
    assert told(tmp_path, "run_stage train_vqvae one.yaml threads=1", **variables) == [
        "python -m vqscale status one.yaml threads=1 run_dir=runs/three seed=3 show=run_dir,state,progress"
    ]


def test_a_script_finds_its_folder_among_the_tasks_of_its_array() -> None:
    for path in SCRIPTS.glob("*.sh"):
        if 'scontrol show job "$SLURM_JOB_ID" |' in (text := path.read_text()) and path.name != "guard.sh":
            assert "| head -n 1)/common.sh" in text, path.name
