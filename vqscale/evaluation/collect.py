"""Features of images on all ranks -> one FeatureSet, equal at any number of them.

In: images and an extractor, or the parts of a pass.  Padding counts for nothing, and a missing image is an error.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vqscale.evaluation.features import Extractor, Features
from vqscale.evaluation.moments import Moments
from vqscale.evaluation.parts import finished, parts_of
from vqscale.evaluation.statistics import FeatureSet
from vqscale.topology import Topology

KEPT = 50_000  # images whose features are held in memory, for the metrics that compare pairs


class Collector:
    """Adds up the features of `total` images, wherever they are computed; `finish` brings the ranks together."""

    def __init__(self, extractor: Extractor, total: int, topology: Topology, keep: int = KEPT):
        self._extractor, self._total, self._topology = extractor, total, topology
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

    def add_part(self, part: range, rows: Mapping[str, Tensor]) -> None:
        """A part of a pass that kept `feature_rows`."""
        pooled, logits = (rows[name].to(self._topology.device) for name in ("pooled", "logits"))
        spatial = rows["spatial"].to(self._topology.device) if "spatial" in rows else None
        position = torch.arange(part.start, part.stop)
        self.add_features(Features(pooled, logits, spatial), position, torch.ones(len(part)))

    def finish(self) -> FeatureSet:
        """The features of all ranks. Every rank must call it. Raises ValueError if images are missing."""
        for moments in self._moments.values():
            moments.reduce_(self._topology.all_reduce_)
        n = self._moments["pooled"].n
        if n != self._total:
            raise ValueError(f"{self._total - n} of {self._total} images could not be read: bad.jsonl names them")
        position, features, logits = (torch.cat(column) for column in zip(*self._rows, strict=True))
        gaussians = {name: moments.gaussian() for name, moments in self._moments.items() if n > 1}
        return FeatureSet(
            n,
            gaussians.get("pooled"),
            gaussians.get("spatial"),
            gather_rows(features, position, self._kept, self._topology),
            gather_rows(logits, position, self._kept, self._topology),
        )


def gather_rows(rows: Tensor, position: Tensor, total: int, topology: Topology) -> Tensor:
    """Each rank's rows [b, …] put at their places of [total, …]: a sum in which every row has one summand."""
    whole = torch.zeros(total, *rows.shape[1:], dtype=rows.dtype)
    whole[position] = rows
    return topology.all_reduce_(whole.to(topology.device)).cpu()


def collect_images(images: Tensor, extractor: Extractor, topology: Topology, batch: int) -> FeatureSet:
    """Features of uint8 images [n, 3, h, w] that every rank holds."""
    collector = Collector(extractor, len(images), topology)
    for first in range(
        topology.rank * batch, max(len(images), topology.world_size * batch), topology.world_size * batch
    ):
        position = torch.arange(first, first + batch)
        rows = images[position.clamp_max(len(images) - 1)].to(topology.device)
        weight = (position < len(images)).float()
        collector.add(rows, position.to(topology.device), weight.to(topology.device))
    return collector.finish()


def feature_rows(found: Features) -> dict[str, Tensor]:
    """What a part keeps of features: float32, `spatial` only where there is one."""
    tensors = {"pooled": found.pooled, "logits": found.logits, "spatial": found.spatial}
    return {name: value.float() for name, value in tensors.items() if value is not None}


def gather_features(folder: Path, total: int, resolution: int, extractor: Extractor, topology: Topology) -> FeatureSet:
    """The features in all ranks' parts as one. Every rank must call it. Raises ValueError if images are missing."""
    collector = part_collector(total, resolution, extractor, topology)
    for part, found in finished(folder, parts_of(total)[topology.rank :: topology.world_size]):
        collector.add_part(part, found)
    return collector.finish()


def part_collector(total: int, resolution: int, extractor: Extractor, topology: Topology) -> Collector:
    """A collector of parts, which knows the features' widths on a rank that has no part, too."""
    collector = Collector(extractor, total, topology)
    blank = torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8, device=topology.device)
    collector.add(blank, torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    return collector
