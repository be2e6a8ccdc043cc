"""How well a VQ-VAE reproduces images: what to compute of a batch, what all batches come to, and examples.

In: a model in evaluation mode, batches of images, the parts of a pass.  Out: Reconstructions, equal at any number of
ranks, and pictures to look at.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqscale.batch import Batch
from vqscale.data.cache import Cache
from vqscale.data.images import to_float, to_uint8
from vqscale.evaluation.collect import feature_rows, part_collector
from vqscale.evaluation.features import Extractor
from vqscale.evaluation.gallery import images_at
from vqscale.evaluation.inputs import DataSet
from vqscale.evaluation.metrics import psnr, ssim
from vqscale.evaluation.parts import Rows, finished, parts_of
from vqscale.evaluation.perceptual import PerceptualDistance
from vqscale.evaluation.statistics import FeatureSet
from vqscale.topology import Topology


@dataclass(frozen=True)
class Reconstructions:
    """Figures of n images.

    mse: of the plain output in [-1, 1] units, as in training. psnr, ssim, lpips: means over images of the uint8
    pictures; lpips is None where it was not computed. usage: counts [K] per level.
    """

    n: int
    mse: float
    psnr: float
    ssim: float
    lpips: float | None
    usage: dict[str, np.ndarray]
    features: FeatureSet | None


@dataclass(frozen=True)
class Examples:
    """originals, pictures: uint8 [m, 3, R, R], spread evenly over a set. names: of their classes."""

    originals: Tensor
    pictures: Tensor
    names: list[str]


def reconstruction_rows(
    vqvae: Any, topology: Topology, extractor: Extractor | None, perceptual: PerceptualDistance | None
) -> Rows:
    """Batches -> errors, codes, and features of the pictures, a row per image."""

    @torch.inference_mode()
    def rows(batch: Batch) -> dict[str, Tensor]:
        image = batch["image"].to(topology.device)
        target = to_float(image)
        output = vqvae(target)
        picture = to_uint8(output.reconstruction)
        error = (output.reconstruction.double() - target.double()).square().flatten(1).mean(1)
        found = {"mse": error, "psnr": psnr(picture, image), "ssim": ssim(picture, image)}
        if perceptual is not None:
            found["lpips"] = perceptual(picture, image)
        for name, codes in zip(vqvae.level_names, output.codes, strict=True):
            found[f"codes/{name}"] = codes.int()
        return found | (feature_rows(extractor(picture)) if extractor is not None else {})

    return rows


def gather_reconstructions(
    folder: Path, vqvae: Any, total: int, topology: Topology, extractor: Extractor | None, with_lpips: bool
) -> Reconstructions:
    """All parts of all ranks as one. Every rank must call it."""
    names = ["mse", "psnr", "ssim"] + ["lpips"] * with_lpips
    sums = torch.zeros(len(names), dtype=torch.float64, device=topology.device)
    usage = {
        name: torch.zeros(vqvae.num_codes, dtype=torch.int64, device=topology.device) for name in vqvae.level_names
    }
    collector = part_collector(total, vqvae.resolution, extractor, topology) if extractor is not None else None
    for part, found in finished(folder, parts_of(total)[topology.rank :: topology.world_size]):
        sums += torch.stack([found[name].double().sum() for name in names]).to(topology.device)
        for name, histogram in usage.items():
            histogram += torch.bincount(found[f"codes/{name}"].flatten(), minlength=len(histogram)).to(topology.device)
        if collector is not None:
            collector.add_part(part, found)
    for tensor in (sums, *usage.values()):
        topology.all_reduce_(tensor)
    mse, ratio, similarity, *distance = (sums / total).tolist()
    counts = {name: histogram.cpu().numpy() for name, histogram in usage.items()}
    features = collector.finish() if collector is not None else None
    return Reconstructions(total, mse, ratio, similarity, distance[0] if distance else None, counts, features)


@torch.inference_mode()
def examples_of(vqvae: Any, data: DataSet, count: int, topology: Topology, cache: Cache | None) -> Examples:
    """`count` > 0 images and what the VQ-VAE makes of them. Raises ValueError for a damaged one."""
    found = images_at(data.folder, data.manifest, spread(data.n, count).tolist(), vqvae.resolution, cache)
    originals = torch.stack([image for image, _ in found])
    pictures = to_uint8(vqvae(to_float(originals.to(topology.device))).reconstruction).cpu()
    return Examples(originals, pictures, [name for _, name in found])


def spread(total: int, count: int) -> Tensor:
    """`count` positions (at most `total`) spread evenly over 0 … total - 1, increasing: int64."""
    count = min(total, count)
    return (2 * torch.arange(count) + 1) * total // (2 * max(1, count))
