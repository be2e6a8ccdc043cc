"""`vqscale run`: the chain of a folder of configs in one command, resumed, stopped, and sized to the time there is."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.stages import CONFIGS

from vqscale import cli
from vqscale.config import load
from vqscale.files import sealed, write_json
from vqscale.rundir import read_status
from vqscale.stages import run, sizing

NAMES = ("pack", "train_vqvae", "extract_codes", "train_prior_top", "train_prior_bottom", "sample", "evaluate")
SHORTER = {
    "train_vqvae": [("total_images: 1920", "total_images: 6400")],
    "train_prior_top": [("total_images: 1280", "total_images: 320")],
    "train_prior_bottom": [("total_images: 1280", "total_images: 320")],
}


def make_folder(root: Path) -> Path:
    """Configs and pictures: every path has a blank and an umlaut."""
    folder = root / "kleine Prüfung"
    folder.mkdir()
    for name in NAMES:
        text = (CONFIGS / f"{name}.yaml").read_text()
        for old, new in SHORTER.get(name, []):
            assert old in text
            text = text.replace(old, new)
        (folder / f"{name}.yaml").write_text(text)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 6, 6, 3), dtype=np.uint8)
    for number, one in enumerate(pixels):
        path = root / "schöne Bilder" / f"Art {number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).resize((40, 40), Image.Resampling.NEAREST).save(path)
    return folder


def command(folder: Path) -> list[str]:
    words = [str(folder), f"source={folder.parent / 'schöne Bilder'}", "experiment=mein Satz", "device=cpu"]
    return [sys.executable, "-m", "vqscale", "run", *words]


@pytest.fixture(scope="module")
def stopped_and_done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[int], str, str]]:
    """(runs, exit codes of a start that was stopped and of one that was killed, output of the next two)."""
    root = tmp_path_factory.mktemp("mein ö")
    folder = make_folder(root)
    runs = root / "runs" / "mein Satz"
    metrics, codes = runs / "train_vqvae" / "metrics.jsonl", []
    for number in (signal.SIGTERM, signal.SIGKILL):
        lines = metrics.read_text() if metrics.is_file() else ""
        started = subprocess.Popen(command(folder), cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while started.poll() is None and (not metrics.is_file() or metrics.read_text() == lines):
            time.sleep(0.1)
        started.send_signal(number)
        started.communicate()  # to the end of its stage too, which writes to the same pipes
        codes.append(started.returncode)
        assert json.loads((runs / "train_vqvae" / "status.json").read_text())["state"] == "stopped"
    said = []
    for _ in range(2):
        ended = subprocess.run(command(folder), cwd=root, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        said.append(ended.stdout)
    yield runs, codes, said[0], said[1]


def test_its_stage_stops_with_it_and_the_same_command_goes_on(
    stopped_and_done: tuple[Path, list[int], str, str],
) -> None:
    runs, codes, again, _ = stopped_and_done
    assert codes == [cli.EXIT_UNFINISHED, -signal.SIGKILL]
    assert "[1/7] pack: done" in again and "[2/7] train_vqvae: about" in again
    assert json.loads((runs / "train_vqvae" / "command.json").read_text())["resumed_from"] > 0


def test_it_ends_with_scores_a_report_and_the_next_command(stopped_and_done: tuple[Path, list[int], str, str]) -> None:
    runs, _, said, _ = stopped_and_done
    assert json.loads((runs / "evaluate" / "scores.json").read_text())["nll/top"]["value"] > 0
    assert (runs / "evaluate" / "report.html").is_file() and (runs / "evaluate" / "samples.png").is_file()
    assert said.splitlines()[-3:] == [
        "picture: runs/mein Satz/evaluate/samples.png",
        "report:  runs/mein Satz/evaluate/report.html",
        "next: vqscale export 'runs/mein Satz' 'out/mein Satz'",
    ]


def test_a_chain_that_is_done_starts_nothing(stopped_and_done: tuple[Path, list[int], str, str]) -> None:
    _, _, _, third = stopped_and_done
    assert [line.rpartition(": ")[2] for line in third.splitlines() if line.startswith("[")] == ["done"] * 7


def test_a_step_whose_input_is_newer_is_not_taken_for_done(
    stopped_and_done: tuple[Path, list[int], str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, *_ = stopped_and_done
    monkeypatch.chdir(runs.parent.parent)
    folder = Path("kleine Prüfung").resolve()
    chain = run.Chain(folder, run.RunConfig(experiment="mein Satz", device="cpu"))
    steps = {step.name: step for step in chain.steps}
    assert all(map(chain.is_current, chain.steps))
    path = runs / "extract_codes" / "status.json"
    before = path.read_text()
    write_json(path, sealed(read_status(path.parent) | {"time": time.time()}))
    assert not chain.is_current(steps["train_prior_top"]) and chain.is_current(steps["sample"])
    path.write_text(before)
    chain.started.add("sample")
    assert not chain.is_current(steps["evaluate"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["minutes=5"], "minutes=5.0: runs/mein Satz was begun with minutes=0.0"),
        (["source=elsewhere"], "source=elsewhere: runs/mein Satz was begun with source="),
        (["minutes=-1"], "minutes=-1: must be at least 0"),
        (["experiment=../x"], "experiment=../x: takes a name, not a path"),
        (["model.hidden=3"], "unknown key model; did you mean"),
    ],
)
def test_what_does_not_fit_the_runs_that_are_there(
    stopped_and_done: tuple[Path, list[int], str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(stopped_and_done[0].parent.parent)
    given = words if any(word.startswith("experiment=") for word in words) else ["experiment=mein Satz", *words]
    assert cli.main(["run", "kleine Prüfung", *given]) == 1
    assert line in capsys.readouterr().err


def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    folder = make_folder(tmp_path)
    (folder / "pack.yaml").write_text("source: ???\n")
    for words, line in [
        (["nowhere"], "nowhere: there is no such folder"),
        (["empty"], "holds no config of a chain"),
        (["kleine Prüfung"], "source is left to you"),
        ([], "usage: vqscale run CONFIG_FOLDER"),
    ]:
        assert cli.main(["run", *words]) == 1
        assert line in capsys.readouterr().err
    (folder / "evaluate.yaml").write_text("extractor: lite9\n")
    assert cli.main(["run", "kleine Prüfung", "source=x"]) == 1
    assert "extractor=lite9: choose from" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_fails_ends_the_chain_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path)
    assert cli.main(["run", "kleine Prüfung", "source=nowhere"]) == 1
    assert "pack ended with exit code 1" in capsys.readouterr().err
    (tmp_path / "runs" / "kleine Prüfung" / "run.yaml").write_text("steps: 3\n")
    assert cli.main(["run", "kleine Prüfung"]) == 1
    assert "run.yaml: was damaged" in capsys.readouterr().err


def test_a_short_training_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path)
    run_yaml = tmp_path / "runs" / folder.name / "run.yaml"
    run_yaml.parent.mkdir(parents=True)
    kept = "source: x\nminutes: 2\nsteps: {}\n"
    run_yaml.write_text(kept + "minutes_in_full: {train_vqvae: 30.4, train_prior_top: 61.0}\n")
    run._tell_results(run.Chain(folder, run.RunConfig()), [7.0])
    said = capsys.readouterr().out
    assert "hardly learned; minutes=7 would" in said
    assert "a first look: as the configs are, without minutes=, training takes about 91 minutes" in said
    run_yaml.write_text(kept)
    run._tell_results(run.Chain(folder, run.RunConfig()), [2.1])
    assert "note" not in capsys.readouterr().out
    run_yaml.write_text(kept + "minutes_in_full: 3\n")
    with pytest.raises(ValueError, match="was damaged"):
        run.Chain(folder, run.RunConfig())


def words_of(size: sizing.Size) -> dict[str, str]:
    return dict(word.split("=") for word in size.words)


@pytest.mark.parametrize(
    ("cost", "hidden", "share"),
    [(0.001, 128, 1), (0.01, 64, 1), (0.02, 32, 1), (0.1, 32, 0)],  # seconds per image at the full width
)
def test_less_time_gives_a_narrower_model_and_less_training(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: float, hidden: int, share: int
) -> None:
    path = tmp_path / "debug" / "train_vqvae.yaml"
    path.parent.mkdir()
    path.write_text("total_images: 96000\nmodel: {hidden: 128, residual_hidden: 32, quantizer: {num_codes: 512}}\n")

    def measured(stage: str, path: Path, words: list[str]) -> float:
        return cost * load(sizing.TRAINERS[stage].Config, path, words).model.hidden / 128

    monkeypatch.setattr(sizing, "seconds_per_image", measured)
    size = sizing.size_trainer("train_vqvae", path, [], 200)
    words = words_of(size)
    assert int(words["model.hidden"]) == hidden and words["model.quantizer.num_codes"] == "128"
    assert size.seconds <= 200 and int(words["total_images"]) <= 96_000
    assert (size.share >= 1) == bool(share)
    assert size.in_full == pytest.approx(96_000 * cost)
    assert load(sizing.TRAINERS["train_vqvae"].Config, path, size.words).model.hidden == hidden


@pytest.mark.parametrize("name", ["train_vqvae", "train_prior_top", "train_prior_bottom", "train_classifier_real"])
def test_every_trainer_can_be_measured_and_takes_the_words(chain: Path, name: str) -> None:
    (stage,) = [step.stage for step in run._CHAIN if step.name == name]
    size = sizing.size_trainer(stage, CONFIGS / f"{name}.yaml", ["device=cpu"], 30)
    assert 0 < size.seconds <= 31 and size.share > 0
    assert load(sizing.TRAINERS[stage].Config, CONFIGS / f"{name}.yaml", size.words).total_images > 0


def test_samples_are_as_many_as_there_is_time_for(chain: Path) -> None:
    size = sizing.size_samples(CONFIGS / "sample.yaml", ["device=cpu"], 30)
    assert words_of(size) == {"samples_per_class": "2", "batch": "8"} and size.seconds > 0
