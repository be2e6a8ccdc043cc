import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from vqscale import cli, runtime
from vqscale.config import StageConfig


@dataclass(frozen=True)
class PulseConfig(StageConfig):
    device: str = "cpu"
    ending: str = "done"  # done | stopped | mistake | bug


def pulse(config: PulseConfig) -> None:
    with runtime.run(config, "pack") as run:
        if config.ending == "stopped":
            run.stop("asked to")
        if config.ending == "mistake":
            raise ValueError("the image is 3 px wide,\n 4 are needed")
        if config.ending == "bug":
            raise KeyError("oops")


# The same stage in a program of its own, where exit codes are real.
PROGRAM = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_cli
test_cli.put_pulse_in_place_of_pack()
from vqscale import cli
cli.entry()
"""


def pulse_stage() -> ModuleType:
    stage = ModuleType("vqscale.stages.pack")
    stage.Config, stage.main = PulseConfig, pulse  # type: ignore[attr-defined]
    stage.plan = lambda config: f"would end {config.ending}"  # type: ignore[attr-defined]
    return stage


def put_pulse_in_place_of_pack() -> None:
    """For a program of its own: there is nothing to give back."""
    sys.modules["vqscale.stages.pack"] = pulse_stage()


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(sys.modules, "vqscale.stages.pack", pulse_stage())
    (tmp_path / "pack.yaml").write_text("seed: 1\nending: done\n")
    return ["pack", str(tmp_path / "pack.yaml"), f"run_dir={tmp_path / 'run'}", "threads=1"]


@pytest.mark.parametrize(("ending", "code"), [("done", 0), ("mistake", 1), ("bug", 1), ("stopped", 75)])
def test_exit_codes(words: list[str], ending: str, code: int) -> None:
    assert cli.main([*words, f"ending={ending}"]) == code


def test_under_a_launcher_a_stopped_run_is_no_crash(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_at_once(config: PulseConfig) -> None:
        raise runtime.Stopped("asked to")

    monkeypatch.setattr(sys.modules["vqscale.stages.pack"], "main", stop_at_once)
    assert cli.main(words) == 75
    for name in ("RANK", "ACCELERATE_MIXED_PRECISION"):
        with monkeypatch.context() as launched:
            launched.setenv(name, "0")
            assert cli.main(words) == 0


def test_a_mistake_is_one_line_without_a_traceback(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([*words, "ending=mistake"])
    assert capsys.readouterr().err.splitlines()[-1] == "vqscale: error: the image is 3 px wide, 4 are needed"
    cli.main([*words, "ending=mistake", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_one_rank_is_told_after_the_first_ranks_turn(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["pack", "nowhere.yaml"]) == 1
    assert capsys.readouterr().err == "vqscale: error on rank 1: config file nowhere.yaml does not exist\n"
    assert waited == [cli.HEAD_START]


def test_a_bug_says_how_to_see_more(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([*words, "ending=bug"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("vqscale: error: KeyError: 'oops' (again with --debug")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pakc"], "there is no stage 'pakc'; did you mean pack?; the stages are pack, index"),
        (["train_vqvae", "{path}"], "pack.yaml is a config of pack, not of train_vqvae: vqscale pack"),
        (["pack"], "pack needs a config file"),
        (["pack", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["pack", "{path}", "sed=1"], "unknown key sed; did you mean seed?"),
        (["pack", "{path}", "--sed=1"], "unknown key sed; did you mean seed?"),
        (["pack", "{path}", "seed"], "override 'seed' is not of the form key=value"),
    ],
)
def test_mistakes_on_the_command_line(
    words: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main([word.format(path=words[1]) for word in arguments]) == 1
    assert message in capsys.readouterr().err


def test_words_with_dashes_are_keys_as_sweeps_pass_them(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--seed=7", "--ending=bug", "--fresh=True", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "seed: 7" in printed and "would end bug" in printed and "fresh: true" in printed


def test_dry_run_prints_and_runs_nothing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--dry-run", "ending=bug"]) == 0
    printed = capsys.readouterr().out
    assert "ending: bug" in printed and "would end bug" in printed
    assert not (Path(words[1]).parent / "run").exists()


def test_dry_run_shows_no_secrets(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--dry-run", "ending=https://me:SECRET@host/a b?sig=SECRET"]) == 0
    printed = capsys.readouterr().out
    assert "ending: https://***@host/a b?sig=***\n" in printed and "SECRET" not in printed


def test_ctrl_c_is_no_traceback(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(config: PulseConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["vqscale.stages.pack"], "main", interrupt)
    assert cli.main(words) == cli.EXIT_INTERRUPTED


def test_the_keys_of_the_stage_come_first_and_those_of_every_stage_last(capsys: pytest.CaptureFixture[str]) -> None:
    for stage, first in [("pack", "source="), ("train_vqvae", "data="), ("sample", "vqvae="), ("evaluate", "samples=")]:
        assert cli.main([stage, "--help"]) == 0
        keys = [line.strip() for line in capsys.readouterr().out.partition("keys and defaults:\n")[2].splitlines()]
        assert keys[0].startswith(first) and keys[-1].startswith("watchdog_seconds=")


def test_help_of_a_stage_lists_its_keys(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pack", "--help"]) == 0
    assert "ending='done'" in capsys.readouterr().out


def test_every_stage_of_the_help_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in cli.STAGES:
        assert cli.main([stage, "--help"]) == 0
        printed = capsys.readouterr().out
        assert "run_dir=" in printed and "seed=" in printed, stage


def run_program(*words: str, code: str = "from vqscale import cli; cli.entry()") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(("ending", "code"), [("done", 0), ("mistake", 1), ("stopped", 75)])
def test_exit_codes_of_the_program(words: list[str], ending: str, code: int) -> None:
    program = PROGRAM.format(tests=str(Path(__file__).parent), root=str(Path(__file__).parents[1]))
    ended = run_program(*words, f"ending={ending}", code=program)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_package_is_light_to_import() -> None:
    heavy = "{'accelerate', 'deepspeed', 'matplotlib', 'torch_fidelity', 'torchvision', 'webdataset'}"
    ended = run_program(code=f"import sys, vqscale.cli; print(sorted({heavy} & sys.modules.keys()))")
    assert ended.stdout.strip() == "[]", ended.stdout + ended.stderr
    bare = run_program(code="import sys, vqscale; print('torch' in sys.modules)")
    assert bare.stdout.strip() == "False"


def test_help_and_version_of_the_program() -> None:
    shown = run_program("--help")
    assert shown.returncode == 0 and all(f"  {stage} " in shown.stdout for stage in cli.STAGES | cli.TOOLS)
    assert run_program("--version").stdout.startswith("vqscale 0.")


def test_a_stage_imports_nothing_that_it_may_not_need() -> None:
    """Every job that is resumed waits for its imports; torch's compiler takes as long as torch itself."""
    program = """
import sys
from vqscale import cli
for stages, heavy in [(["pack", "index"], {"torch._dynamo", "torchvision"}),
                      ([*cli.STAGES, *cli.TOOLS], {"deepspeed", "accelerate", "matplotlib", "tensorboard"})]:
    for stage in stages:
        cli.stage_module(stage)
        assert not heavy & sys.modules.keys(), f"{stage} imports {heavy & sys.modules.keys()}"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
