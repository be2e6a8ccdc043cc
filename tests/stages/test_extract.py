"""extract_codes: images that cannot be read, outputs that are gone, inputs that have changed."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.stages import run_stage

from vqscale.data.shards import Manifest, shard_info
from vqscale.files import write_json

Files = Callable[[Path], dict[str, bytes]]


def extract(*overrides: str) -> int:
    return run_stage("extract_codes", "extract_codes", *overrides)


def damage(folder: Path, count: int) -> list[str]:
    """Change a byte of the first pictures of shard 0; their keys."""
    index = Manifest.load(folder).index(folder, 0)
    data = bytearray((folder / "000000.tar").read_bytes())
    for row in range(count):
        data[int(index.offset["png"][row]) + 40] ^= 1
    (folder / "000000.tar").write_bytes(data)
    return [index.key(row) for row in range(count)]


def test_unreadable_images_are_counted_named_and_left_out(
    chain: Path, capsys: pytest.CaptureFixture[str], program_log: logging.Logger
) -> None:
    keys = damage(chain / "pack" / "train", 3)
    images = Manifest.load(chain / "pack" / "train")
    assert extract("run_dir=again", "max_bad_fraction=0.5") == 0
    said = capsys.readouterr().err
    assert f"train: 3 of {images.num_samples} images could not be read; see again/bad.jsonl" in said
    assert "train: 100%|" in said and f"{images.num_samples}/{images.num_samples}" in said
    named = [json.loads(line)["key"] for line in Path("again/bad.jsonl").read_text().splitlines()]
    assert named == keys
    codes = Manifest.load("again/train")
    assert (codes.num_samples, codes.extra["bad_images"]) == (images.num_samples - 3, 3)
    assert Manifest.load("again/holdout").extra["bad_images"] == 0


def test_more_unreadable_images_than_the_budget_end_the_run(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(chain / "pack" / "train", 3)
    total = Manifest.load(chain / "pack" / "train").num_samples
    for fraction, allowed in (("0.003", 1), ("0", 0)):
        assert extract("run_dir=again", f"max_bad_fraction={fraction}") == 1
        said = capsys.readouterr().err
        assert f"{allowed + 1} of {total} images could not be read, more than the {allowed} that" in said
        assert not Path("again/train/000000.tar").exists() and not list(Path("again").rglob("*.tmp"))


def test_outputs_that_are_gone_are_made_again(chain: Path, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = files(chain / "extract_codes"), chain / "extract_codes" / "train"
    names = ["000000.tar", "000001.index.safetensors", "dataset.json", "../holdout"]
    for name in names:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        assert extract() == 0
        assert files(chain / "extract_codes") == before, name
    path = out / "000000.index.safetensors"
    path.write_bytes(before["train/000000.index.safetensors"][:-1] + b"?")
    assert extract() == 0 and files(chain / "extract_codes") == before
    capsys.readouterr()
    assert extract() == 0
    assert "nothing left to do: the codes are in" in capsys.readouterr().err


def test_a_done_run_whose_inputs_are_away_stays_done(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(chain / "train_vqvae")
    assert extract() == 0
    assert "nothing left to do; not compared with the inputs, which are missing" in capsys.readouterr().err
    assert json.loads((chain / "extract_codes" / "status.json").read_text())["state"] == "done"
    shutil.rmtree(chain / "extract_codes" / "train")
    assert extract() == 1


def test_codes_of_a_vqvae_that_was_trained_further_are_stale(
    chain: Path, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(chain / "extract_codes")
    assert run_stage("train_vqvae", "train_vqvae", "total_images=2240") == 0
    assert extract() == 1
    said = capsys.readouterr().err
    assert "vqvae was sha256:" in said and "fresh=true" in said and "nothing left to do" not in said
    assert files(chain / "extract_codes") == before
    assert extract("fresh=true") == 0
    assert files(chain / "extract_codes") != before


def test_codes_of_earlier_versions_are_held_to_their_source(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (chain / "extract_codes" / "inputs.json").unlink()
    out = chain / "extract_codes" / "train"
    write_json(
        out / "source.json", {"tokenizer": "sha256:0", "data": Manifest.load(chain / "pack" / "train").fingerprint}
    )
    assert extract() == 1
    assert "source.json: these code shards were made with tokenizer sha256:0, now it is" in capsys.readouterr().err
    assert shard_info(out / "000000.tar") is not None
