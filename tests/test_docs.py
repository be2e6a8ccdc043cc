"""Every command in the documents: stages, configs and keys exist; those that cost little are run.

A command is an indented or fenced line that begins with a program of `PROGRAMS`. DIR and other words in capitals stand
for what only the reader knows.
"""

import argparse
import contextlib
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw
from support.reduced import REDUCED

import vqscale
from vqscale import cli, config, fields
from vqscale.topology import STRATEGIES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("vqscale", "accelerate", "torchrun", "sbatch", "slurm/pipeline.sh", "python", "make", "bash")
SLURM_STAGE = {"train_vqvae2": "train_vqvae"}


@dataclass(frozen=True)
class Command:
    """`stage` is "" for a program that runs none of ours."""

    where: str
    words: list[str]
    stage: str
    arguments: list[str]

    @property
    def overrides(self) -> list[str]:
        return [word for word in self.arguments if re.match(r"^[\w.]+=", word)]

    @property
    def paths(self) -> list[str]:
        return [word for word in self.arguments if not re.match(r"^(--|[\w.]+=)", word)]


def shell_lines(text: str) -> list[str]:
    """Indented or fenced lines, continued ones joined, `$ ` prompts and comments taken away."""
    lines, fenced, language = [], False, ""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fenced, language = not fenced, line[3:].strip()
        elif (fenced and language in ("", "bash", "sh")) or line.startswith("    "):
            lines.append(re.sub(r"\s+#\s.*$", "", line.strip().removeprefix("$ ")))
    return lines


def commands() -> list[Command]:
    found = []
    for document in DOCUMENTS:
        variables: dict[str, str] = {}
        for line in shell_lines(document.read_text()):
            if assigned := re.fullmatch(r'([A-Z]+)=("[^"]*"|\S+)', line):
                variables[assigned[1]] = assigned[2].strip('"')
                continue
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            for part in re.split(r"\s*(?:;|&&)\s+", line):
                words = re.sub(r"^([A-Z_]+=\S+\s+)+", "", part)
                if words.split(" ")[0] in PROGRAMS:
                    found.append(parsed(document.name, shlex.split(words)))
    return found


def parsed(where: str, words: list[str]) -> Command:
    """Which stage it runs, and with what words."""
    if words[0] == "vqscale":
        return Command(where, words, words[1], words[2:])
    if "vqscale" in words and words[words.index("vqscale") - 1] == "-m":
        at = words.index("vqscale") + 1
        return Command(where, words, words[at], words[at + 1 :])
    if script := next((n for n, word in enumerate(words) if re.fullmatch(r"slurm/\w+\.sh", word)), None):
        name = Path(words[script]).stem
        return Command(where, words, SLURM_STAGE.get(name, name), words[script + 1 :])
    return Command(where, words, "", words[1:])


COMMANDS = commands()
STAGE_COMMANDS = [c for c in COMMANDS if c.stage in cli.STAGES]
TOOL_COMMANDS = [c for c in COMMANDS if c.stage in cli.TOOLS]


def shown(command: Command) -> str:
    return f"{command.where}: {' '.join(command.words)}"[:100]


def keys_of(cls: type) -> set[str]:
    return {line.split("=")[0].strip() for line in fields.help_lines(cls)}


def known(key: str, keys: set[str]) -> bool:
    """Also a level of a mapping, such as temperature.top."""
    return key in keys or key.rpartition(".")[0] in keys


def test_the_documents_are_full_of_commands() -> None:
    assert len(STAGE_COMMANDS) > 20 and len(TOOL_COMMANDS) > 5
    assert {c.stage for c in COMMANDS if c.stage} <= {*cli.STAGES, *cli.TOOLS}


@pytest.mark.parametrize("command", STAGE_COMMANDS, ids=shown)
def test_a_stage_with_its_config_and_keys(command: Command) -> None:
    module = cli.stage_module(command.stage)
    if "--help" in command.arguments:
        return
    (path,) = command.paths
    if "/" not in path or path.startswith("runs/"):  # CONFIG, index.yaml: the reader's own, or made by a stage
        assert [word for word in command.overrides if not known(word.split("=")[0], keys_of(module.Config))] == []
        return
    assert (ROOT / path).is_file(), path
    loaded = config.load(module.Config, ROOT / path, command.overrides)  # also refuses a key that is left to the user
    assert loaded.strategy in ("", *STRATEGIES)


@pytest.mark.parametrize("command", TOOL_COMMANDS, ids=shown)
def test_a_tool_with_its_keys(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module = cli.stage_module(command.stage)
    words = cli._parser().parse_intermixed_args([command.stage, *command.arguments])
    flags = cli._flags(words)
    keys = keys_of(module.Config)
    assert [path for path in command.paths if path.startswith("configs/") and not (ROOT / path).exists()] == []
    if command.stage != "plan":  # whose other keys are the trainer's
        assert [word for word in [*command.overrides, *flags] if not known(word.split("=")[0], keys)] == []
    with contextlib.suppress(FileNotFoundError):  # a run that only the reader has
        module.load([*words.words, *flags])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] in ("accelerate", "torchrun")], ids=shown)
