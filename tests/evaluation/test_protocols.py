"""What makes a number comparable: one case that fits each protocol, and every way in which one does not."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from vqscale import cli
from vqscale.data.shards import Manifest, ShardWriter, shard_info
from vqscale.evaluation import inputs
from vqscale.evaluation.features import INCEPTION_RESIZE, INCEPTION_SHA256, Extractor, Features
from vqscale.evaluation.inputs import DataSet, EvaluateConfig, Inputs, follow_protocol, reference_facts
from vqscale.evaluation.protocols import (
    ADM_SHA256,
    PROTOCOLS,
    Facts,
    benchmark_of,
    extractor_facts,
    image_set_facts,
    judge,
    sample_facts,
)
from vqscale.evaluation.scores import METRICS
from vqscale.evaluation.statistics import Gaussian, PublishedReference
from vqscale.stages import pack

ROOT = Path(__file__).parents[2]
ADM_PNG = {"resolution": 256, "resize": "adm", "crop": "center", "format": "png"}
SAMPLES = {"resolution": 256, "format": "png"}
VALIDATION = "ImageNet validation"
BILINEAR = {"resize": "bilinear, antialiased", "crop": "center"}


def inception(sha256: str = INCEPTION_SHA256 + "0" * 56, resize: str = INCEPTION_RESIZE) -> Extractor:
    return Extractor("inception", sha256, True, resize, "p", lambda images: Features(images, images))


def published(sha256: str = ADM_SHA256, images: int = 10_000) -> PublishedReference:
    """A file of statistics with that many images, which take no memory."""
    nothing = torch.zeros(1, dtype=torch.float64)
    pixels = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(images, 3, 256, 256)
    return PublishedReference("r.npz", f"sha256:{sha256}", {"pooled": Gaussian(0, nothing, nothing[None])}, pixels)


def of_samples(n: int = 50_000, reference: PublishedReference | None = None, **transform: Any) -> Facts:
    return (
        sample_facts(n, SAMPLES | transform) | reference_facts(reference or published()) | extractor_facts(inception())
    )


def of_reconstructions(n: int = 50_000, split: str | None = VALIDATION, **transform: Any) -> Facts:
    return image_set_facts(n, split, ADM_PNG | transform) | extractor_facts(inception())


@pytest.mark.parametrize("metric", ["fid", "sfid", "inception_score", "precision", "recall"])
def test_samples_measured_as_adm_does_are_comparable(metric: str) -> None:
    standing = judge(metric, of_samples())
    assert (standing.protocol, standing.preparation, standing.reason) == ("adm_gfid", "ADM's own", "")
    assert judge(metric, of_samples(), "adm_gfid") == standing


@pytest.mark.parametrize("metric", ["reconstruction_fid", "psnr"])
def test_reconstructions_of_the_validation_set_are_comparable(metric: str) -> None:
    standing = judge(metric, of_reconstructions())
    assert standing.protocol == "rfid_imagenet_val" and standing.reason == ""
    assert standing.preparation == "resized by ADM's rule to 256 px, centre crop, PNG"


@pytest.mark.parametrize(
    "facts, reason",
    [
        (of_samples(400), "samples: 400, not 50,000"),
        (of_samples(60_000), "samples: 60,000, not 50,000"),
        (of_samples(resolution=64), "sample resolution: 64, not 256"),
        (of_samples(format="jpg", quality=95), "sample encoding: JPEG of quality 95, not lossless PNG"),
        (of_samples(format=None), "sample encoding: unknown"),
        (
            of_samples(reference=published("c" * 64)),
            "reference: a file of statistics (sha256 cccccccccccc), not ADM's VIRTUAL_imagenet256_labeled.npz "
            "(sha256 b32732719497)",
        ),
        (of_samples(reference=published(images=5_000)), "reference images: 5,000, not 10,000"),
        (
            of_samples() | extractor_facts(inception("d" * 64)),
            "extractor weights: sha256 dddddddd, not sha256 6726825d",
        ),
        (
            of_samples() | extractor_facts(inception(resize="bilinear")),
            f"extractor resize: bilinear, not {INCEPTION_RESIZE}",
        ),
        (
            of_samples() | extractor_facts(dataclasses.replace(inception("e" * 64), name="lite0")),
            "extractor: lite0, not inception",
        ),
    ],
)
def test_samples_measured_otherwise_say_what_differs(facts: Facts, reason: str) -> None:
    assert judge("precision", facts).reason == f"not as adm_gfid: {reason}"


@pytest.mark.parametrize(
    "facts, reason",
    [
        (of_reconstructions(format="jpg", quality=95), "reference encoding: JPEG of quality 95, not lossless PNG"),
        (of_reconstructions(resize="bilinear, antialiased"), "reference resize: bilinear, antialiased, not adm"),
        (
            of_reconstructions(resize=None, crop=None, format=None),
            "reference resize, reference crop, reference encoding: unknown",
        ),
        (of_reconstructions(5_000), "reference images: 5,000, not 50,000"),
        (of_reconstructions(split="train of imagenet"), f"reference split: train of imagenet, not {VALIDATION}"),
        (of_reconstructions(split=None), "reference split: unknown"),
        (of_reconstructions(resolution=128), "reference resolution: 128, not 256"),
    ],
)
def test_reconstructions_measured_otherwise_say_what_differs(facts: Facts, reason: str) -> None:
    assert judge("reconstruction_fid", facts).reason == f"not as rfid_imagenet_val: {reason}"


def test_the_number_of_images_in_the_reference_matters_to_precision_and_recall_alone() -> None:
    facts = of_samples(reference=published(images=5_000))
    assert judge("fid", facts).reason == "" and judge("recall", facts).reason != ""


def test_several_differences_are_named_at_once() -> None:
    facts = image_set_facts(50_000, VALIDATION, {"resolution": 256, "format": "jpg", "quality": 95} | BILINEAR)
    reason = judge("reconstruction_fid", facts | extractor_facts(inception())).reason
    assert reason == (
        "not as rfid_imagenet_val: reference resize: bilinear, antialiased, not adm; "
        "reference encoding: JPEG of quality 95, not lossless PNG"
    )


def test_images_of_unknown_preparation_say_so() -> None:
    """Indexed tars record at most a resolution."""
    standing = judge("fid", of_samples() | image_set_facts(50_000, VALIDATION, {"resolution": 256}))
    assert standing.preparation == "preparation unknown" and standing.reason.startswith(
        "not as adm_gfid: reference: a set of images"
    )


@pytest.mark.parametrize("metric", [key for key in METRICS if not any(key in p.wants for p in PROTOCOLS.values())])
def test_a_metric_without_a_protocol_is_never_comparable(metric: str) -> None:
    standing = judge(metric, of_samples() | of_reconstructions())
    assert standing.protocol is None and standing.reason == "papers have no common protocol for it"


def test_unverified_weights_are_named_with_any_metric() -> None:
    facts = extractor_facts(dataclasses.replace(inception("d" * 64), verified=False))
    assert judge("kid", of_samples() | facts).reason.endswith("protocol for it; weights of unknown origin")
    assert judge("fid", of_samples() | facts).reason == (
        "not as adm_gfid: extractor weights: sha256 dddddddd, not sha256 6726825d; weights of unknown origin"
    )


def test_nothing_is_comparable_where_the_paper_leaves_its_protocol_open() -> None:
    for metric in PROTOCOLS["vqvae2"].wants:
        standing = judge(metric, of_samples() | of_reconstructions(), "vqvae2")
        assert standing.protocol == "vqvae2" and standing.reason == (
            "not as vqvae2: its source does not give the count of samples, reference split, count of reference images, "
            "preparation of images"
        )


def test_every_protocol_has_metrics_of_the_table_and_a_source() -> None:
    for name, protocol in PROTOCOLS.items():
        assert name == protocol.name and protocol.source and set(protocol.wants) <= set(METRICS)


# --- the split of an image set ----------------------------------------------------------------------------------------


def data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: np.ndarray, name: str = "ILSVRC2012_val", **extra: str
) -> DataSet:
    """Declared, not stored."""
    classes = [f"n{1440764 + n:08d}" for n in range(1000)]
    manifest = dataclasses.replace(Manifest.of("images", [], classes, ADM_PNG, extra), num_samples=len(labels))
    monkeypatch.setattr(DataSet, "labels", lambda _self: labels)
    monkeypatch.setattr(DataSet, "_names", lambda _self: {f"{name}_{n + 1:08d}" for n in range(len(labels))})
    return DataSet("given", tmp_path, manifest)


def test_names_of_images_are_their_files(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "0.tar") as writer:
        for key in ("n01440764/ILSVRC2012_val_00000293", "ILSVRC2012_val_00000001"):
            writer.write(key, {"png": b"", "cls": b"0"})
    info = shard_info(tmp_path / "0.tar")
    assert info is not None
    images = DataSet("given", tmp_path, Manifest.of("images", [info], ["n01440764"], ADM_PNG))
    assert images._names() == {"ILSVRC2012_val_00000293", "ILSVRC2012_val_00000001"}


def test_the_validation_set_is_known_by_its_counts_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifty_each = np.repeat(np.arange(1000), 50)
    assert benchmark_of([f"n{1440764 + n:08d}" for n in range(1000)]) == "ImageNet"
    assert data_set(tmp_path, monkeypatch, fifty_each, split="holdout", source="val").split == VALIDATION
    of_train = data_set(tmp_path, monkeypatch, fifty_each, "n01440764", split="train", source="fifty of each")
    assert of_train.split == "train of fifty of each"
    uneven = np.append(fifty_each[1:], 999)
    other = data_set(tmp_path, monkeypatch, uneven, split="holdout", source="train")
    assert other.split == "holdout of train" and judge("psnr", reference_facts(other)).reason != ""
    assert data_set(tmp_path, monkeypatch, uneven).split is None
    part = dataclasses.replace(data_set(tmp_path, monkeypatch, fifty_each, split="holdout", source="val"), limit=5_000)
    assert judge("psnr", reference_facts(part)).reason == (
        f"not as rfid_imagenet_val: reference split: holdout of val, not {VALIDATION}; "
        "reference images: 5,000, not 50,000"
    )


# --- presets ----------------------------------------------------------------------------------------------------------


def config(**changes: Any) -> EvaluateConfig:
    return dataclasses.replace(EvaluateConfig(), **changes)


def test_a_preset_chooses_metrics_and_extractor() -> None:
    assert follow_protocol(config()) == config()
    chosen = follow_protocol(config(protocol="adm_gfid"))
    assert chosen.metrics == ["fid", "sfid", "inception_score", "precision", "recall"]
    assert chosen.extractor == "inception"
    assert follow_protocol(config(protocol="rfid_imagenet_val", metrics=["psnr"])).metrics == ["psnr"]


def test_a_preset_refuses_other_metrics_and_extractors() -> None:
    with pytest.raises(ValueError, match=r"metrics=\[kid\]: protocol=adm_gfid has fid, sfid, inception_score, precis"):
        follow_protocol(config(protocol="adm_gfid", metrics=["fid", "kid"]))
    with pytest.raises(ValueError, match="extractor=vgg16: protocol=adm_gfid wants inception"):
        follow_protocol(config(protocol="adm_gfid", extractor="vgg16"))


def refusal(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], **changes: object) -> str:
    """The one line of a run that computes nothing."""
    file = tmp_path / "experiment" / "evaluate.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text("extractor: inception\n")
    words = world.overrides(run_dir=tmp_path / "run", **changes)
    assert cli.main(["evaluate", str(file), *words]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert not (tmp_path / "run" / "scores.json").exists() and not (tmp_path / "run" / "statistics").exists()
    return line


def test_adm_gfid_refuses_what_does_not_fit(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(world, tmp_path, capsys, protocol="adm_gfid")
    assert "protocol=adm_gfid cannot be followed: weights=: no file, torch-fidelity's weights-inception" in line
    assert "; samples: 21, not 50,000; sample resolution: 16, not 256; reference: a set of images, not ADM's" in line
    assert "reference images: 26, not 10,000" in line
    given = tmp_path / "weights.pth"
    given.write_bytes(b"others")
    line = refusal(world, tmp_path, capsys, protocol="adm_gfid", weights=given, samples=tmp_path / "gone")
    assert "gone does not exist" in line and "extractor weights: sha256 " in line and "not sha256 6726825d" in line
    assert "samples: unknown" not in line  # said once: they are not there


def test_rfid_refuses_what_does_not_fit(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jpeg = tmp_path / "jpeg"
    shutil.copytree(world.root / "pack" / "holdout", jpeg)
    manifest = Manifest.load(jpeg)
    transform = {"resolution": 16, "format": "jpg", "quality": 95, **BILINEAR}
    dataclasses.replace(manifest, transform=transform, extra={"split": "holdout", "source": "birds"}).save(jpeg)
    line = refusal(world, tmp_path, capsys, protocol="rfid_imagenet_val", reference=jpeg, metrics="[psnr]")
    assert f"reference split: holdout of birds, not {VALIDATION}; reference images: 26, not 50,000; " in line
    assert "reference resolution: 16, not 256; reference resize: bilinear, antialiased, not adm; " in line
    assert "reference encoding: JPEG of quality 95, not lossless PNG" in line and "reference crop" not in line
    line = refusal(world, tmp_path, capsys, protocol="rfid_imagenet_val", vqvae="none", codes="none")
    assert "vqvae=none" in line


def test_vqvae2_refuses_another_resolution(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(world, tmp_path, capsys, protocol="vqvae2")
    assert "sample resolution: 16, not 256; reference resolution: 16, not 256" in line


def test_a_preset_takes_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that are declared, not stored."""
    samples = data_set(tmp_path, monkeypatch, np.zeros(50_000, np.int64))
    reference, weights = published(), {"weights": f"sha256:{INCEPTION_SHA256}"}
    chosen = follow_protocol(config(protocol="adm_gfid"))
    inputs._check_protocol(chosen, Inputs(samples, reference, weights=weights))
    with pytest.raises(ValueError, match="weights=: no file"):
        inputs._check_protocol(chosen, Inputs(samples, reference))


