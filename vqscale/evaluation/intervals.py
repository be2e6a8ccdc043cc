"""How far metrics would vary over other images of the same kind: standard errors, and 95 % intervals from them.

In: features, logits or values of images.  Out: standard errors; the randomness in them is addressed by a seed.

A smooth metric moves by an image's influence, over n, when that image weighs more: the variance of the metric is that
of the influences over n (the infinitesimal jackknife, Jaeckel 1972; Efron and Stein 1981). Shares of neighbourhoods are
not smooth: they are computed again on random halves (Shao and Wu 1989). Neither uses an image twice. A bootstrap does,
and a Fréchet distance of fewer distinct images is larger: its replicates all lie too high.
An interval is about the expectation of the metric at its own number of images. It does not show the bias at small n.
Shapes: m generated and n real images, f features, c logits.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from vqscale.evaluation.statistics import FeatureSet, Gaussian, transport_roots
from vqscale.seeding import generator, key_of

DEVIATIONS = 1.96  # of a normal distribution, either side: 95 %
HALVES = 40
MOST_HALVED, MOST_KERNELS = 2_000, 5_000  # images whose pairs are compared; of more the error is scaled from these
_T_OVER_NORMAL = 2.02 / DEVIATIONS  # Student's t of 40 halves
_ROWS = 4_096


def interval(value: float, error: float) -> tuple[float, float]:
    """95 %, of a standard error."""
    return value - DEVIATIONS * error, value + DEVIATIONS * error


def error_of_mean(influences: Float[Tensor, " n"], n: int = 0) -> float:
    """Standard error of a mean of `n` values (0 = as many as there are) that vary as these; nan for a single one."""
    return float((influences.double().var() / (n or len(influences))).sqrt())


def error_of_share(share: float, n: int) -> float:
    """Standard error of a share of n images, above 0 for a share of 0 or 1, too (Agresti and Coull 1998)."""
    near = (share * n + 2) / (n + 4)
    return math.sqrt(near * (1 - near) / (n + 4))


# --- Fréchet distances ------------------------------------------------------------------------------------------------


def frechet_error(generated: FeatureSet, real: FeatureSet, *, paired: bool = False) -> float:
    """Standard error of the Fréchet distance between pooled features.

    paired: row i of both sets belongs to the same image, as with reconstructions. Published moments, whose images are
    unknown, count as exact. If both sets come from one distribution, the error is sqrt(2) times too large.
    """
    ours, theirs = generated.gaussians["pooled"], real.gaussians["pooled"]
    known = real.features if theirs.n else real.features[:0]
    influences = frechet_influences(ours, theirs, generated.features, known)
    if paired:
        return error_of_mean(influences[0] + influences[1], ours.n)
    errors = [error_of_mean(x, gaussian.n) for x, gaussian in zip(influences, (ours, theirs), strict=True) if len(x)]
    return math.hypot(*errors)


def frechet_influences(
    generated: Gaussian, real: Gaussian, of_generated: Float[Tensor, "m f"], of_real: Float[Tensor, "n f"]
) -> tuple[Float64[Tensor, " m"], Float64[Tensor, " n"]]:
    """Of each image on the distance, up to a constant per set; the features are those behind the Gaussians.

    The distance moves with a covariance A by tr((I - T) dA), where T is the optimal map from A to the other.
    """
    roots = transport_roots(generated.covariance, real.covariance)
    shift = generated.mean - real.mean

    def influences(rows: Tensor, mean: Tensor, shift: Tensor, root: Tensor) -> Tensor:
        x = rows.double() - mean
        return 2 * x @ shift + x.square().sum(1) - (x @ root).square().sum(1)

    ours = [influences(rows, generated.mean, shift, roots[0]) for rows in of_generated.split(_ROWS)]
    theirs = [influences(rows, real.mean, -shift, roots[1]) for rows in of_real.split(_ROWS)]
    return torch.cat(ours), torch.cat(theirs)


# --- other metrics of features ----------------------------------------------------------------------------------------


def kid_error(generated: Float[Tensor, "m f"], real: Float[Tensor, "n f"]) -> float:
    """Standard error of the unbiased polynomial MMD^2 of all images."""

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1).pow(3).mean(1)

    x, y = generated[:MOST_KERNELS].double(), real[:MOST_KERNELS].double()
    pairs = ((x, y, len(generated)), (y, x, len(real)))
    return math.hypot(*(error_of_mean(2 * (mean_kernel(a, a) - mean_kernel(a, b)), n) for a, b, n in pairs))


def inception_score_error(logits: Float[Tensor, "n c"]) -> float:
    """Standard error of exp(E KL(p(y|x) | p(y)))."""
    logarithms = logits.double().log_softmax(1)
    p = logarithms.exp()
    divergences = (p * (logarithms - p.mean(0).log())).sum(1)
    return float(divergences.mean().exp()) * error_of_mean(divergences)


def errors_by_halves(
    shares: Callable[[Float[Tensor, "k f"], Float[Tensor, "l f"]], Sequence[float]],
    generated: Float[Tensor, "m f"],
    real: Float[Tensor, "n f"],
    seed: int,
) -> list[float]:
    """Standard errors of what `shares` makes of the features of two sets, from random halves of both."""
    draw = generator(seed, key_of("halves"))
    sets = [rows[_some(len(rows), MOST_HALVED, draw)] for rows in (generated, real)]
    halves = [shares(*(rows[_some(len(rows), len(rows) // 2, draw)] for rows in sets)) for _ in range(HALVES)]
    # Halves deviate as the wholes do: half the images, of which half are new. The larger share of images counts.
    shares_compared = [len(rows) / len(every) for rows, every in zip(sets, (generated, real), strict=True)]
    deviation = torch.tensor(halves, dtype=torch.float64).std(0)
    return (_T_OVER_NORMAL * math.sqrt(max(shares_compared)) * deviation).tolist()


def _some(total: int, count: int, draw: torch.Generator) -> Int64[Tensor, " k"]:
    """At most `count` of 0 … total - 1, any of them."""
    return torch.randperm(total, generator=draw)[:count]
