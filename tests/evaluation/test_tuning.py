"""`vqscale tune_sampling` on the small pipeline: what it searches, what it leaves, and that it goes on where it was."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.extractors import projection

from vqscale import cli
from vqscale.config import as_dict, load
from vqscale.evaluation import passes
from vqscale.evaluation.search import Line, compare_settings, search_charts
from vqscale.evaluation.statistics import FeatureSet, moments_of
from vqscale.models.pretrained import save_pretrained
from vqscale.sources import load_model
from vqscale.stages import tune_sampling as stage
from vqscale.stages.sample import SampleConfig
from vqscale.stages.tune_sampling import Tuner, TuneSamplingConfig, halfway

CONFIG = Path(__file__).parents[2] / "configs" / "debug" / "tune_sampling.yaml"
RESULTS = ("search.jsonl", "search.png", "tuned.json", "sample.yaml")


@pytest.fixture(autouse=True)
def cheap_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "load_extractor", lambda *_args, **_more: projection())


@pytest.fixture(scope="session")
def guided(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The top prior as if it had been trained without classes now and then."""
    source = load_model(world.root / "prior_top", "prior_top", device=torch.device("cpu"))
    about = {key: value for key, value in source.description.items() if key not in ("kind", "config", "fingerprint")}
    config = as_dict(source.model.config) | {"class_dropout": 0.1}
    folder = tmp_path_factory.mktemp("guided")
    save_pretrained(folder, source.model, kind="prior", config=config, extra=about)
    return folder


def words(world: Any, run_dir: Path, **changes: object) -> list[str]:
    given = {name: world.root / name for name in ("vqvae", "prior_top", "prior_bottom")}
    given |= {name: world.root / "pack" for name in ("training", "reference")}
    given |= {"run_dir": run_dir, "device": "cpu", "threads": 1}
    return ["tune_sampling", str(CONFIG), *(f"{key}={value}" for key, value in (given | changes).items())]


def results(run_dir: Path) -> dict[str, bytes]:
    return {name: (run_dir / name).read_bytes() for name in RESULTS}


