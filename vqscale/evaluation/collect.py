"""One pass over images on all ranks: features of a data set, and of a VQ-VAE's reconstructions of it.

In: batches of `sequential_batches`, an extractor, a model.  Out: FeatureSet and Reconstructions, equal at any number
of ranks; padding counts for nothing, and an image that can't be read is an error.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqscale.data.images import to_float, to_uint8
from vqscale.evaluation.features import Extractor, Features
from vqscale.evaluation.metrics import psnr, ssim
from vqscale.evaluation.moments import Moments
from vqscale.evaluation.perceptual import PerceptualDistance
from vqscale.evaluation.statistics import FeatureSet
from vqscale.topology import Topology

KEPT = 50_000  # images whose features are held in memory, for the metrics that compare pairs


class Collector:
    """Adds up the features of `total` images, wherever they are computed; `finish` brings the ranks together."""

    def __init__(self, extractor: Extractor, total: int, place: Topology, keep: int = KEPT):
        self._extractor, self._total, self._place = extractor, total, place
        self._kept = min(total, keep)
        self._moments: dict[str, Moments] = {}
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []  # positions, features, logits; on the CPU

    def add(self, images: Tensor, position: Tensor, weight: Tensor) -> None:
        """images: uint8 [b, 3, h, w]; position: int64 [b] in 0 … total - 1; weight: [b] of 0 and 1."""
        self.add_features(self._extractor(images), position, weight)

    def add_features(self, found: Features, position: Tensor, weight: Tensor) -> None:
        """What the extractor said of the images at these positions."""
        for name, features in (("pooled", found.pooled), ("spatial", found.spatial)):
            if features is not None:
                if name not in self._moments:
                    self._moments[name] = Moments(features.shape[1], features.device)
                self._moments[name].add(features, weight)
        rows = ((weight > 0) & (position < self._kept)).nonzero().flatten()
        self._rows.append((position[rows].cpu(), found.pooled[rows].float().cpu(), found.logits[rows].float().cpu()))

    def finish(self) -> FeatureSet:
        """The features of all ranks. Every rank must call it. Raises ValueError if images are missing."""
        for moments in self._moments.values():
            moments.reduce_(self._place.all_reduce_)
        n = self._moments["pooled"].n
        if n != self._total:
            raise ValueError(f"{self._total - n} of {self._total} images could not be read: bad.jsonl names them")
        position, features, logits = (torch.cat(column) for column in zip(*self._rows, strict=True))
        gaussians = {name: moments.gaussian() for name, moments in self._moments.items() if n > 1}
        return FeatureSet(
            n,
            gaussians.get("pooled"),
            gaussians.get("spatial"),
            gather_rows(features, position, self._kept, self._place),
            gather_rows(logits, position, self._kept, self._place),
        )


def gather_rows(rows: Tensor, position: Tensor, total: int, place: Topology) -> Tensor:
    """Each rank's rows [b, …] put at their places of [total, …]: a sum in which every row has one summand."""
    whole = torch.zeros(total, *rows.shape[1:], dtype=rows.dtype)
    whole[position] = rows
    return place.all_reduce_(whole.to(place.device)).cpu()


def collect_images(images: Tensor, extractor: Extractor, place: Topology, batch: int) -> FeatureSet:
    """Features of uint8 images [n, 3, h, w] that every rank holds."""
    collector = Collector(extractor, len(images), place)
    for first in range(place.rank * batch, max(len(images), place.world_size * batch), place.world_size * batch):
        position = torch.arange(first, first + batch)
        rows = images[position.clamp_max(len(images) - 1)].to(place.device)
        weight = (position < len(images)).float()
        collector.add(rows, position.to(place.device), weight.to(place.device))
    return collector.finish()


@dataclass(frozen=True)
class Reconstructions:
    """How well a VQ-VAE reproduces n images.

    mse: of the plain output in [-1, 1] units, as in training. psnr, ssim, lpips: means over images of the uint8
    pictures; lpips is None where it was not computed.
    usage: counts [K] per level. originals, pictures: uint8 [m, 3, R, R], examples spread evenly over the set.
    """

    n: int
    mse: float
    psnr: float
    ssim: float
    lpips: float | None
    usage: dict[str, np.ndarray]
    features: FeatureSet | None
    originals: Tensor
    pictures: Tensor
    labels: Tensor


@torch.inference_mode()
def reconstruct(
    vqvae: Any,
    batches: Iterable[Mapping[str, Any]],
    total: int,
    place: Topology,
    *,
    extractor: Extractor | None = None,
    perceptual: PerceptualDistance | None = None,
    examples: int = 16,
) -> Reconstructions:
    """Run every image through the VQ-VAE (in eval mode). Raises ValueError if images are missing."""
    collector = Collector(extractor, total, place) if extractor is not None else None
    count = 4 if perceptual is None else 5
    sums = torch.zeros(count, dtype=torch.float64, device=place.device)  # n, and sums of mse, psnr, ssim, lpips
    usage = {name: torch.zeros(vqvae.num_codes, dtype=torch.int64, device=place.device) for name in vqvae.level_names}
    shown = spread(total, examples)
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for batch in batches:
        image, position, weight, label = (batch[k].to(place.device) for k in ("image", "position", "weight", "label"))
        target = to_float(image)
        output = vqvae(target)
        picture = to_uint8(output.reconstruction)
        error = (output.reconstruction.double() - target.double()).square().flatten(1).mean(1)
        each = [torch.ones_like(error), error, psnr(picture, image), ssim(picture, image)]
        if perceptual is not None:
            each.append(perceptual(picture, image))
        sums += (torch.stack(each) * weight.double()).sum(1)
        for histogram, codes in zip(usage.values(), output.codes, strict=True):
            histogram += torch.bincount(codes[weight > 0].flatten(), minlength=len(histogram))
        if collector is not None:
            collector.add(picture, position, weight)
        place_of = torch.searchsorted(shown, position.cpu())
        hit = (shown[place_of.clamp_max(len(shown) - 1)] == position.cpu()) & (weight.cpu() > 0)
        rows.append((place_of[hit], image.cpu()[hit], picture.cpu()[hit], label.cpu()[hit]))
    for tensor in (sums, *usage.values()):
        place.all_reduce_(tensor)
    n, mse, ratio, similarity, *distance = sums.tolist()
    if n != total:
        raise ValueError(f"{total - int(n)} of {total} images could not be read: bad.jsonl names them")
    at, *columns = (torch.cat(column) for column in zip(*rows, strict=True))
    originals, pictures, labels = (gather_rows(column, at, len(shown), place) for column in columns)
    counts = {name: histogram.cpu().numpy() for name, histogram in usage.items()}
    features = collector.finish() if collector is not None else None
    lpips = distance[0] / n if distance else None
    figures = (mse / n, ratio / n, similarity / n, lpips)
    return Reconstructions(total, *figures, counts, features, originals, pictures, labels)


def spread(total: int, count: int) -> Tensor:
    """`count` positions (at most `total`) spread evenly over 0 … total - 1, increasing: int64."""
    count = min(total, count)
    return (2 * torch.arange(count) + 1) * total // (2 * max(1, count))
