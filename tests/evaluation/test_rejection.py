"""Rejection sampling: which samples are kept, what the curve says, and that no network judges for its own score."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vqscale import cli
from vqscale.data.shards import Manifest, ShardWriter
from vqscale.evaluation import passes
from vqscale.evaluation.classify import CLASS_PROBABILITY
from vqscale.evaluation.features import Extractor
from vqscale.evaluation.figures import png_bytes
from vqscale.evaluation.samples import ClassConfidence, accepted_rows
from vqscale.evaluation.statistics import frechet_distance, moments_of

CLASSES = ["disc", "stripes", "plain"]


def judged(n: int = 40) -> ClassConfidence:
    return ClassConfidence(torch.linspace(0, 1, n, dtype=torch.float64), torch.arange(n) % 4)


def test_the_surest_of_every_class_are_kept() -> None:
    rows = accepted_rows(judged(), 0.2)
    assert rows.tolist() == list(range(32, 40))  # 2 of the 10 of each class, the last ones
    assert accepted_rows(judged(), 1.0).tolist() == list(range(40))
    assert accepted_rows(judged(), 0.001).tolist() == [36, 37, 38, 39]  # never a class without any


def test_a_random_share_is_as_large_and_addressed() -> None:
    one, again, other = (accepted_rows(judged(), 0.3, seed=seed).tolist() for seed in (1, 1, 2))
    assert one == again != other and len(one) == 12
    assert np.bincount(np.array(one) % 4).tolist() == [3, 3, 3, 3]


def write_samples(folder: Path, images: torch.Tensor, probabilities: list[float | None], sha256: str) -> None:
    folder.mkdir()
    with ShardWriter(folder / "000000.tar") as writer:
        for n, probability in enumerate(probabilities):
            about = {"sample": n} | ({} if probability is None else {CLASS_PROBABILITY: probability})
            parts = {"png": png_bytes(images[n]), "cls": str(n % 3).encode(), "json": json.dumps(about).encode()}
            writer.write(f"{n:06d}", parts)
    assert writer.info is not None
    judge = {"classifier": "sha256:1", "features": "lite0" if sha256 else "", "features_sha256": sha256}
    transform = {"resolution": 16, "format": "png"}
    Manifest.of("samples", [writer.info], CLASSES, transform, {"rejection": judge}).save(folder)


def run(world: Any, tmp_path: Path, *words: str) -> int:
    config = tmp_path / "experiment" / "evaluate.yaml"
    config.parent.mkdir(exist_ok=True)
    config.write_text("extractor: inception\nweights: given\n")
    inputs = world.overrides(run_dir=tmp_path / "run", samples=tmp_path / "judged", vqvae="none", codes="none")
    return cli.main(["evaluate", str(config), *inputs, "prior_top=none", "prior_bottom=none", *words])


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch, quick: Extractor) -> Extractor:
    monkeypatch.setattr(passes, "load_extractor", lambda *_args, **_more: quick)
    return quick


def test_the_curve_is_that_of_the_kept_samples(world: Any, tmp_path: Path, scorer: Extractor) -> None:
    """Every second sample is a real training image that the classifier likes, the others are noise."""
    noise = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    images = torch.where((torch.arange(40) % 2 == 0)[:, None, None, None], world.train, noise)
    write_samples(tmp_path / "judged", images, [0.9 - n / 1000 if n % 2 == 0 else 0.1 for n in range(40)], "")
    assert run(world, tmp_path, "acceptance=[1.0,0.5,0.1]", "metrics=[fid,inception_score,precision,recall]") == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    value = {key: score["value"] for key, score in scores.items()}
    assert value["fid/accepted_1.00"] == pytest.approx(value["fid"], rel=1e-9)
    assert value["fid/accepted_0.50"] < value["fid/random_0.50"] and "fid/random_1.00" not in value
    assert value["precision/accepted_0.50"] > value["precision/accepted_1.00"]
    rows = accepted_rows(ClassConfidence(*_stored(tmp_path / "judged")), 0.5)
    own, real = (moments_of(scorer(x).pooled) for x in (images[rows], world.holdout))
    assert value["fid/accepted_0.50"] == pytest.approx(frechet_distance(own, real), rel=1e-6)
    assert scores["fid/accepted_0.50"]["n"] == len(rows) == 19  # 7 of 14, 6 of 13, 6 of 13
    assert scores["inception_score/accepted_0.10"]["value"] is None  # of 4 images
    report = (tmp_path / "run" / "report.html").read_text()
    assert "FID over acceptance rates" in report and "FID, at random" in report


def _stored(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with tarfile.open(folder / "000000.tar") as tar:
        read = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    abouts = [json.load(io.BytesIO(read[name])) for name in sorted(read) if name.endswith("json")]
    labels = [int(read[name]) for name in sorted(read) if name.endswith("cls")]
    return torch.tensor([about[CLASS_PROBABILITY] for about in abouts], dtype=torch.float64), torch.tensor(labels)


def test_the_network_that_judged_may_not_score(
    world: Any, tmp_path: Path, scorer: Extractor, capsys: pytest.CaptureFixture[str]
) -> None:
    write_samples(tmp_path / "judged", world.samples, [0.5] * 21, scorer.weights_sha256)
    assert run(world, tmp_path, "metrics=[fid]") == 1
    assert "judged on features of lite0 ffffffffffff, the very network" in capsys.readouterr().err
    assert run(world, tmp_path, "metrics=[fid]", "acceptance=[]") == 0
    assert list(json.loads((tmp_path / "run" / "scores.json").read_text())) == ["fid"]


def test_mistakes_are_one_line(
    world: Any, tmp_path: Path, scorer: Extractor, capsys: pytest.CaptureFixture[str]
) -> None:
    write_samples(tmp_path / "judged", world.samples, [0.5] * 20 + [None], "")
    assert run(world, tmp_path, "metrics=[fid]") == 1
    assert "000020 has no class_probability" in capsys.readouterr().err
    assert run(world, tmp_path, "metrics=[fid]", "acceptance=[0.5,0]") == 1
    assert "must be above 0 and at most 1" in capsys.readouterr().err
