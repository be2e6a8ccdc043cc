"""`vqscale compare`: which runs it takes, what it reads of them, and where the page goes."""

import os
from pathlib import Path

import pytest
from PIL import Image
from support.exports import export_all
from support.runs import write_run

from vqscale import cli
from vqscale.stages.compare import folders_in, load, read_run

FID = {"value": 3.0, "n": 10, "reference": "real"}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two experiments."""
    monkeypatch.chdir(tmp_path)
    for name, rate in (("a", 0.125), ("b", 0.5)):
        write_run(
            tmp_path / "runs" / name / "train_vqvae", "train_vqvae", learning_rate=rate, inputs={"data": "sha256:1"}
        )
        write_run(tmp_path / "runs" / name / "train_prior_top", "train_prior", level="top")
        write_run(
            tmp_path / "runs" / name / "evaluate",
            "evaluate",
            scores={"fid": FID | {"value": rate}},
            inputs={"config": "sha256:2"},
        )
    return tmp_path / "runs"


def test_a_page_of_two_experiments(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "runs/a", "runs/b", "out=pages/one.html"]) == 0
    assert capsys.readouterr().out == "pages/one.html: 6 runs\n"
    text = Path("pages/one.html").read_text()
    assert "0.125" in text and "train_prior top" in text and text.count("★ best") == 1
    assert cli.main(["compare", "runs/a/evaluate", "runs/b/evaluate"]) == 0
    assert Path("compare.html").is_file()
    assert cli.main(["compare", "runs/a", "runs/a/evaluate", "out=pages"]) == 0
    assert capsys.readouterr().out.endswith("pages/compare.html: 3 runs\n")


def test_a_picture_of_held_out_curves(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        with open(runs / name / "train_prior_top" / "metrics.jsonl", "a") as file:
            file.write('{"images_seen": 320, "held_out/nll/top": 2.5, "held_out/fd_lite0/top": 90.0}\n')
    assert cli.main(["compare", "runs/a", "runs/b", "out=nll.png", "metrics=[nll]"]) == 0
    assert capsys.readouterr().out == "nll.png: 6 runs\n"
    assert cli.main(["compare", "runs/a", "runs/b", "out=all.png"]) == 0
    with Image.open("nll.png") as one, Image.open("all.png") as several:
        assert one.width < several.width and one.height < several.height
    assert cli.main(["compare", "runs/a", "runs/b", "out=none.png", "metrics=[fid]"]) == 1
    error = capsys.readouterr().err
    assert (
        "no run has such held-out curves, there are ['fd_lite0/top', 'nll/top'" in error
        and not Path("none.png").exists()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: vqscale compare RUN RUN"),
        (["images=3"], "usage: vqscale compare RUN RUN"),
        (["runs/a/evaluate"], "compare takes two runs or more, there is only runs/a/evaluate"),
        (["runs/a", "runs/none"], "runs/none: no run there (no status.json), and no exported model"),
        (["runs/a", "runs/b", "image=3"], "unknown key image; did you mean images?"),
        (["runs/a", "runs/b", "images=-1"], "images=-1"),
        (
            ["runs/a", "runs/b", "out=runs/a/train_vqvae/config.yaml"],
            "neither a folder nor a name that ends in .html or .png",
        ),
    ],
)
def test_mistakes(runs: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["compare", *words]) == 1
    assert message in capsys.readouterr().err
    assert not Path("compare.html").exists()


def test_what_a_run_says(runs: Path) -> None:
    run = read_run(runs / "a" / "train_vqvae")
    assert (run.stage, run.state, run.images_seen, run.problem) == ("train_vqvae", "done", 300, "")
    assert run.facts["learning_rate"] == "0.125" and run.facts["command.versions.torch"] == "2.0"
    assert run.facts["inputs.data"] == "sha256:1" and "command.stage" not in run.facts
    assert run.metrics["reconstruction_mse"] == ([100, 200, 300], [0.5, 0.25, 50 / 300])
    assert not any(key.startswith("inputs.") for key in read_run(runs / "a" / "evaluate").facts)
    assert read_run(runs / "a" / "evaluate").scores == {"fid": FID | {"value": 0.125}}


def test_an_exported_folder_is_a_run(tmp_path: Path) -> None:
    exported = folders_in(export_all(tmp_path / "out"))
    assert [path.name for path in exported] == ["prior_bottom", "prior_top", "vqvae"]
    bottom, top, vqvae = map(read_run, exported)
    assert (bottom.stage, top.stage, vqvae.stage) == ("train_prior bottom", "train_prior top", "train_vqvae")
    assert vqvae.facts["model.activation_checkpointing"] == "false" and vqvae.facts["model.downsample"] == "4, 2"
    assert vqvae.state == "exported" and vqvae.images_seen == 640 and vqvae.facts["model.hidden"]
    assert top.facts["inputs.tokenizer"] == vqvae.facts["fingerprint"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"images_seen": 1}\n{\n{\n', "metrics.jsonl: 2 of 3 lines cannot be read"),
        ("metrics.jsonl", "\0\n", "metrics.jsonl: 1 of 1 lines cannot be read"),
        ("config.yaml", None, "config file"),
        ("config.yaml", "a: [", "not valid YAML"),
        ("status.json", '{"images_seen": "many", "state": "done"}', "many"),
        ("command.json", "[]", "command.json cannot be read"),
        ("scores.json", "{", "JSONDecodeError"),
        ("scores.json", '{"fid": 3}', "scores.json: fid is no score"),
        ("scores.json", '{"fid": {"value": "low"}}', "fid is no score that can be read: {'value': 'low'}"),
        ("scores.json", '{"fid": {"value": 1, "interval": [1]}}', "scores.json: fid is no score"),
        ("scores.json", '{"made_up": {"value": 1}}', "scores.json: made_up is no score"),
    ],
)
def test_a_damaged_run_says_why_and_the_others_go_on(
    runs: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, message: str
) -> None:
    path = runs / "a" / "evaluate" / name
    path.unlink() if text is None else path.write_text(text)
    assert message in read_run(path.parent).problem
    assert cli.main(["compare", "runs/a", "runs/b"]) == 0
    assert capsys.readouterr().out.endswith("6 runs; unreadable: runs/a/evaluate\n")
    assert "unreadable" in Path("compare.html").read_text()


def test_a_torn_last_line_is_a_run_that_was_killed(runs: Path) -> None:
    with open(runs / "a" / "evaluate" / "metrics.jsonl", "a") as file:
        file.write('{"images_s')
    assert read_run(runs / "a" / "evaluate").problem == ""


def test_a_pipe_is_not_waited_for(runs: Path) -> None:
    (runs / "a" / "evaluate" / "metrics.jsonl").unlink()
    os.mkfifo(runs / "a" / "evaluate" / "metrics.jsonl")
    assert read_run(runs / "a" / "evaluate").metrics == {}


def test_words_with_an_equals_sign_in_a_folder_are_paths() -> None:
    request = load(["runs/lr=1", "runs/lr=2", "samples=2"])
    assert [str(path) for path in request.paths] == ["runs/lr=1", "runs/lr=2"] and request.config.samples == 2
