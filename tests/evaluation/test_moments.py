"""Streaming moments and the Fréchet distance, against torch-fidelity and known answers."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from vqscale.evaluation.statistics import Gaussian, Moments, frechet_distance, moments_of


def features(n: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated, skewed, positive features as those of a network are: float32 [n, width]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    return (torch.randn(n, width, generator=generator) @ mixing + shift).relu() * 0.5


def library_fid(a: Tensor, b: Tensor) -> float:
    stats = [fid_features_to_statistics(x) for x in (a, b)]
    return fid_statistics_to_metric(*stats, verbose=False)[KEY_METRIC_FID]


def test_moments_equal_numpys() -> None:
    x = features(500, 20, 1)
    found = moments_of(x)
    assert found.n == 500
    np.testing.assert_allclose(found.mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_moments_in_64_parts_equal_those_in_one() -> None:
    x = features(640, 32, 2)
    parts = [Moments(32) for _ in range(64)]
    for part, rows in zip(parts, x.split(10), strict=True):
        part.add(rows)
    total = Moments(32)
    for part in parts:
        total._buffer += part._buffer
    whole = moments_of(x)
    assert total.n == 640
    torch.testing.assert_close(total.gaussian().covariance, whole.covariance, rtol=1e-10, atol=1e-14)


def test_padding_of_weight_0_counts_for_nothing() -> None:
    x = features(20, 8, 3)
    padded = Moments(8)
    padded.add(torch.cat([x, torch.full((4, 8), 1e9)]), torch.tensor([1.0] * 20 + [0.0] * 4))
    torch.testing.assert_close(padded.gaussian().covariance, moments_of(x).covariance)
    assert padded.n == 20


def test_two_samples_are_needed() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        moments_of(torch.ones(1, 4))


def test_the_distance_equals_torch_fidelitys_above_2048_samples() -> None:
    a, b = features(2500, 96, 4), features(2200, 96, 5, shift=0.3)
    ours = frechet_distance(moments_of(a), moments_of(b))
    assert ours == pytest.approx(library_fid(a, b), rel=1e-5)


@pytest.mark.slow
def test_the_distance_equals_torch_fidelitys_at_512_features() -> None:
    a, b = features(4000, 512, 6), features(3000, 512, 7, shift=0.2)
    assert frechet_distance(moments_of(a), moments_of(b)) == pytest.approx(library_fid(a, b), rel=1e-5)


def test_a_set_is_at_distance_0_from_itself() -> None:
    for n in (3000, 40):  # also with fewer samples than features
        gaussian = moments_of(features(n, 64, 8))
        assert frechet_distance(gaussian, gaussian) < 1e-9


def test_known_answer_of_two_isotropic_gaussians() -> None:
    a = Gaussian(10, torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64) * 4)
    b = Gaussian(10, torch.ones(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64) * 9)
    assert frechet_distance(a, b) == pytest.approx(5 * 1 + 5 * (2 - 3) ** 2)


def test_the_distance_is_symmetric_and_grows_with_the_shift() -> None:
    a = moments_of(features(1000, 16, 9))
    others = [moments_of(features(1000, 16, 10, shift=s)) for s in (0.0, 0.1, 0.3, 1.0)]
    distances = [frechet_distance(a, b) for b in others]
    assert distances == sorted(distances) and distances[0] < 0.5 * distances[1]
    assert frechet_distance(others[3], a) == pytest.approx(distances[3], rel=1e-9)


def test_features_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="5 and 6"):
        frechet_distance(moments_of(features(9, 5, 1)), moments_of(features(9, 6, 1)))
