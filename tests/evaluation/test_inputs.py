"""Inputs of an evaluation: stale, gone, empty or on both sides of a comparison; said before anything is computed."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqscale import cli
from vqscale.data.shards import Manifest
from vqscale.evaluation import codes, passes, samples
from vqscale.evaluation.features import Extractor
from vqscale.sources import load_model

OTHER = "sha256:" + "e" * 64


@pytest.fixture(autouse=True)
def cheap_network(monkeypatch: pytest.MonkeyPatch, quick: Extractor) -> None:
    monkeypatch.setattr(passes, "load_extractor", lambda *_args, **_more: quick)


def run(world: Any, tmp_path: Path, **changes: object) -> int:
    config = tmp_path / "experiment" / "evaluate.yaml"
    config.parent.mkdir(exist_ok=True)
    config.write_text("extractor: inception\nweights: given\n")
    return cli.main(["evaluate", str(config), *world.overrides(run_dir=tmp_path / "run", **changes)])


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


def scores_of(tmp_path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((tmp_path / "run" / "scores.json").read_text(), parse_constant=refuse)


def with_extra(folder: Path, source: Path, **extra: Any) -> Path:
    """A copy of a data set whose dataset.json says something else."""
    shutil.copytree(source, folder)
    manifest = Manifest.load(folder)
    dataclasses.replace(manifest, extra=manifest.extra | extra).save(folder)
    return folder


@pytest.mark.parametrize(
    "extra, key",
    [
        ({"vqvae": OTHER}, "vqvae"),
        ({"priors": {"top": OTHER}}, "prior_top"),
        ({"vqvae": OTHER, "priors": {"top": OTHER, "bottom": OTHER}}, "prior_bottom"),
    ],
)
def test_samples_of_other_models_are_refused_before_anything_is_computed(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: dict[str, Any], key: str
) -> None:
    folder = with_extra(tmp_path / "samples", world.root / "samples", **extra)
    assert run(world, tmp_path, samples=folder) == 1
    line = the_error(capsys)
    assert f"samples={folder} was drawn from {key} {OTHER}, but {key}={world.root / key} is sha256:" in line
    assert "make samples again with fresh=true" in line and "samples=none" in line
    assert not (tmp_path / "run" / "statistics").exists()
    models = dict.fromkeys(("vqvae", "prior_top", "prior_bottom"), "none")
    assert run(world, tmp_path, samples=folder, metrics="[fid]", **models) == 0


def test_samples_of_these_models_are_taken(world: Any, tmp_path: Path) -> None:
    priors = {level: load_model(world.root / f"prior_{level}", "prior").fingerprint for level in ("top", "bottom")}
    folder = with_extra(tmp_path / "samples", world.root / "samples", vqvae=world.tokenizer, priors=priors)
    assert run(world, tmp_path, samples=folder, metrics="[fid]") == 0


@pytest.mark.parametrize("split", ["holdout", "train"])
def test_codes_of_another_tokenizer_are_refused_with_both_fingerprints(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    shutil.copytree(world.root / "codes", tmp_path / "codes", ignore=shutil.ignore_patterns(split))
    with_extra(tmp_path / "codes" / split, world.root / "codes" / split, tokenizer=OTHER)
    assert run(world, tmp_path, codes=tmp_path / "codes") == 1
    error = capsys.readouterr().err
    assert OTHER in error and world.tokenizer in error and "codes=none" in error


def test_codes_of_other_classes_than_the_priors_are_refused(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.root / "codes", tmp_path / "codes")
    for split in ("train", "holdout"):
        whole = Manifest.load(tmp_path / "codes" / split)
        Manifest.of("codes", whole.shards, ["a", "b", "c", "d"], whole.transform, whole.extra).save(
            tmp_path / "codes" / split
        )
    assert run(world, tmp_path, codes=tmp_path / "codes") == 1
    assert f"a prior of 3 classes, but codes={tmp_path / 'codes'} has 4" in the_error(capsys)


def test_all_that_is_stale_is_named_at_once(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = with_extra(tmp_path / "samples", world.root / "samples", vqvae=OTHER)
    shutil.copytree(world.root / "codes", tmp_path / "codes", ignore=shutil.ignore_patterns("train"))
    with_extra(tmp_path / "codes" / "train", world.root / "codes" / "train", tokenizer=OTHER)
    assert run(world, tmp_path, samples=stale, codes=tmp_path / "codes") == 1
    line = the_error(capsys)
    assert "make codes and samples again with fresh=true" in line and "(codes=none samples=none)" in line


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"metrics": "[fid,nll_train]"}, "nll_train_images=0"),
        ({"metrics": "[fid,nll_shuffled_class]", "shuffled_conditioning": "false"}, "shuffled_conditioning=false"),
        ({"metrics": "[fid,bits_per_dim]", "prior_top": "none"}, "it needs a prior for every level"),
        ({"metrics": "[fid,nll]", "prior_top": "none", "prior_bottom": "none"}, "prior_top=none"),
        ({"metrics": "[fid,psnr]", "vqvae": "none"}, "vqvae=none"),
        ({"metrics": "[fid,used_codes]", "vqvae": "none", "codes": "none"}, "codes=none"),
        ({"metrics": "[fid,cas_top1]", "classifier_samples": "none"}, "classifier_samples=none"),
        ({"metrics": "[fid]", "neighbours": 2, "training": "none"}, "neighbours=2 needs training images"),
    ],
)
def test_what_cannot_be_computed_is_said_before_anything_is(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], said: str
) -> None:
    assert run(world, tmp_path, **changes) == 1
    assert said in the_error(capsys)
    assert not (tmp_path / "run" / "statistics").exists()


def test_codes_without_those_of_training_images_are_left_out_at_every_start(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.root / "codes", tmp_path / "codes", ignore=shutil.ignore_patterns("train"))
    assert run(world, tmp_path, codes=tmp_path / "codes", metrics="[]") == 0
    assert f"codes: data set {tmp_path / 'codes'} has no dataset.json" in capsys.readouterr().out
    assert not any(key.startswith("nll") for key in scores_of(tmp_path))
    assert run(world, tmp_path, codes=tmp_path / "codes", metrics="[]") == 0
    assert "nothing left to do" in capsys.readouterr().err


@pytest.mark.parametrize("gone", ["scores.json", "report.html", "samples.png", "picture"])
def test_outputs_that_are_gone_are_made_again(world: Any, tmp_path: Path, gone: str) -> None:
    changes = {"metrics": "[psnr]", "picture": tmp_path / "picture.png"}
    assert run(world, tmp_path, **changes) == 0
    first = scores_of(tmp_path)
    path = tmp_path / "picture.png" if gone == "picture" else tmp_path / "run" / gone
    path.unlink()
    assert run(world, tmp_path, **changes) == 0
    assert path.stat().st_size and scores_of(tmp_path) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"samples_shown": 0},
        {"classes_shown": 0},
        {"num_reconstructions": 0},
        {"samples_shown": 0, "num_reconstructions": 0},
        {"reference_images": 1},
        {"nll_images": 1, "nll_train_images": 1},
        {"neighbours": 1_000, "training": "pack", "training_images": 1},
        {"acceptance": "[]", "kid_subset_size": 2, "batch": 1, "reference_images": 3},
    ],
    ids=str,
)
def test_little_or_nothing_of_everything(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    if "training" in changes:
        changes = changes | {"training": world.root / "pack"}
    assert run(world, tmp_path, **changes) == 0
    scores = scores_of(tmp_path)
    assert all(score["reason"] for score in scores.values() if score["value"] is None)
    assert run(world, tmp_path, **changes) == 0
    assert "nothing left to do" in capsys.readouterr().err


@pytest.mark.parametrize("picture", ["", "a file/picture.png"])
def test_a_picture_that_cannot_be_written_is_said_at_once(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], picture: str
) -> None:
    (tmp_path / "a file").touch()
    assert run(world, tmp_path, picture=tmp_path / picture) == 1
    assert f"picture={tmp_path / picture}: " in the_error(capsys)
    assert not (tmp_path / "run" / "statistics").exists()


def test_a_damaged_scores_file_is_made_again(world: Any, tmp_path: Path) -> None:
    assert run(world, tmp_path, metrics="[psnr]") == 0
    first = (tmp_path / "run" / "scores.json").read_bytes()
    (tmp_path / "run" / "scores.json").write_bytes(first[:20])
    assert run(world, tmp_path, metrics="[psnr]") == 0
    assert (tmp_path / "run" / "scores.json").read_bytes() == first


def test_an_input_that_is_gone_does_not_cost_its_scores(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.root / "samples", tmp_path / "samples")
    assert run(world, tmp_path, samples=tmp_path / "samples", kid_subset_size=12) == 0
    first = scores_of(tmp_path)
    shutil.rmtree(tmp_path / "samples")
    for _ in range(2):  # the second start finds a failed run
        assert run(world, tmp_path, samples=tmp_path / "samples", kid_subset_size=12) == 1
        assert "bring it back, or leave it out with samples=none" in the_error(capsys)
        assert scores_of(tmp_path) == first
    assert run(world, tmp_path, samples="none") == 0
    assert "fid" in first and "fid" not in scores_of(tmp_path)


@pytest.mark.parametrize("key, metrics", [("reference", "[fid]"), ("vgg16_weights", "[psnr]")])
def test_a_file_that_changes_is_noticed(world: Any, tmp_path: Path, quick: Extractor, key: str, metrics: str) -> None:
    features = quick(world.holdout).pooled.double().numpy()
    path = tmp_path / {"reference": "reference.npz", "vgg16_weights": "weights.pth"}[key]
    for times in (1, 2):
        if key == "reference":
            np.savez(path, mu=features.mean(0) * times, sigma=np.cov(features, rowvar=False))
        else:
            path.write_bytes(b"weights" * times)
        page = tmp_path / "run" / "report.html"
        before = page.stat().st_mtime_ns if times == 2 else 0
        assert run(world, tmp_path, metrics=metrics, **{key: path}) == 0
        assert page.stat().st_mtime_ns > before


def test_what_a_run_no_longer_computes_does_not_stay(world: Any, tmp_path: Path) -> None:
    by_class = tmp_path / "run" / "nll_by_class.json"
    assert run(world, tmp_path, metrics="[nll]") == 0 and by_class.is_file()
    assert run(world, tmp_path, metrics="[psnr]") == 0 and not by_class.exists()


@pytest.mark.parametrize(
    "changes, warned",
    [
        ({"samples": "pack/holdout"}, "samples={root}/pack/holdout and reference={root}/pack/holdout have 3 of 3"),
        (
            {"reference": "pack/train", "neighbours": "2", "training": "pack"},
            "training={root}/pack/train and reference={root}/pack/train have 4 of 4",
        ),
        ({}, ""),
    ],
)
def test_the_same_images_on_both_sides_are_warned_of(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], warned: str
) -> None:
    paths = {key: value if key == "neighbours" else world.root / value for key, value in changes.items()}
    assert run(world, tmp_path, metrics="[fid]", **paths) == 0
    error = capsys.readouterr().err
    assert warned.format(root=world.root) in error and ("in common" in error) == bool(warned)


def test_a_data_set_without_samples_is_named(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    Manifest.of("samples", [], ["a"], {"resolution": 16}).save(tmp_path / "empty")
    assert run(world, tmp_path, samples=tmp_path / "empty") == 1
    assert f"samples={tmp_path / 'empty'}: a data set without samples" in the_error(capsys)


@pytest.mark.parametrize(
    "key, file", [("samples", "dataset.json"), ("vqvae", "config.json"), ("prior_top", "model.safetensors")]
)
def test_a_damaged_input_is_named_with_its_key(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, file: str
) -> None:
    shutil.copytree(world.root / key, tmp_path / key)
    (tmp_path / key / file).write_bytes(b"{}")
    assert run(world, tmp_path, **{key: tmp_path / key}) == 1
    line = the_error(capsys)
    assert f"error: {key}" in line and str(tmp_path / key) in line


# --- values that are no numbers ---------------------------------------------------------------------------------------


def test_kid_of_subsets_of_one_image_is_null_with_the_reason(world: Any, tmp_path: Path) -> None:
    assert run(world, tmp_path, metrics="[kid]", kid_subset_size=1) == 0
    score = scores_of(tmp_path)["kid"]
    assert score["value"] is None and score["reason"] == "KID needs subsets of at least 2 images, kid_subset_size=1"


def test_a_likelihood_that_is_no_number_is_null_with_the_reason(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "code_nll", lambda _logits, target: target * float("nan"))
    assert run(world, tmp_path, metrics="[nll,bits_per_dim]") == 0
    scores = scores_of(tmp_path)
    assert [scores[key]["value"] for key in ("nll/top", "nll/bottom", "bits_per_dim")] == [None] * 3
    assert scores["nll/top"]["reason"] == "the computed value is nan"


def test_a_distance_that_is_infinite_is_null_with_the_reason(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples.metrics, "frechet", lambda *_: float("inf"))
    assert run(world, tmp_path, metrics="[fid]") == 0
    assert scores_of(tmp_path)["fid"]["value"] is None
