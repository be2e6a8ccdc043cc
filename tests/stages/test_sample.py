"""The stage `sample` on small untrained models: early checks, reruns, and the pictures beside the shards."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.exports import CLASSES, export_all, export_prior

from vqscale import cli
from vqscale.data.parts import read_samples
from vqscale.data.shards import Manifest
from vqscale.stages import sample as stage
from vqscale.stages.sample import chosen_classes, folder_names

MODELS = [f"{key}=models" for key in ("vqvae", "prior_top", "prior_bottom")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `models` in it."""
    export_all(tmp_path / "models")
    (tmp_path / "sample.yaml").write_text("{samples_per_class: 4, batch: 4, blocks_per_shard: 1, run_dir: out}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample(*words: str) -> int:
    return cli.main(["sample", "sample.yaml", "device=cpu", "threads=1", *MODELS, *words])


def content(folder: Path) -> dict[str, bytes]:
    kinds = ("*.tar", "dataset.json", "grid.png", "images/*/*")
    return {str(path.relative_to(folder)): path.read_bytes() for kind in kinds for path in folder.glob(kind)}


def test_every_sample_is_a_file_of_its_class_where_asked(folder: Path) -> None:
    assert sample() == 0
    assert len(list((folder / "out").glob("*.tar"))) == 3 and not (folder / "out" / "images").exists()
    before = content(folder / "out")
    assert sample("images=true") == 0  # of the samples that are there
    after = content(folder / "out")
    assert before.items() <= after.items() and len(after) == len(before) + 12
    for key, label, parts in read_samples("out", ["png"]):
        name = ["star", "001", "a_b"][label]
        assert (folder / "out" / "images" / name / f"{key}.png").read_bytes() == parts["png"]


@pytest.mark.parametrize("threads", [1, 7])
def test_bytes_do_not_depend_on_the_threads_that_encode(
    folder: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Nor on the block in which a sample stands, nor on which picture is encoded first."""
    words = ["samples_per_class=5", "blocks_per_shard=2"]  # a shard ends within a class, the last with padding
    assert sample(*words) == 0
    before, encode, finished = content(folder / "out"), stage.encode_image, list[int]()

    def slowly(image: Any, encoding: Any) -> bytes:
        turn = len(finished)
        time.sleep(0.03 if turn % 4 == 0 else 0.0)
        finished.append(turn)
        return encode(image, encoding)

    monkeypatch.setattr(stage, "cores", lambda: threads)
    monkeypatch.setattr(stage, "encode_image", slowly)
    assert sample("run_dir=again", *words) == 0
    assert len(finished) == 15 and content(folder / "again") == before


def at_block(monkeypatch: pytest.MonkeyPatch, block: int, action: Callable[[], None]) -> None:
    """`action` is called before the codes of this block are drawn, counted from 1."""
    draw, blocks = stage.draw, 0

    def drawn(*arguments: Any) -> torch.Tensor:
        nonlocal blocks
        blocks += 1
        if blocks == block:
            action()
        return draw(*arguments)

    monkeypatch.setattr(stage, "draw", drawn)


def test_a_stop_keeps_every_shard_whose_samples_are_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample() == 0
    with monkeypatch.context() as patch:
        at_block(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert sample("run_dir=again") == 75
    assert sorted(path.name for path in (folder / "again").glob("0*.tar")) == ["000000.tar", "000001.tar"]
    assert not list((folder / "again").rglob("*.tmp"))
    assert json.loads(Path("again/status.json").read_text())["images_seen"] == 8
    assert sample("run_dir=again") == 0
    assert content(folder / "again") == content(folder / "out")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a picture is\nno picture")])
def test_an_error_of_the_threads_is_one_line_and_leaves_nothing_half_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert sample() == 0
    capsys.readouterr()
    encode, encoded = stage.encode_image, list[bytes]()

    def fail_at_the_sixth(image: Any, encoding: Any) -> bytes:
        if len(encoded) == 5:
            raise error
        encoded.append(encode(image, encoding))
        return encoded[-1]

    with monkeypatch.context() as patch:
        patch.setattr(stage, "cores", lambda: 1)
        patch.setattr(stage, "encode_image", fail_at_the_sixth)
        assert sample("run_dir=again") == 1
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("vqscale: error:")]
    assert lines == [f"vqscale: error: {' '.join(str(error).split())}"] and "Traceback" not in said
    assert sorted(path.name for path in (folder / "again").glob("0*")) == ["000000.index.safetensors", "000000.tar"]
    assert sample("run_dir=again") == 0
    assert content(folder / "again") == content(folder / "out")


def test_a_batch_that_does_not_fit_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lack_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        at_block(patch, 2, lack_memory)
        assert sample() == 1
    said = capsys.readouterr().err
    line = (
        "vqscale: error: out of memory on cpu (tried to allocate 2.00 GiB): batch=4 does not fit, choose a smaller one"
    )
    assert said.splitlines()[-1] == line and "Traceback" not in said
    assert [path.name for path in (folder / "out").glob("*.tar")] == ["000000.tar"]
    assert sample() == 0


def test_folders_of_classes_are_distinct_and_usable() -> None:
    names = ["000002", "star", "..", "Star", "a/b", "a:b", "", "x" * 300, "caf\u00e9 "]
    folders = ["000002", "star", "000002_", "000003", "a_b", "000005", "000006", "000007", "caf\u00e9"]
    assert folder_names(names) == folders


def test_a_grid_of_very_many_classes_has_the_first_of_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "_GRID_PIXELS", 2 * 4 * 128 * 128)  # two rows of four
    assert sample() == 0
    assert "grid.png has the first 2 of 3 classes" in capsys.readouterr().err


def test_pictures_may_change_after_the_start_and_are_checked_before(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample("grid_columns=0") == 1
    assert "grid_columns=0: must be at least 1" in capsys.readouterr().err and not (folder / "out").exists()
    widths = []
    for columns in (1, 3):
        assert sample(f"grid_columns={columns}") == 0
        with Image.open("out/grid.png") as grid:
            widths.append(grid.width)
    assert widths[0] < widths[1]


@pytest.mark.parametrize("name", ["000001.tar", "000002.index.safetensors", "dataset.json", "grid.png", "images/star"])
def test_outputs_of_a_done_run_are_made_again(folder: Path, name: str) -> None:
    assert sample("images=true") == 0
    before = content(folder / "out")
    path = folder / "out" / name
    for file in path.iterdir() if path.is_dir() else [path]:
        file.unlink()
    assert content(folder / "out") != before or name.endswith(".safetensors")
    assert sample("images=true") == 0
    assert content(folder / "out") == before
    status = json.loads(Path("out/status.json").read_text())
    assert (status["state"], status["images_seen"]) == ("done", 12)


def test_samples_of_other_models_are_not_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample() == 0
    before, tokenizer = content(folder / "out"), Manifest.load("out").extra["tokenizer"]
    export_prior(folder / "models" / "prior_top", tokenizer, seed=1)
    assert sample() == 1
    line = capsys.readouterr().err
    assert "prior_top was sha256:" in line and "fresh=true" in line and content(folder / "out") == before
    assert sample("fresh=true", "images=true") == 0
    after = content(folder / "out")
    assert all(after[name] != data for name, data in before.items())


def test_a_done_run_whose_models_are_gone_stays_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample() == 0
    before = content(folder / "out")
    (folder / "models").rename(folder / "away")
    assert sample() == 0
    assert content(folder / "out") == before
    (folder / "out" / "000000.tar").unlink()
    assert sample() == 1
    assert "no run and no exported model there" in capsys.readouterr().err
    assert json.loads(Path("out/status.json").read_text())["state"] == "done"


@pytest.mark.parametrize("link", ["images", "images/star"])
def test_images_are_written_through_no_link(folder: Path, capsys: pytest.CaptureFixture[str], link: str) -> None:
    assert sample() == 0
    (folder / "elsewhere").mkdir()
    (folder / "out" / link).parent.mkdir(exist_ok=True)
    (folder / "out" / link).symlink_to(folder / "elsewhere")
    assert sample("images=true") == 1
    assert f"{link} is a link" in capsys.readouterr().err and not list((folder / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("asked", "labels"),
    [
        ("all", [0, 1, 2]),
        ("star", [0]),
        (["001"], [1]),
        (["1"], [1]),
        (["2", "star"], [2, 0]),
        (["a/b"], [2]),
        (["true"], "'true' is no class name"),
        (["-1"], "'-1' is no class name"),
        (["02"], "'02' is no class name"),
        (["3"], "'3' is no class name of the 3, and no index below that"),
    ],
)
def test_words_are_names_first_and_then_indices(asked: str | list[str], labels: list[int] | str) -> None:
    if isinstance(labels, str):
        with pytest.raises(ValueError, match=labels):
            chosen_classes(asked, CLASSES)
    else:
        assert chosen_classes(asked, CLASSES) == labels
    assert chosen_classes(["1"], ["star", "0", "1"]) == [2] and chosen_classes(["1"], ["1", "0"]) == [0]


@pytest.mark.parametrize("classes", ["[001]", "001"])
def test_classes_are_taken_as_typed(folder: Path, classes: str) -> None:
    assert sample(f"classes={classes}", "samples_per_class=1") == 0
    assert [label for _, label, _ in read_samples("out", [])] == [CLASSES.index("001")]


def test_a_bool_is_no_class(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("classes=[true]") == 1
    assert re.search("classes: 'true' is no class name of the 3", capsys.readouterr().err)
