"""One pass over a data set: complete, and equal at any number of ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.distributed import run_ranks
from torch import Tensor

from vqscale import cli, topology
from vqscale.config import StageConfig
from vqscale.data.images import ImageReader, to_float, to_uint8
from vqscale.data.sequential import sequential_batches
from vqscale.evaluation.collect import Collector, collect_images, reconstruct, spread
from vqscale.evaluation.features import Extractor, Features
from vqscale.evaluation.metrics import psnr, ssim
from vqscale.evaluation.moments import frechet_distance, moments_of
from vqscale.evaluation.nll import likelihood, read_codes
from vqscale.evaluation.statistics import FeatureSet
from vqscale.sources import load_prior, load_vqvae
from vqscale.stages import evaluate
from vqscale.topology import Topology


def projection() -> Extractor:
    weight = torch.randn(3 * 16 * 16, 24, generator=torch.Generator().manual_seed(9)) / 50

    def features(images: Tensor) -> Features:
        pooled = (images.float().flatten(1) / 255) @ weight
        return Features(pooled, pooled[:, :10], pooled[:, :7])

    return Extractor("lite0", "0" * 64, True, "none", "random projection", features)


def batches(folder: Path, place: Topology, batch: int) -> Any:
    return sequential_batches(folder, read=ImageReader(16), batch=batch, rank=place.rank, world_size=place.world_size)


def collect(batches: Any, extractor: Extractor, total: int, place: Topology) -> FeatureSet:
    collector = Collector(extractor, total, place)
    for batch in batches:
        collector.add(batch["image"], batch["position"], batch["weight"])
    return collector.finish()


def everything(root: str, batch: int) -> dict[str, Any]:
    """All that an evaluation sums over ranks, on one of them."""
    place = topology.bring_up(StageConfig(device="cpu", threads=1))
    try:
        folder, model = Path(root) / "pack" / "holdout", load_vqvae(Path(root) / "vqvae").model
        found = reconstruct(model, batches(folder, place, batch), 26, place, extractor=projection(), examples=5)
        real = collect(batches(folder, place, batch), projection(), 26, place)
        assert found.features is not None and found.features.gaussian is not None and real.gaussian is not None
        codes, prior = read_codes(Path(root) / "codes" / "holdout"), load_prior(Path(root) / "prior_bottom").model
        return {
            "numbers": [found.mse, found.psnr, found.ssim, frechet_distance(found.features.gaussian, real.gaussian)],
            "nll": likelihood(prior, codes, "bottom", place, batch=batch).per_code(),
            "usage": {name: counts.tolist() for name, counts in found.usage.items()},
            "features": real.features.numpy(),
            "pictures": found.pictures.numpy(),
        }
    finally:
        topology.take_down(orderly=True)


def test_two_ranks_find_what_one_finds(world: Any) -> None:
    (one,) = run_ranks(everything, 1, str(world.root), 26)
    both = run_ranks(everything, 2, str(world.root), 4)  # 26 = 3 rounds of 2 x 4, and 2 left over: padding
    for rank in both:
        np.testing.assert_allclose(rank["numbers"], one["numbers"], rtol=1e-10)
        assert rank["nll"] == pytest.approx(one["nll"], rel=1e-6)
        assert rank["usage"] == one["usage"]
        np.testing.assert_allclose(rank["features"], one["features"], rtol=1e-5, atol=1e-6)
        assert (rank["pictures"] == one["pictures"]).all()
    assert both[0]["numbers"] == both[1]["numbers"]


def test_features_come_in_stored_order(world: Any, place: Topology) -> None:
    found = collect(batches(world.root / "pack" / "holdout", place, 7), projection(), 26, place)
    expected = projection()(world.holdout).pooled
    torch.testing.assert_close(found.features, expected)
    assert found.gaussian is not None
    torch.testing.assert_close(found.gaussian.covariance, moments_of(expected).covariance)


def test_images_in_memory_give_the_same(world: Any, place: Topology) -> None:
    found = collect_images(world.holdout, projection(), place, batch=8)
    torch.testing.assert_close(found.features, projection()(world.holdout).pooled)
    assert found.n == 26


def test_a_missing_image_is_an_error(world: Any, place: Topology) -> None:
    short = list(batches(world.root / "pack" / "holdout", place, 13))[:1]
    with pytest.raises(ValueError, match="13 of 26 images could not be read"):
        collect(short, projection(), 26, place)
    with pytest.raises(ValueError, match="13 of 26 images could not be read"):
        reconstruct(load_vqvae(world.root / "vqvae").model, short, 26, place)


@torch.inference_mode()
def test_reconstruction_figures_are_the_models(world: Any, place: Topology) -> None:
    model = load_vqvae(world.root / "vqvae").model
    found = reconstruct(model, batches(world.root / "pack" / "holdout", place, 8), 26, place, examples=3)
    output = model(to_float(world.holdout))
    picture = to_uint8(output.reconstruction)
    error = (output.reconstruction - to_float(world.holdout)).square().mean()
    assert found.mse == pytest.approx(float(error), rel=1e-5)
    assert found.psnr == pytest.approx(float(psnr(picture, world.holdout).mean()), rel=1e-6)
    assert found.ssim == pytest.approx(float(ssim(picture, world.holdout).mean()), rel=1e-6)
    assert found.usage["top"].tolist() == torch.bincount(output.codes[0].flatten(), minlength=16).tolist()
    shown = [4, 13, 21]
    assert spread(26, 3).tolist() == shown
    assert torch.equal(found.originals, world.holdout[shown]) and torch.equal(found.pictures, picture[shown])
    assert found.labels.tolist() == [n % 3 for n in shown]


def test_examples_are_spread_over_the_set() -> None:
    assert spread(10, 10).tolist() == list(range(10)) and spread(3, 8).tolist() == [0, 1, 2]
    assert spread(100, 4).tolist() == [12, 37, 62, 87]


def evaluated(root: str, config: str, words: list[str]) -> dict[str, Any]:
    """`vqscale evaluate` on one of the ranks; the scores as read from disk."""
    evaluate.load_extractor = lambda *_args, **_more: projection()  # type: ignore[assignment]
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
