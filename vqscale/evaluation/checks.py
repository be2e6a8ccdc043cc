"""Checks before any number: does the network see what it should, do the metrics give the answers known beforehand?

In: an extractor, some reference images, the reference's features.  Out: a line per check, for the report; an error if
one fails, because every number after it would be wrong.
"""

import torch
from torch import Tensor

from vqscale.evaluation.features import Extractor
from vqscale.evaluation.metrics import PRC_NEIGHBOURS, precision_recall
from vqscale.evaluation.moments import frechet_distance
from vqscale.evaluation.statistics import FeatureSet

NOISE = (8, 32)  # standard deviations, of 255
_MOST = 1_000  # images whose pairs are compared
_FEWEST = 20


class CheckFailed(RuntimeError):
    """The machinery is wrong, not the input."""


def check_extractor(extractor: Extractor, images: Tensor) -> list[str]:
    """Noise moves the features, more noise moves them further. images: a few, uint8 [b, 3, R, R]."""
    clean = extractor(images).pooled
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    moved = []
    for amount in NOISE:
        noisy = (images.float() + amount * noise).round().clamp(0, 255).byte()
        moved.append(float((extractor(noisy).pooled - clean).norm(dim=1).mean()))
    again = float((extractor(images).pooled - clean).norm(dim=1).mean())
    ladder = [again, *moved]
    shown = ", ".join(f"{value:.3g}" for value in ladder)
    _require(
        ladder == sorted(ladder) and again < 0.01 * moved[0], f"{extractor.name}: noise moves its features by {shown}"
    )
    return [f"Noise of 0, {NOISE[0]} and {NOISE[1]} (of 255) moves the features of {len(images)} images by {shown}."]


def check_metrics(real: FeatureSet) -> list[str]:
    """The reference against itself, against copies of one of its images, and the other way round."""
    lines = []
    if real.gaussian is not None:
        distance, spread = frechet_distance(real.gaussian, real.gaussian), float(real.gaussian.covariance.trace())
        _require(distance <= 1e-6 * spread, f"the reference is at distance {distance:.3g} from itself")
        lines.append(f"The reference is at distance {distance:.2g} from itself (its variance is {spread:.3g}).")
    features = real.features[:_MOST]
    if len(features) < _FEWEST:
        return lines
    itself = precision_recall(features, features)
    _require(itself == (1.0, 1.0), f"precision and recall of the reference against itself are {itself}")
    lines.append("Precision and recall of the reference against itself are 1.")
    row, radius = _typical(features)
    if radius > 0:  # else most images have copies in the set
        copies = features[row].expand(len(features), -1)
        forth, back = precision_recall(copies, features), precision_recall(features, copies)
        collapsed = forth[0] > 0.9 and forth[1] <= max(0.1, 2 / len(features))
        _require(collapsed, f"copies of one image have precision {forth[0]:.3g} and recall {forth[1]:.3g}")
        _require(back == forth[::-1], f"precision and recall are {forth}, with the sets swapped {back}")
        lines.append(f"Copies of one image: precision {forth[0]:.3g}, recall {forth[1]:.3g}; swapped sets swap them.")
    return lines


def _typical(features: Tensor) -> tuple[int, float]:
    """(row, distance of its k-th neighbour): the row of median distance."""
    radii = torch.cdist(features.double(), features.double()).kthvalue(PRC_NEIGHBOURS + 1).values
    row = int(radii.argsort()[len(radii) // 2])
    return row, float(radii[row])


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckFailed(f"self-check: {otherwise}; no score is written")
