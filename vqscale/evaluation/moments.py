"""Streaming moments of features, and the Fréchet distance between two sets of them.

In: features [b, F] with weights 0 or 1, on any number of ranks.  Out: n, mean, covariance in float64; a distance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """n samples' mean [F] and unbiased covariance [F, F], float64."""

    n: int
    mean: Tensor
    covariance: Tensor


class Moments:
    """n, sum f and sum f f^T in float64. Ranks may add unequal numbers of samples; `reduce_` makes them one."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        # One buffer, so that ranks are summed in one collective: [n, sum f, sum f f^T].
        self._buffer = torch.zeros(1 + width + width * width, dtype=torch.float64, device=device)
        self.width = width

    def add(self, features: Tensor, weight: Tensor | None = None) -> None:
        """features: [b, F]; weight: [b] of 0 (padding) and 1, None = all 1."""
        kept = features if weight is None else features[weight > 0]
        kept = kept.to(self._buffer.device, torch.float64)
        self._buffer[0] += len(kept)
        self._buffer[1 : 1 + self.width] += kept.sum(0)
        self._outer.addmm_(kept.T, kept)

    @property
    def _outer(self) -> Tensor:
        return self._buffer[1 + self.width :].view(self.width, self.width)

    @property
    def n(self) -> int:
        """Samples added so far."""
        return int(self._buffer[0].item())

    def reduce_(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Sum over ranks, once, after the last `add`."""
        all_reduce(self._buffer)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance. Raises ValueError below 2 samples."""
        n = self.n
        if n < 2:
            raise ValueError(f"moments of {n} images: a covariance needs at least 2")
        mean = self._buffer[1 : 1 + self.width] / n
        covariance = (self._outer - n * torch.outer(mean, mean)) / (n - 1)
        return Gaussian(n, mean.cpu(), ((covariance + covariance.T) / 2).cpu())


def moments_of(features: Tensor) -> Gaussian:
    """The Gaussian of features [n, F] held in memory."""
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)) (Heusel et al. 2017, eq. 6), in float64.

    With factors A = F F^T and B = G G^T the last trace is the sum of the singular values of F^T G: the eigenvalues of
    A B are their squares, and no matrix root is taken of a product that isn't symmetric. Below zero only by rounding,
    then 0.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of different widths: {len(a.mean)} and {len(b.mean)}")
    shift = (a.mean - b.mean).square().sum()
    cross = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    return max(0.0, float(shift + a.covariance.trace() + b.covariance.trace() - 2 * cross))


def _factor(covariance: Tensor) -> Tensor:
    """F [F, r] with F F^T = covariance; directions without variance are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()
