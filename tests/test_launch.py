"""The launch files start what they say, through `accelerate launch` itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
from test_cli import put_pulse_in_place_of_pack
put_pulse_in_place_of_pack()
from vqscale import cli
cli.entry()
"""


def launch(tmp_path: Path, launcher: list[str], *overrides: str) -> subprocess.CompletedProcess[str]:
    """A stage of no work under a launcher, with one thread per rank."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "pack.yaml").write_text("threads: 1\n")
    words = ["pack", str(tmp_path / "pack.yaml"), f"run_dir={tmp_path / 'run'}", *overrides]
    command = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:], str(tmp_path / "program.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)


def what_ran(tmp_path: Path) -> tuple[str, str, int, str]:
    command = json.loads((tmp_path / "run" / "command.json").read_text())
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    return command["strategy"], command["engine"], command["world_size"], status["state"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "world", "engine", "ending"),
    [
        ("single", 1, "torch", "stopped"),
        ("ddp", 2, "torch", "stopped"),
        ("fsdp", 2, "torch", "done"),
        ("hsdp", 4, "torch", "done"),
        ("zero1", 2, "deepspeed", "done"),
        ("zero2", 2, "deepspeed", "done"),
        ("zero3", 2, "deepspeed", "done"),
    ],
)
def test_accelerate_starts_what_the_file_says_and_a_stopped_run_is_no_crash_to_it(
    tmp_path: Path, strategy: str, world: int, engine: str, ending: str
) -> None:
    """It starts a single process in another way than several."""
    file = ROOT / "launch" / f"{strategy}.yaml"
    launcher = ["accelerate", "launch", "--config_file", str(file), "--num_processes", str(world)]
    ended = launch(tmp_path, launcher, f"ending={ending}")
    assert (ended.returncode, *what_ran(tmp_path)) == (0, strategy, engine, world, ending), ended.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "run" / "log").iterdir()) == [f"{n}.log" for n in range(world)]


@pytest.mark.slow
def test_torchrun_takes_the_strategy_from_the_command_line(tmp_path: Path) -> None:
    ended = launch(tmp_path, ["torchrun", "--standalone", "--nproc-per-node", "2"], "strategy=fsdp")
    assert what_ran(tmp_path) == ("fsdp", "torch", 2, "done"), ended.stderr[-2000:]


@pytest.mark.slow
def test_a_launcher_that_says_something_else_is_refused(tmp_path: Path) -> None:
    launcher = ["accelerate", "launch", "--config_file", str(ROOT / "launch" / "ddp.yaml")]
    ended = launch(tmp_path, launcher, "strategy=fsdp")
    assert ended.returncode != 0
    assert ": strategy=fsdp, but the launcher says ddp" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_launchers_precision_that_is_not_the_configs_is_refused(tmp_path: Path) -> None:
    launcher = ["accelerate", "launch", "--config_file", str(ROOT / "launch" / "single.yaml")]
    ended = launch(tmp_path, [*launcher, "--mixed_precision", "bf16"])
    assert ended.returncode != 0 and not (tmp_path / "run").exists()
    assert ": precision=fp32, but the launcher says mixed_precision=bf16" in ended.stderr
