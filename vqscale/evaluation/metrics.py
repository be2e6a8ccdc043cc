"""Numbers from features, images and code counts held in memory.

In: features or logits, uint8 images, histograms of codes.  Out: plain floats.
Arguments come in the order (generated, real) everywhere.
Shapes: m generated and n real images, f features, c logits, k codes.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Shaped, UInt8
from torch import Tensor

from vqscale.evaluation.statistics import FeatureSet, frechet_distance

KID_SUBSET_SIZE, KID_SUBSETS = 1000, 100
PRC_NEIGHBOURS = 3  # k of Kynkäänniemi et al. 2019
DENSITY_NEIGHBOURS = 5  # k of Naeem et al. 2020
ISC_SPLITS = 10
_PAIRS_IN_MEMORY = 100_000_000


class TooFew(ValueError):
    """The metric is not defined for so few images: a value of null with this reason, not an error."""


def _need(metric: str, needed: int, **sizes: int) -> None:
    for name, n in sizes.items():
        if n < needed:
            verb = "need" if " and " in metric else "needs"
            raise TooFew(f"{metric} {verb} at least {needed} images, there are {n} {name}")


def frechet(generated: FeatureSet, real: FeatureSet, layer: str = "pooled") -> float:
    """Fréchet distance between the pooled or the spatial features. Raises TooFew where a set has no covariance."""
    a, b = generated.gaussians.get(layer), real.gaussians.get(layer)
    if a is None or b is None:
        raise TooFew(f"a covariance needs at least 2 images, there are {generated.n} and {real.n}")
    return frechet_distance(a, b)


def kid(generated: Float[Tensor, "m f"], real: Float[Tensor, "n f"], subset_size: int = KID_SUBSET_SIZE) -> float:
    """Kernel distance: the mean of the unbiased polynomial MMD^2 over 100 subsets (Bińkowski et al. 2018).

    Raises TooFew where a subset can't be drawn.
    """
    return kid_and_error_of_subsets(generated, real, subset_size)[0]


def kid_and_error_of_subsets(
    generated: Float[Tensor, "m f"], real: Float[Tensor, "n f"], subset_size: int
) -> tuple[float, float]:
    """(kid, its standard error over other draws of the subsets)."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    if subset_size < 2:
        raise TooFew(f"KID needs subsets of at least 2 images, kid_subset_size={subset_size}")
    _need("KID", subset_size, samples=len(generated), references=len(real))
    scores = kid_features_to_metric(
        generated, real, kid_subsets=KID_SUBSETS, kid_subset_size=subset_size, verbose=False
    )
    return scores[KEY_METRIC_KID_MEAN], scores[KEY_METRIC_KID_STD] / math.sqrt(KID_SUBSETS)


def inception_score(logits: Float[Tensor, "n c"]) -> float:
    """exp(E KL(p(y|x) | p(y))), the mean over 10 parts (Salimans et al. 2016). Raises TooFew below 10 images."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    _need("the Inception score", ISC_SPLITS, samples=len(logits))
    return isc_features_to_metric(logits, ISC_SPLITS)[KEY_METRIC_ISC_MEAN]


def precision_recall(generated: Float[Tensor, "m f"], real: Float[Tensor, "n f"]) -> tuple[float, float]:
    """Improved precision and recall, k = 3 (Kynkäänniemi et al. 2019): the share of generated images inside the
    real ones' neighbourhoods, and the reverse. Raises TooFew below k + 1 images."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    _need("precision and recall", PRC_NEIGHBOURS + 1, samples=len(generated), references=len(real))
    scores = prc_features_to_metric(
        generated,
        real,
        prc_neighborhood=PRC_NEIGHBOURS,
        save_cpu_ram=max(len(generated), len(real)) ** 2 > _PAIRS_IN_MEMORY,
        verbose=False,
    )
    return scores[KEY_METRIC_PRECISION], scores[KEY_METRIC_RECALL]


def density_coverage(
    generated: Float[Tensor, "m f"], real: Float[Tensor, "n f"], neighbours: int = DENSITY_NEIGHBOURS
) -> tuple[float, float]:
    """Density and coverage, k = 5 (Naeem et al. 2020, eq. 6 and 7). Raises TooFew below k + 1 real images.

    Density: how many real neighbourhoods a generated image lies in, over k (may exceed 1). Coverage: the share of
    real images whose neighbourhood holds a generated one.
    """
    _need("density and coverage", neighbours + 1, references=len(real))
    _need("density and coverage", 1, samples=len(generated))
    generated, real = generated.double(), real.double()
    inside, covered = 0, 0
    for rows in real.split(max(1, _PAIRS_IN_MEMORY // 10 // max(len(real), len(generated)))):
        # Rounding may put a point at a distance from itself just above 0; it is still the nearest of all.
        radius = torch.cdist(rows, real).kthvalue(neighbours + 1).values
        hits = torch.cdist(rows, generated) <= radius[:, None]
        inside += int(hits.sum())
        covered += int(hits.any(1).sum())
    return inside / (neighbours * len(generated)), covered / len(real)


def psnr(a: UInt8[Tensor, "b 3 h w"], b: UInt8[Tensor, "b 3 h w"]) -> Float64[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB per image, peak 255.

    Identical images count as differing by a thousandth of a step in each value (108 dB), not infinity.
    """
    return psnr_of((a.double() - b.double()).square().flatten(1).mean(1), peak=255, floor=1e-6)


def psnr_of(error: Float[Tensor, " b"], *, peak: float, floor: float) -> Float[Tensor, " b"]:
    """PSNR in dB of mean squared errors, of values in a range of `peak`; errors below `floor` count as that."""
    return 10 * torch.log10(peak**2 / error.clamp_min(floor))


def ssim(a: UInt8[Tensor, "b 3 h w"], b: UInt8[Tensor, "b 3 h w"]) -> Float64[Tensor, " b"]:
    """Structural similarity per image.

    Wang et al. 2004, section III.B: Gaussian window of 11 with deviation 1.5, K1 = 0.01, K2 = 0.03, positions where
    the window fits, mean over the three channels. Images below 11 pixels take the largest odd window that fits.
    """
    size = min(11, *(side - 1 + side % 2 for side in a.shape[-2:]))
    window = _gaussian_window(size, 1.5, a.device)
    x, y = a.double(), b.double()
    mean_x, mean_y = _blur(x, window), _blur(y, window)
    var_x, var_y = _blur(x * x, window) - mean_x**2, _blur(y * y, window) - mean_y**2
    cov = _blur(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.flatten(1).mean(1)


def _gaussian_window(size: int, deviation: float, device: torch.device) -> Tensor:
    x = torch.arange(size, dtype=torch.float64, device=device) - size // 2
    window = torch.exp(-(x**2) / (2 * deviation**2))
    return window / window.sum()


def _blur(x: Tensor, window: Tensor) -> Tensor:
    channels = x.shape[1]
    columns, rows = window.view(1, 1, -1, 1), window.view(1, 1, 1, -1)
    x = F.conv2d(x, columns.expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, rows.expand(channels, 1, 1, -1), groups=channels)


def order0_entropy(held_out: Shaped[np.ndarray, " k"], train: Shaped[np.ndarray, " k"]) -> float:
    """Nats per code that a model of the training frequencies alone pays on held-out codes (add-one smoothing).

    What a prior must beat.
    """
    p = (train + 1.0) / (train.sum() + len(train))
    return float(-(held_out * np.log(p)).sum() / held_out.sum())