def test_it_searches_what_there_is_and_leaves_a_config_of_sample(
    world: Any, guided: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tune_sampling"
    assert cli.main(words(world, run, prior_top=guided, experiment="small")) == 0
    tuned = json.loads((run / "tuned.json").read_text())
    axes = ("temperature.top", "top_p.top", "guidance.top", "guidance_schedule.top", "temperature.bottom")
    assert tuple(tuned["defaults"]) == (*axes, "top_p.bottom")  # the bottom prior saw every class
    lines = [Line(**json.loads(line)) for line in (run / "search.jsonl").read_text().splitlines()]
    assert {line.n for line in lines} <= {16, 48} and len(lines) == len({str(vars(line)) for line in lines})
    of_all = [line for line in lines if line.n == 48]
    chosen = next((line for line in of_all if line.setting == tuned["chosen"]), None)
    assert chosen is None or chosen.fd == min(line.fd for line in of_all)
    score = tuned["scores"]["fd"]
    assert score["chosen"]["low"] < score["chosen"]["value"] < score["chosen"]["high"]
    assert score["difference"]["value"] == pytest.approx(score["chosen"]["value"] - score["defaults"]["value"])
    assert "26 images" in tuned["reference"] and "40 images" in tuned["training"]
    assert not (run / "features").exists()
    sampled = load(SampleConfig, run / "sample.yaml")
    assert sampled.experiment == "small" and sampled.run_dir == str(tmp_path / "runs" / "sample_tuned")
    for key, value in tuned["chosen"].items():
        option, level = key.split(".")
        assert getattr(sampled, option)[level] == value
    assert cli.main(["sample", str(run / "sample.yaml"), "samples_per_class=1", "device=cpu", "threads=1"]) == 0
    before = results(run)
    assert cli.main(words(world, run, prior_top=guided, experiment="small")) == 0
    assert "nothing left to do" in capsys.readouterr().err and results(run) == before


def test_the_report_of_evaluate_shows_the_search(world: Any, tmp_path: Path) -> None:
    run, report, config = tmp_path / "run", tmp_path / "scores" / "report.html", tmp_path / "small" / "evaluate.yaml"
    assert cli.main(words(world, run)) == 0
    config.parent.mkdir()
    config.write_text("metrics: [psnr]\n")
    evaluated = ["evaluate", str(config), *world.overrides(run_dir=report.parent)]
    assert cli.main(evaluated) == 0
    assert "Not searched: `vqscale tune_sampling`" in report.read_text()
    assert cli.main([*evaluated, f"tuning={run}"]) == 0  # a new input: all is made anew
    page = report.read_text()
    assert ", of the defaults " in page and "Fréchet distance over temperature.bottom" in page
    (run / "tuned.json").write_text('{"objective": 1}')
    assert cli.main([*evaluated, f"tuning={run}"]) == 0
    assert "Not searched: `vqscale tune_sampling`" in report.read_text()


@pytest.mark.parametrize("draws", [3, 9, 19])
def test_stopped_and_run_again_is_as_never_stopped(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draws: int
) -> None:
    assert cli.main(words(world, tmp_path / "whole")) == 0
    draw, count = stage.draw_level, 0

    def stopped(*arguments: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == draws:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*arguments)

    monkeypatch.setattr(stage, "draw_level", stopped)
    assert cli.main(words(world, tmp_path / "stopped")) == 75
    assert not (tmp_path / "stopped" / "tuned.json").exists()
    assert cli.main(words(world, tmp_path / "stopped")) == 0
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


def test_lines_that_are_there_are_not_measured_again(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last one is torn."""
    run = tmp_path / "run"
    assert cli.main(words(world, run)) == 0
    before = results(run)
    lines = before["search.jsonl"].splitlines(keepends=True)
    (run / "search.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:40])
    (run / "tuned.json").unlink()
    measure, measured = Tuner._measure, []

    def counted(self: Tuner, setting: Any, n: int) -> Line:
        measured.append(n)
        return measure(self, setting, n)

    monkeypatch.setattr(Tuner, "_measure", counted)
    assert cli.main(words(world, run)) == 0
    assert len(measured) == 2 and results(run) == before


def tuned_on_ranks(arguments: list[str]) -> int:
    passes.load_extractor = lambda *_args, **_more: projection()
    return cli.main(arguments)


def test_two_ranks_choose_what_one_chooses(world: Any, guided: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        arguments = words(world, tmp_path / f"{ranks}" / "run", prior_top=guided)
        assert run_ranks(tuned_on_ranks, ranks, arguments) == [0] * ranks
    one, two = (results(tmp_path / ranks / "run") for ranks in ("1", "2"))
    assert one["search.jsonl"] == two["search.jsonl"] and one["tuned.json"] == two["tuned.json"]


class Landscape(Tuner):
    """A tuner of two options whose losses are known."""

    def __init__(self, config: TuneSamplingConfig, at: dict[str, float]):
        self.config, self.at, self.lines, self._chain = config, at, [], Any
        self.defaults = {"temperature.top": 1.0, "top_p.top": 1.0}

    def _measure(self, setting: Any, n: int) -> Line:
        fd = sum((setting[key] - value) ** 2 for key, value in self.at.items()) + 1 / n
        self.lines.append(Line(n, setting, fd, 0, 0, -fd))
        return self.lines[-1]

    def _tell(self, key: str, best: Any) -> None:
        pass


@pytest.mark.parametrize("objective", ["fd", "f1"])
def test_the_search_ends_in_the_valley_and_leaves_out_what_lies_behind_a_rise(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"temperatures": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2], "top_ps": [0.8, 0.9, 1.0]}
    axes = [("temperature.top", values["temperatures"]), ("top_p.top", values["top_ps"])]
    monkeypatch.setattr(stage, "axes_of", lambda *_: axes)
    tuner = Landscape(TuneSamplingConfig(objective=objective, **values), {"temperature.top": 0.84, "top_p.top": 1.0})
    assert tuner.search() == {"temperature.top": 0.85, "top_p.top": 1.0}
    tried = {line.setting["temperature.top"] for line in tuner.lines}
    assert tried >= {0.7, 0.75, 0.8, 0.85, 0.9, 1.0, 1.1} and not tried & {0.5, 0.6, 1.2}
    of_all = [line.setting for line in tuner.lines if line.n == tuner.config.samples]
    assert len(of_all) == 4  # the defaults, two survivors, and the better one halfway
    charts = search_charts(tuner.lines, objective)
    assert [chart.x_label for chart in charts] == ["temperature.top", "top_p.top"]
    assert charts[0].series["500 samples"][0] == sorted(tried)


def test_halfway_lies_between_neighbours() -> None:
    assert halfway(0.9, [0.8, 0.9, 1.0]) == [0.85, 0.95]
    assert halfway(1.0, [0.8, 0.9, 1.0]) == [0.95] and halfway(1.0, [1.0]) == []


def feature_set(rows: torch.Tensor) -> FeatureSet:
    return FeatureSet(len(rows), {"pooled": moments_of(rows)}, rows, rows[:, :2])


def test_the_difference_of_near_settings_is_surer_than_either() -> None:
    draw = torch.Generator().manual_seed(0)
    real, base = torch.randn(300, 6, generator=draw), torch.randn(400, 6, generator=draw)
    near = feature_set(base * 1.5 + 0.02 * torch.randn(400, 6, generator=draw))
    scores = compare_settings(near, feature_set(base * 1.52), feature_set(real), seed=0)
    assert list(scores) == ["fd", "precision", "recall", "f1"]
    width = {name: score["high"] - score["low"] for name, score in scores["fd"].items()}
    assert width["difference"] < 0.3 * width["chosen"] and scores["fd"]["difference"]["high"] < 0
    same = compare_settings(near, near, feature_set(real), seed=0)
    assert all(score["difference"] == {"value": 0, "low": 0, "high": 0} for score in same.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": "none"}, "training=none"),
        ({"reference": "{tmp}/nowhere"}, "nowhere does not exist"),
        ({"reference": "{root}/samples"}, "reference={root}/samples: these are samples"),
        ({"reference_images": 7}, "reference={root}/pack: 7 images, at least 8 are needed"),
        ({"coarse_samples": 7}, "coarse_samples=7: must be from 8 to samples=48"),
        ({"coarse_samples": 64}, "coarse_samples=64: must be from 8 to samples=48"),
        ({"objective": "kid"}, "objective=kid: choose from fd, f1"),
        ({"extractor": "inception"}, "there is no network"),
        ({"prior_bottom": "{root}/prior_top"}, "this is a prior of the top level"),
    ],
)
def test_what_does_not_fit_is_one_line(
    world: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    said: str,
) -> None:
    def refuse(name: str, *_args: Any, **_more: Any) -> Any:
        if name == "inception":
            raise passes.Unavailable("there is no network")
        return projection()

    monkeypatch.setattr(passes, "load_extractor", refuse)
    places = {"tmp": tmp_path, "root": world.root}
    filled = {key: value.format(**places) if isinstance(value, str) else value for key, value in changes.items()}
    assert cli.main(words(world, tmp_path / "run", **filled)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said.format(**places) in line
    assert not (tmp_path / "run" / "search.jsonl").exists()
