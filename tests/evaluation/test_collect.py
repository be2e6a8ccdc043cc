"""One pass over a data set: complete, and equal at any number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.extractors import projection

from vqscale import cli
from vqscale.data.images import ImageReader
from vqscale.data.sequential import sequential_batches
from vqscale.evaluation import passes
from vqscale.evaluation.features import Extractor
from vqscale.evaluation.passes import Collector, collect_images
from vqscale.evaluation.statistics import FeatureSet, moments_of
from vqscale.topology import Topology


def batches(folder: Path, topology: Topology, batch: int) -> Any:
    return sequential_batches(
        folder, read=ImageReader(16), batch=batch, rank=topology.rank, world_size=topology.world_size
    )


def collect(batches: Any, extractor: Extractor, total: int, topology: Topology) -> FeatureSet:
    collector = Collector(extractor, total, topology)
    for batch in batches:
        collector.add(batch["image"], batch["position"], batch["weight"])
    return collector.finish()


def test_features_come_in_stored_order(world: Any, topology: Topology) -> None:
    found = collect(batches(world.root / "pack" / "holdout", topology, 7), projection(), 26, topology)
    expected = projection()(world.holdout).pooled
    torch.testing.assert_close(found.features, expected)
    torch.testing.assert_close(found.gaussians["pooled"].covariance, moments_of(expected).covariance)


def test_images_in_memory_give_the_same(world: Any, topology: Topology) -> None:
    found = collect_images(world.holdout, projection(), topology, batch=8)
    torch.testing.assert_close(found.features, projection()(world.holdout).pooled)
    assert found.n == 26


def test_a_missing_image_is_an_error(world: Any, topology: Topology) -> None:
    short = list(batches(world.root / "pack" / "holdout", topology, 13))[:1]
    with pytest.raises(ValueError, match="13 of 26 images could not be read"):
        collect(short, projection(), 26, topology)


def evaluated(root: str, config: str, words: list[str]) -> dict[str, Any]:
    """`vqscale evaluate` on one of the ranks; the scores as read from disk."""
    passes.load_extractor = lambda *_args, **_more: projection()  # type: ignore[assignment]
    assert cli.main(["evaluate", config, *words]) == 0
    return json.loads((Path(root) / "scores.json").read_text())


def test_the_stage_gives_the_same_scores_on_two_ranks(world: Any, tmp_path: Path) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text("kid_subset_size: 12\nmetrics: [fd_lite0, kid, recall, psnr, nll, used_codes, bits_per_dim]\n")
    found = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        words = world.overrides(run_dir=folder, batch=5)
        found.append(run_ranks(evaluated, world_size, str(folder), str(config), words)[0])
        assert (folder / "report.html").is_file()
    one, two = ({key: score["value"] for key, score in scores.items()} for scores in found)
    assert list(one) == list(two) and len(one) == 9
    assert two == pytest.approx(one, rel=1e-6)
    assert {key: score["n"] for key, score in found[0].items()} == {key: score["n"] for key, score in found[1].items()}