def test_a_launcher_with_its_flags(command: Command) -> None:
    if command.words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parser = get_args_parser()
    else:
        from accelerate.commands.launch import launch_command_parser

        parser = launch_command_parser()
    at = command.words.index(command.stage)
    first = 2 if command.words[0] == "accelerate" else 1
    arguments: argparse.Namespace = parser.parse_args(command.words[first : at + 1])
    if file := getattr(arguments, "config_file", None):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.stage], ids=shown)
def test_other_programs(command: Command) -> None:
    program, *arguments = command.words
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in arguments:
        if re.fullmatch(r"[\w./]+\.(py|sh|yaml)", word) or word == ".ci/run":
            assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] == "vqscale" and "--help" in c.words], ids=shown)
def test_help_is_printed(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.words[1:]) == 0
    assert "keys and defaults" in capsys.readouterr().out


def words_of_sweep(text: str) -> list[str]:
    """The command of W&B's first run: of every parameter the first value."""
    sweep = yaml.safe_load(text)
    given = [f"--{key}={one['values'][0]}" for key, one in sweep["parameters"].items()]
    return [part for word in sweep["command"] for part in (given if word == "${args}" else [word])]


def words_of_task(command: Command, task: int, folder: Path) -> list[str]:
    """The words that `vqscale` gets from a task of an array: the job's own, then those of the task's line."""
    return [
        "vqscale",
        command.stage,
        *command.arguments,
        *(folder / "sweep.txt").read_text().splitlines()[task - 1].split(),
    ]


def test_the_sweeps_of_the_tutorial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    (sweep,) = re.findall(r"^```yaml\n(method:.*?)^```", text, re.MULTILINE | re.DOTALL)
    (lines,) = [line for line in shell_lines(text) if line.startswith("printf")]
    subprocess.run(["sh", "-c", lines], cwd=tmp_path, check=True)
    (array,) = [c for c in COMMANDS if "--array=1-3" in c.words]
    runs = []
    monkeypatch.setattr(cli.stage_module("train_vqvae"), "main", runs.append)
    monkeypatch.setenv("WANDB_RUN_ID", "a1b2")
    for words in (words_of_sweep(sweep), *(words_of_task(array, task, tmp_path) for task in (1, 2, 3))):
        monkeypatch.chdir(ROOT)
        assert words[0] == "vqscale" and cli.main(words[1:]) == 0, words
    assert [run.run_dir for run in runs] == [f"runs/sweep/{name}" for name in ("a1b2", 1, 2, 3)]
    assert [run.learning_rate for run in runs] == [1e-4, 1e-4, 3e-4, 1e-3]
    assert runs[0].model.hidden == 64 and runs[0].trackers == ["wandb"]


PLANS = {" ".join(c.words): c for c in TOOL_COMMANDS if c.stage == "plan" and c.paths[0] != "CONFIG"}


@pytest.mark.slow
@pytest.mark.parametrize("command", PLANS.values(), ids=shown)
def test_plans_are_made(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in command.words[1:]]
    assert cli.main(words) == 0


@pytest.mark.slow
def test_the_tutorial_word_by_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands in order on a folder of images, brought down to seconds by words at their end; all but the one that
    runs the same chain for the minutes it is given, which `tests/stages/test_run.py` does."""
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "pictures", per_class=40)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    followed = [c.words[1:] for c in COMMANDS if c.where == "tutorial.md" and c.words[0] == "vqscale"]
    assert any(words[0] == "run" for words in followed)
    for words in followed:
        if words[0] == "run":
            continue
        words = [word.replace("DIR", "pictures") for word in words]
        if words[0] in cli.STAGES and "--help" not in words:
            words += REDUCED[Path(words[1]).stem]
        assert cli.main(words) == 0, words
    run = tmp_path / "runs" / "clipart64"
    assert (run / "evaluate" / "report.html").is_file() and (run / "sample" / "grid.png").is_file()
    assert len(vqscale.sample(tmp_path / "out" / "clipart64", classes=["disc"], samples_per_class=2)) == 2


def draw_folder(folder: Path, per_class: int) -> None:
    """Two classes of PNG files of all shapes."""
    for n in range(2 * per_class):
        image = Image.new("RGB", (70 + n, 90), (5 * n % 256, 40, 90))
        shape = (20, 20, 50, 50 + n % 30)
        draw = ImageDraw.Draw(image)
        (draw.ellipse if n % 2 else draw.rectangle)(shape, fill=(250, 3 * n % 256, 9))
        path = folder / ("disc" if n % 2 else "box") / f"{n:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