# --- what pack makes, and what the document says ----------------------------------------------------------------------


def test_imagenet_as_our_config_packs_it_fits_and_a_jpeg_of_it_does_not() -> None:
    stored = yaml.safe_load((ROOT / "configs" / "imagenet256" / "pack.yaml").read_text())
    packing = {key: stored[key] for key in ("resolution", "resize", "format", "quality", "holdout_format")}
    ours = pack._transform(pack.PackConfig(source="given", **packing), "holdout")
    assert judge("psnr", image_set_facts(50_000, VALIDATION, ours)).reason == ""
    older = pack._transform(pack.PackConfig(source="given", resolution=256), "holdout")
    assert judge("psnr", image_set_facts(50_000, VALIDATION, older)).reason == (
        "not as rfid_imagenet_val: reference resize: bilinear, antialiased, not adm; "
        "reference encoding: JPEG of quality 95, not lossless PNG"
    )


def test_the_document_has_the_protocols_of_the_code() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    table = {row[0].strip("`"): row for row in rows if len(row) == 6 and row[0].strip("`") in PROTOCOLS}
    assert list(table) == list(PROTOCOLS)
    for name, protocol in PROTOCOLS.items():
        _, metrics, samples, reference, *_ = table[name]
        assert metrics == " ".join(f"`{metric}`" for metric in protocol.wants)
        assert (samples == reference == "not given") == bool(protocol.unknown)
        for facts in protocol.wants.values() if not protocol.unknown else ():
            assert f"{facts.get('samples', 50_000):,}" in samples + reference
            assert f"{facts.get('reference images', 10_000):,}" in reference + samples
    assert ADM_SHA256[:12] in table["adm_gfid"][3] and INCEPTION_SHA256 in text
    for name in PROTOCOLS:
        assert f"protocol={name} weights=" in text
