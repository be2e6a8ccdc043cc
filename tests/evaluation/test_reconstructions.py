"""What a VQ-VAE makes of images: the model's own figures, equal at any number of ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.distributed import run_ranks
from support.extractors import projection

from vqscale.config import StageConfig
from vqscale.data.images import ImageReader, to_float, to_uint8
from vqscale.data.sequential import read_runs
from vqscale.data.shards import Manifest
from vqscale.evaluation import passes
from vqscale.evaluation.codes import likelihood, read_codes
from vqscale.evaluation.inputs import DataSet
from vqscale.evaluation.metrics import psnr, ssim
from vqscale.evaluation.reconstructions import (
    Reconstructions,
    examples_of,
    gather_reconstructions,
    reconstruction_rows,
    spread,
)
from vqscale.evaluation.statistics import frechet_distance, moments_of
from vqscale.sources import load_model
from vqscale.topology import Topology, bring_up, take_down


def reconstructed(root: Path, folder: Path, topology: Topology, block: int, **networks: Any) -> Reconstructions:
    """All 26 held-out images, in chunks of `passes.CHUNK`."""
    model, extractor = load_model(root / "vqvae", "vqvae").model, networks.get("extractor")
    mine = passes.chunks_of(26)[topology.rank :: topology.world_size]
    batches = read_runs(root / "pack" / "holdout", mine, read=ImageReader(16), block=block)
    rows = reconstruction_rows(model, topology, extractor, networks.get("perceptual"))
    assert passes.compute_chunks(folder, mine, batches, rows, block) == 0
    chunks = passes.read_chunks(folder, mine)
    return gather_reconstructions(chunks, model, 26, topology, extractor, "perceptual" in networks)


def everything(root: str, folder: str, block: int) -> dict[str, Any]:
    """All that an evaluation sums over ranks, on one of them."""
    passes.CHUNK = 8
    topology = bring_up(StageConfig(device="cpu", threads=1))
    try:
        found = reconstructed(Path(root), Path(folder), topology, block, extractor=projection())
        assert found.features is not None
        held_out = Path(root) / "codes" / "holdout"
        codes = read_codes(DataSet("codes", held_out, Manifest.load(held_out)))
        prior = load_model(Path(root) / "prior_bottom", "prior").model
        other = moments_of(found.features.features + 1)
        return {
            "numbers": [found.mse, found.psnr, found.ssim, frechet_distance(found.features.gaussians["pooled"], other)],
            "nll": likelihood(prior, codes, "bottom", topology, batch=block).per_code(),
            "usage": {name: counts.tolist() for name, counts in found.usage.items()},
            "features": found.features.features.numpy(),
        }
    finally:
        take_down(orderly=True)


def test_two_ranks_find_what_one_finds(world: Any, tmp_path: Path) -> None:
    (one,) = run_ranks(everything, 1, str(world.root), str(tmp_path / "one"), 26)
    both = run_ranks(everything, 2, str(world.root), str(tmp_path / "both"), 3)  # 8 = 3 + 3 + 2 and padding
    for rank in both:
        np.testing.assert_allclose(rank["numbers"], one["numbers"], rtol=1e-10)
        assert rank["nll"] == pytest.approx(one["nll"], rel=1e-6)
        assert rank["usage"] == one["usage"]
        np.testing.assert_allclose(rank["features"], one["features"], rtol=1e-5, atol=1e-6)
    assert both[0]["numbers"] == both[1]["numbers"]


@torch.inference_mode()
def test_the_figures_are_the_models(world: Any, topology: Topology, tmp_path: Path) -> None:
    found = reconstructed(world.root, tmp_path, topology, 8)
    output = load_model(world.root / "vqvae", "vqvae").model(to_float(world.holdout))
    picture = to_uint8(output.reconstruction)
    error = (output.reconstruction - to_float(world.holdout)).square().mean()
    assert found.n == 26 and found.mse == pytest.approx(float(error), rel=1e-5)
    assert found.psnr == pytest.approx(float(psnr(picture, world.holdout).mean()), rel=1e-6)
    assert found.ssim == pytest.approx(float(ssim(picture, world.holdout).mean()), rel=1e-6)
    assert found.lpips is None and found.features is None
    assert found.usage["top"].tolist() == torch.bincount(output.codes[0].flatten(), minlength=16).tolist()


def test_a_distance_of_pairs_is_averaged(world: Any, topology: Topology, tmp_path: Path) -> None:
    def first_pixel(pictures: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return (pictures[:, 0, 0, 0].float() - images[:, 0, 0, 0].float()).abs()

    found = reconstructed(world.root, tmp_path, topology, 8, perceptual=first_pixel)
    model = load_model(world.root / "vqvae", "vqvae").model
    pictures = to_uint8(model(to_float(world.holdout)).reconstruction.detach())
    assert found.lpips == pytest.approx(float(first_pixel(pictures, world.holdout).mean()), rel=1e-6)


@torch.inference_mode()
def test_examples_are_spread_over_the_set(world: Any, topology: Topology) -> None:
    assert spread(10, 10).tolist() == list(range(10)) and spread(3, 8).tolist() == [0, 1, 2]
    assert spread(100, 4).tolist() == [12, 37, 62, 87]
    folder, model = world.root / "pack" / "holdout", load_model(world.root / "vqvae", "vqvae").model
    data = DataSet("pack", folder, Manifest.load(folder))
    found, shown = examples_of(model, data, 3, topology), [4, 13, 21]
    assert torch.equal(found.originals, world.holdout[shown])
    assert torch.equal(found.pictures, to_uint8(model(to_float(world.holdout[shown])).reconstruction))
    assert found.names == [data.manifest.classes[n % 3] for n in shown]
