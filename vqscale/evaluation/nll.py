"""Likelihood of codes under the priors: exact nats per code, at any number of ranks, and what conditioning is worth.

In: code shards and priors.  Out: nats per code; the same with every sample's class, or its upper levels' codes,
exchanged for another sample's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vqscale.batch import codes_of
from vqscale.data.cache import Cache
from vqscale.data.codes import CodeReader
from vqscale.data.sequential import sequential_batches
from vqscale.data.shards import Manifest
from vqscale.models.prior import code_nll
from vqscale.seeding import generator, key_of
from vqscale.topology import Topology

MOST = 65_536  # samples held in memory; ImageNet's validation set is 50,000


@dataclass(frozen=True)
class Codes:
    """The codes of n samples, in stored order: labels int64 [n]; levels top first, int32 [n, h, w]."""

    labels: Tensor
    levels: dict[str, Tensor]
    num_codes: int

    def __len__(self) -> int:
        return len(self.labels)

    def above(self, level: str) -> list[str]:
        """Names of the levels above `level`, top first."""
        names = list(self.levels)
        return names[: names.index(level)]

    def usage(self, level: str) -> np.ndarray:
        """Counts [K] of one level's codes."""
        return np.bincount(self.levels[level].flatten().numpy(), minlength=self.num_codes)


def read_codes(folder: Path, *, limit: int = 0, workers: int = 0, cache: Cache | None = None) -> Codes:
    """The first `limit` samples (0 = all, at most MOST) of a folder of code shards, the unflipped view.

    Every rank reads all of them. Raises ValueError for another kind of data set or a sample that can't be read.
    """
    manifest = Manifest.load(folder)
    if manifest.kind != "codes":
        raise ValueError(f"codes={folder}: code shards are needed, this is a data set of {manifest.kind}")
    extra, total = manifest.extra, min(limit or MOST, MOST, manifest.num_samples)
    reader = CodeReader(extra["levels"], views=extra["views"], num_codes=extra["num_codes"])
    batches = list(
        sequential_batches(folder, read=reader, batch=min(256, total), workers=workers, limit=total, cache=cache)
    )
    weight = torch.cat([batch["weight"] for batch in batches])
    if int(weight.sum()) != total:
        raise ValueError(f"codes={folder}: {total - int(weight.sum())} of {total} samples could not be read")
    levels = {name: torch.cat([codes_of(batch, name) for batch in batches])[:total] for name in extra["levels"]}
    return Codes(torch.cat([batch["label"] for batch in batches])[:total], levels, extra["num_codes"])


@dataclass(frozen=True)
class Likelihood:
    """By class, float64 [classes]: nats summed over the codes of its samples, and how many codes those are."""

    nats: Tensor
    codes: Tensor

    def per_code(self) -> float:
        """Mean nats per code over all samples."""
        return float(self.nats.sum() / self.codes.sum())

    def by_class(self) -> dict[int, float]:
        """Mean nats per code of each class that has samples."""
        return {label: float(self.nats[label] / n) for label, n in enumerate(self.codes.tolist()) if n}


@torch.inference_mode()
def likelihood(
    prior: nn.Module,
    codes: Codes,
    level: str,
    topology: Topology,
    *,
    batch: int = 32,
    labels_of: Tensor | None = None,
    upper_of: Tensor | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Likelihood:
    """Nats of `level`'s codes under a prior in eval mode, over all samples of all ranks, by their own class.

    labels_of, upper_of: int64 [n], the samples whose class or upper codes each sample is given instead of its own.
    tick: called before every batch, equally often on every rank.
    """
    own = torch.arange(len(codes))
    labels_of, upper_of = (own if rows is None else rows for rows in (labels_of, upper_of))
    sums = torch.zeros(2, int(codes.labels.max()) + 1, dtype=torch.float64, device=topology.device)
    for first in range(0, len(codes), topology.world_size * batch):
        tick()
        rows = own[first + topology.rank * batch :][:batch]
        if not len(rows):
            continue
        target = codes.levels[level][rows].long().to(topology.device)
        upper = [codes.levels[name][upper_of[rows]].long().to(topology.device) for name in codes.above(level)]
        logits = prior(target, codes.labels[labels_of[rows]].to(topology.device), upper)
        each = code_nll(logits, target).double().flatten(1)
        own_class = codes.labels[rows].to(topology.device)
        sums[0].index_add_(0, own_class, each.sum(1))
        sums[1].index_add_(0, own_class, torch.full_like(each[:, 0], each.shape[1]))
    nats, counts = topology.all_reduce_(sums).cpu()
    return Likelihood(nats, counts)


def other_samples(n: int, seed: int) -> Tensor:
    """For each of n samples another one, each chosen once: int64 [n], one cycle addressed by the seed."""
    order = torch.randperm(n, generator=generator(seed, key_of("other samples")))
    partner = torch.empty(n, dtype=torch.int64)
    partner[order] = order.roll(-1)
    return partner


def other_classes(labels: Tensor, seed: int) -> Tensor:
    """For each sample one of another class, each chosen once: int64 [n].

    Among the samples sorted by class, the one as far ahead as the largest class is big. Where a class holds more than
    half of the samples, no such exchange exists and some keep their class.
    """
    shuffled = torch.randperm(len(labels), generator=generator(seed, key_of("other classes")))
    order = shuffled[labels[shuffled].argsort(stable=True)]
    largest = int(torch.bincount(labels).max())
    partner = torch.empty_like(labels)
    partner[order] = order.roll(-min(largest, max(1, len(labels) // 2)))
    return partner


def bits_per_dim(nats_per_code: Mapping[str, float], grids: Mapping[str, tuple[int, int]], resolution: int) -> float:
    """All levels' nats per image / (ln 2 · 3 · R²): what the codes alone cost per pixel value.

    Not a likelihood of images: the decoder's error is not coded. Comparable between our runs, not with papers.
    """
    nats = sum(nats_per_code[level] * h * w for level, (h, w) in grids.items())
    return nats / (math.log(2) * 3 * resolution**2)
