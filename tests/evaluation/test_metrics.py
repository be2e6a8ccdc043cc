"""Metrics of features, images and histograms: known answers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vqscale.evaluation import metrics
from vqscale.models.codebook import perplexity


def cloud(n: int, seed: int, scale: float = 1.0, width: int = 8) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * scale


def test_precision_and_recall_of_a_set_against_itself_are_1() -> None:
    assert metrics.precision_recall(cloud(100, 1), cloud(100, 1)) == (1.0, 1.0)


def test_mode_collapse_has_high_precision_and_no_recall() -> None:
    real = cloud(300, 2)
    centre = real[:1] + cloud(300, 3, scale=1e-3)
    precision, recall = metrics.precision_recall(centre, real)
    assert precision > 0.95 and recall < 0.05
    assert metrics.precision_recall(real, centre) == (recall, precision)  # so swapped arguments would show


def test_density_and_coverage_of_two_draws_of_one_distribution_are_about_1() -> None:
    density, coverage = metrics.density_coverage(cloud(600, 4), cloud(600, 5))
    assert density == pytest.approx(1, abs=0.12) and coverage > 0.9


def test_collapse_onto_one_image_covers_nothing() -> None:
    real = cloud(400, 6)
    density, coverage = metrics.density_coverage(real[:1].expand(400, -1), real)
    assert coverage < 0.1 and density > 0


def test_density_and_coverage_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    # k = 1: radii 1, 1, 1, 8. The generated point 0.5 lies in the balls of 0 and 1; 30 lies in none.
    density, coverage = metrics.density_coverage(torch.tensor([[0.5], [30.0]]), real, neighbours=1)
    assert (density, coverage) == (2 / 2, 2 / 4)


def test_kid_of_one_distribution_is_near_0_and_rises_with_the_shift() -> None:
    real = cloud(300, 7)
    scores = [metrics.kid(cloud(300, 8) + shift, real, subset_size=100) for shift in (0.0, 0.3, 1.0)]
    assert abs(scores[0]) < 0.05 < scores[1] < scores[2]


def test_too_few_images_are_named_and_not_an_error_of_the_library() -> None:
    with pytest.raises(metrics.TooFew, match="KID needs at least 1000 images, there are 20 samples"):
        metrics.kid(cloud(20, 1), cloud(2000, 2))
    with pytest.raises(metrics.TooFew, match="at least 4 images, there are 3 references"):
        metrics.precision_recall(cloud(20, 1), cloud(3, 2))
    with pytest.raises(metrics.TooFew, match="at least 6"):
        metrics.density_coverage(cloud(20, 1), cloud(5, 2))
    with pytest.raises(metrics.TooFew, match="at least 10"):
        metrics.inception_score(cloud(9, 1))


def test_the_inception_score_of_sure_and_even_classes_is_their_number() -> None:
    logits = torch.eye(4).repeat(250, 1) * 50
    assert metrics.inception_score(logits) == pytest.approx(4, rel=0.05)
    assert metrics.inception_score(torch.zeros(100, 4)) == pytest.approx(1)


def test_psnr_by_hand() -> None:
    a = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    b = a.clone()
    b[0] += 10
    first, same = metrics.psnr(a, b).tolist()
    assert first == pytest.approx(20 * math.log10(255 / 10))
    assert same == pytest.approx(108.13, abs=0.01)


def test_ssim_is_1_for_equal_images_and_falls_with_noise() -> None:
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(image.float(), 5, 1, 2)
    values = []
    for noise in (0, 5, 20, 60):
        noisy = smooth + noise * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(1))
        values.append(float(metrics.ssim(noisy.clamp(0, 255).byte(), smooth.byte())))
    assert values[0] == 1 and values == sorted(values, reverse=True) and values[3] < 0.5


def test_ssim_of_flat_images_is_the_luminance_term() -> None:
    a, b = (torch.full((1, 3, 16, 16), v, dtype=torch.uint8) for v in (100, 120))
    c1 = (0.01 * 255) ** 2
    assert float(metrics.ssim(a, b)) == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1))


def test_ssim_takes_images_smaller_than_its_window() -> None:
    a = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert metrics.ssim(a, a).tolist() == [1, 1]


def test_entropies_of_histograms() -> None:
    even, one = np.array([5, 5, 5, 5]), np.array([20, 0, 0, 0])
    assert float(perplexity(torch.from_numpy(even))) == pytest.approx(4)
    assert float(perplexity(torch.from_numpy(one))) == 1
    # (n + 1) / (N + K): 21/24 for the one code that training used, 1/24 for the others.
    expected = -(3 * math.log(21 / 24) + math.log(1 / 24)) / 4
    assert metrics.order0_entropy(np.array([3, 1, 0, 0]), one) == pytest.approx(expected)
