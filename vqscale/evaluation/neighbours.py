"""Memorisation: are samples closer to training images than images that nobody trained on?

In: features of samples, of training images and of held-out images.  Out: for the closest samples their nearest training
images, and how the nearest distances of samples compare with those of held-out images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.data.cache import Cache
from vqscale.evaluation.gallery import images_at
from vqscale.evaluation.inputs import DataSet

SHOWN = 3  # training images beside each sample
_CLOSE = 0.01  # the share of held-out images that lie as close as "close" means
_ROWS = 512


@dataclass(frozen=True)
class Neighbours:
    """m samples, closest to the training images first, each with its SHOWN nearest ones, nearest first.

    images: uint8 [m, 1 + SHOWN, 3, R, R], the sample and its neighbours; distances: [m, SHOWN]; names: of the classes,
    m lists of 1 + SHOWN. summary: one sentence for the report.
    """

    images: Tensor
    distances: Tensor
    names: list[list[str]]
    summary: str


def nearest(queries: Tensor, training: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(distances [n, count], rows int64 [n, count]) of the nearest `training` features, nearest first."""
    distances, rows = [], []
    for part in queries.split(_ROWS):
        row = torch.cdist(part, training).topk(count, largest=False).indices
        exact = (part[:, None].double() - training[row].double()).norm(dim=2)  # cdist rounds near 0
        order = exact.argsort(dim=1, stable=True)
        distances.append(exact.gather(1, order))
        rows.append(row.gather(1, order))
    return torch.cat(distances), torch.cat(rows)


def find_neighbours(
    samples: DataSet,
    of_samples: Tensor,
    training: DataSet,
    of_training: Tensor,
    of_held_out: Tensor,
    *,
    count: int,
    resolution: int,
    cache: Cache | None = None,
) -> Neighbours:
    """The `count` samples that lie closest to a training image; of_…: features, in stored order."""
    shown = min(SHOWN, len(of_training))
    distances, rows = nearest(of_samples, of_training, shown)
    closest = distances[:, 0].argsort(stable=True)[:count]
    images, names = [], []
    for sample in closest.tolist():
        one = images_at(samples.folder, samples.manifest, [sample], resolution, cache)
        others = images_at(training.folder, training.manifest, rows[sample].tolist(), resolution, cache)
        images.append(torch.stack([image for image, _ in [*one, *others]]))
        names.append([name for _, name in [*one, *others]])
    summary = _summary(distances[:, 0], nearest(of_held_out, of_training, 1)[0][:, 0], len(of_training))
    return Neighbours(torch.stack(images), distances[closest], names, summary)


def _summary(of_samples: Tensor, of_held_out: Tensor, training: int) -> str:
    close = of_held_out.quantile(_CLOSE)
    share = (of_samples < close).double().mean()
    return (
        f"Median distance to the nearest of {training:,} training images: {of_samples.median():.3g} for "
        f"{len(of_samples):,} samples, {of_held_out.median():.3g} for {len(of_held_out):,} held-out images. "
        f"{share:.1%} of the samples are closer than the closest {_CLOSE:.0%} of held-out images."
    )
