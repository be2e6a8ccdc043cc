"""Nearest training images: the right ones, closest first, beside how close held-out images come."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vqscale import cli
from vqscale.data.shards import Manifest
from vqscale.evaluation import passes
from vqscale.evaluation.features import Extractor
from vqscale.evaluation.inputs import DataSet
from vqscale.evaluation.samples import find_neighbours, nearest


def test_nearest_by_hand_and_exact_where_rounding_would_show() -> None:
    training = torch.tensor([[0.0, 0], [3, 4], [10_000, 10_000]])
    distances, rows = nearest(torch.tensor([[0.0, 1], [10_000, 10_000]]), training, 2)
    assert rows.tolist() == [[0, 1], [2, 1]]
    assert distances[0].tolist() == pytest.approx([1, 18**0.5]) and distances[1, 0] == 0


def test_a_sample_that_is_a_training_image_is_found_first(world: Any, quick: Extractor) -> None:
    """`samples` here are the held-out images, two of them exchanged for training images in feature space."""
    holdout, train = (DataSet("x", world.root / "pack" / part, _manifest(world, part)) for part in ("holdout", "train"))
    of_train, of_holdout = quick(world.train).pooled, quick(world.holdout).pooled
    of_samples = of_holdout.clone()
    of_samples[7], of_samples[20] = of_train[31], of_train[4] + 1e-4
    found = find_neighbours(holdout, of_samples, train, of_train, of_holdout, count=3, resolution=16)
    assert found.images.shape == (3, 4, 3, 16, 16) and found.distances.shape == (3, 3)
    assert torch.equal(found.images[0, 0], world.holdout[7]) and torch.equal(found.images[0, 1], world.train[31])
    assert torch.equal(found.images[1, 0], world.holdout[20]) and torch.equal(found.images[1, 1], world.train[4])
    assert found.distances[0, 0] == 0 and (found.distances[:, 0].diff() >= 0).all()
    assert found.names[0][:2] == ["stripes", "stripes"]  # 7 and 31, both 1 of 3
    assert "40 training images" in found.summary and "26 samples" in found.summary


def test_without_held_out_images_there_is_nothing_to_compare_with(world: Any, quick: Extractor) -> None:
    holdout, train = (DataSet("x", world.root / "pack" / part, _manifest(world, part)) for part in ("holdout", "train"))
    of_train, of_holdout = quick(world.train).pooled, quick(world.holdout).pooled
    found = find_neighbours(holdout, of_holdout, train, of_train, of_train[:0], count=2, resolution=16)
    assert "the reference has no images to compare that with" in found.summary


def _manifest(world: Any, part: str) -> Manifest:
    return Manifest.load(world.root / "pack" / part)


def run(world: Any, tmp_path: Path, *words: str) -> int:
    config = tmp_path / "experiment" / "evaluate.yaml"
    config.parent.mkdir(exist_ok=True)
    config.write_text("extractor: inception\nweights: given\nmetrics: [fid]\nneighbours: 4\n")
    inputs = world.overrides(run_dir=tmp_path / "run", vqvae="none", codes="none", prior_top="none")
    return cli.main(["evaluate", str(config), *inputs, "prior_bottom=none", *words])


def test_the_report_shows_them(
    world: Any,
    tmp_path: Path,
    quick: Extractor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(passes, "load_extractor", lambda *_args, **_more: quick)
    assert run(world, tmp_path, f"training={world.root}/pack", "training_images=30") == 0
    report = (tmp_path / "run" / "report.html").read_text()
    assert report.count('class="near"') == 4 and "nearest of 30 training images" in report
    assert "The reference is at distance" in report  # the checks
    assert run(world, tmp_path, "training=none") == 1
    assert "neighbours=4 needs training images: training=none" in capsys.readouterr().err
