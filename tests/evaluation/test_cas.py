"""Classification accuracy score: whose classifiers, tested on what, and which are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vqscale import cli
from vqscale.config import as_dict
from vqscale.data.shards import Manifest
from vqscale.models.classifier import Classifier, ClassifierConfig
from vqscale.models.init import initialise
from vqscale.models.pretrained import save_pretrained
from vqscale.sources import load_model

CONFIG = ClassifierConfig(hidden=4, stages=1, blocks=1)


def save(folder: Path, world: Any, learned_from: str, **changes: Any) -> Tensor:
    """An exported classifier that learned nothing; returns its logits for the held-out images."""
    model = Classifier(CONFIG, 3)
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    source = world.root / ("samples" if learned_from == "samples" else "pack/train")
    extra = {
        "resolution": 16,
        "classes": ["disc", "stripes", "plain"],
        "learned_from": learned_from,
        "data": Manifest.load(source).fingerprint,
        "vqvae": world.tokenizer if learned_from == "reconstructions" else "",
        **{"features": "", "features_sha256": "", "feature_width": 0},
    }
    save_pretrained(folder, model, kind="classifier", config=as_dict(CONFIG), extra=extra | changes)
    with torch.no_grad():
        return model.eval()(world.holdout.float() / 127.5 - 1)


def run(world: Any, tmp_path: Path, **changes: object) -> int:
    config = tmp_path / "experiment" / "evaluate.yaml"
    config.parent.mkdir(exist_ok=True)
    config.write_text("metrics: [cas_top1, cas_top5]\n")
    return cli.main(["evaluate", str(config), *world.overrides(run_dir=tmp_path / "run", **changes)])


def test_the_accuracy_is_that_of_the_classifiers_on_real_images(world: Any, tmp_path: Path) -> None:
    for name in ("samples", "images"):
        logits = save(tmp_path / name, world, name)
    assert run(world, tmp_path, classifier_samples=tmp_path / "samples", classifier_real=tmp_path / "images") == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert list(scores) == ["cas_top1", "cas_top1/real", "cas_top5", "cas_top5/real"]
    right = logits.argmax(1) == torch.arange(26) % 3
    assert scores["cas_top1"]["value"] == pytest.approx(float(right.double().mean())) and scores["cas_top1"]["n"] == 26
    assert scores["cas_top5"]["value"] == 1  # of three classes
    assert scores["cas_top1"]["extractor"] == "small ResNet" and not scores["cas_top1"]["comparable_with_papers"]
    assert "learned from samples" in scores["cas_top1"]["reference"]
    assert "CAS top-1, real" in (tmp_path / "run" / "report.html").read_text()


def test_the_class_accuracy_is_that_of_the_classifier_of_real_images_on_samples(world: Any, tmp_path: Path) -> None:
    save(tmp_path / "images", world, "images")
    real = {"classifier_real": tmp_path / "images", "metrics": "[class_accuracy]"}
    assert run(world, tmp_path, **real) == 0
    (key, score), *others = json.loads((tmp_path / "run" / "scores.json").read_text()).items()
    assert key == "class_accuracy" and not others and score["n"] == Manifest.load(world.root / "samples").num_samples
    with torch.no_grad():
        model = load_model(tmp_path / "images", "classifier").model
        right = model(world.samples.float() / 127.5 - 1).argmax(1) == torch.arange(21) % 3
    assert score["value"] == pytest.approx(float(right.double().mean()))
    assert run(world, tmp_path, **real, samples="none") == 1


@pytest.mark.parametrize(
    "key, learned_from, changes, said",
    [
        ("classifier_samples", "images", {}, "learned from images, expected samples"),
        ("classifier_real", "samples", {}, "learned from samples, expected images"),
        ("classifier_samples", "samples", {"data": "sha256:0"}, "learned from samples sha256:0, but samples="),
        ("classifier_reconstructions", "reconstructions", {"vqvae": "sha256:9"}, "learned from vqvae sha256:9"),
        ("classifier_real", "images", {"classes": ["a", "b", "c"]}, "has other classes than the reference (3 classes"),
        ("classifier_real", "images", {"resolution": 32}, "takes images of 32 px, the reference has 16"),
        ("classifier_real", "images", {"data": "holdout"}, "learned from the very images it would be tested on"),
    ],
)
def test_a_classifier_of_something_else_is_refused(
    world: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    key: str,
    learned_from: str,
    changes: dict[str, Any],
    said: str,
) -> None:
    if changes.get("data") == "holdout":
        changes = {"data": Manifest.load(world.root / "pack" / "holdout").fingerprint}
    save(tmp_path / "it", world, learned_from, **changes)
    assert run(world, tmp_path, **{key: tmp_path / "it"}) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said in line and f"{key}=" in line


def test_without_the_samples_classifier_there_is_no_score_of_that_name(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "images", world, "images")
    assert run(world, tmp_path, classifier_real=tmp_path / "images") == 1
    assert "metrics=cas_top1 cannot be computed: classifier_samples" in capsys.readouterr().err
    assert run(world, tmp_path, classifier_real=tmp_path / "images", metrics="[]", extractor="inception") == 0
    assert "cas_top1/real" in json.loads((tmp_path / "run" / "scores.json").read_text())
    assert "train_classifier" in capsys.readouterr().out
