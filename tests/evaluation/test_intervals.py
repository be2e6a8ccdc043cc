"""Intervals: how often they hold the expectation, and how they shrink."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vqscale.evaluation import intervals, metrics
from vqscale.evaluation.statistics import FeatureSet, Gaussian, frechet_distance, moments_of

Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def features_set(x: Tensor) -> FeatureSet:
    return FeatureSet(len(x), {"pooled": moments_of(x)}, x, x[:, :4])


def cloud(n: int, width: int, draw: torch.Generator, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    deviations = torch.arange(1, width + 1) ** -0.5
    return torch.randn(n, width, generator=draw) * deviations * scale + shift


def covered(draw: Draw, value: Callable[..., float], error: Callable[..., float], times: int) -> float:
    """The share of repetitions in which value +- 1.96 errors holds the mean of all values."""
    seeded = torch.Generator().manual_seed(0)
    pairs = [draw(seeded) for _ in range(times)]
    values = torch.tensor([value(*pair) for pair in pairs])
    errors = torch.tensor([error(*pair) for pair in pairs])
    return float(((values - values.mean()).abs() < 1.96 * errors).double().mean())


def distance(a: Tensor, b: Tensor) -> float:
    return metrics.frechet(features_set(a), features_set(b))


def distance_error(a: Tensor, b: Tensor, **how: bool) -> float:
    return intervals.frechet_error(features_set(a), features_set(b), **how)


@pytest.mark.parametrize(
    ("m", "n", "width", "shift"),
    [(200, 200, 16, 0.1), (60, 90, 80, 0.1), (80, 80, 40, 0.5)],
    ids=["many images", "fewer than features", "far apart"],
)
def test_intervals_of_a_frechet_distance_hold_its_expectation(m: int, n: int, width: int, shift: float) -> None:
    def draw(seeded: torch.Generator) -> tuple[Tensor, Tensor]:
        return cloud(m, width, seeded, scale=1.3, shift=shift), cloud(n, width, seeded)

    assert 0.90 <= covered(draw, distance, distance_error, 200) <= 0.98


def test_a_reconstruction_is_compared_with_its_own_image() -> None:
    def draw(seeded: torch.Generator) -> tuple[Tensor, Tensor]:
        real = cloud(150, 16, seeded)
        return 0.7 * real + cloud(150, 16, seeded, scale=0.1), real

    def paired(a: Tensor, b: Tensor) -> float:
        return distance_error(a, b, paired=True)

    assert 0.90 <= covered(draw, distance, paired, 200) <= 0.98
    a, b = draw(torch.Generator().manual_seed(1))
    assert not math.isclose(paired(a, b), distance_error(a, b), rel_tol=0.2)  # as if they were of other images


def test_the_error_of_a_distance_falls_with_the_root_of_the_number_of_images() -> None:
    seeded = torch.Generator().manual_seed(0)
    a, b = cloud(6400, 16, seeded, scale=1.3, shift=0.1), cloud(6400, 16, seeded)
    errors = [distance_error(a[:n], b[:n]) for n in (400, 1600, 6400)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2) == errors[1] / errors[2]


def test_influences_are_what_another_weight_of_an_image_does() -> None:
    """An image that counts (1 + h) times moves the distance by h / n of its influence."""
    seeded = torch.Generator().manual_seed(0)
    a, b = cloud(20, 30, seeded, scale=1.3).double(), cloud(15, 30, seeded).double()
    ours, theirs = moments_of(a), moments_of(b)
    influences = intervals.frechet_influences(ours, theirs, a, b)[0]

    def weighed(row: int, h: float) -> float:
        weights = torch.full((20,), 1 / 20, dtype=torch.float64)
        weights = (weights + h * (torch.arange(20) == row)) / (1 + h)
        mean = weights @ a
        covariance = ((a - mean) * weights[:, None]).T @ (a - mean) * 20 / 19
        return frechet_distance(Gaussian(20, mean, covariance), theirs)

    slopes = torch.tensor([(weighed(row, 1e-5) - weighed(row, -1e-5)) / 2e-5 for row in range(20)])
    expected = influences - influences.mean()
    # The covariance is divided by n - 1, which scales its part of the slope.
    assert torch.corrcoef(torch.stack([slopes.double(), expected]))[0, 1] > 0.999
    assert float(slopes.std() / expected.std()) == pytest.approx(1, abs=0.06)


def test_published_moments_count_as_exact() -> None:
    seeded = torch.Generator().manual_seed(0)
    ours, theirs = features_set(cloud(100, 8, seeded, scale=1.5)), features_set(cloud(100, 8, seeded))
    whole = intervals.frechet_error(ours, theirs)
    exact = theirs.gaussians["pooled"]
    of_file = Gaussian(0, exact.mean, exact.covariance)
    published = FeatureSet(0, {"pooled": of_file}, theirs.features[:10], theirs.logits[:10])
    assert 0 < intervals.frechet_error(ours, published) < whole


def test_intervals_of_kid_hold_its_expectation() -> None:
    def draw(seeded: torch.Generator) -> tuple[Tensor, Tensor]:
        return cloud(60, 8, seeded, shift=0.3), cloud(60, 8, seeded)

    assert 0.90 <= covered(draw, lambda a, b: metrics.kid(a, b, 60), intervals.kid_error, 150) <= 0.99


def test_intervals_of_the_inception_score_hold_its_expectation() -> None:
    def draw(seeded: torch.Generator) -> tuple[Tensor, Tensor]:
        logits = 2 * cloud(200, 10, seeded)
        return logits, logits

    values = covered(
        draw, lambda a, _: metrics.inception_score(a), lambda a, _: intervals.inception_score_error(a), 200
    )
    assert 0.90 <= values <= 0.98


def test_intervals_of_precision_and_recall_hold_their_expectations() -> None:
    """Of 50 repetitions 45 or more."""
    seeded = torch.Generator().manual_seed(0)
    sets = [(cloud(80, 6, seeded, scale=0.9, shift=0.3), cloud(80, 6, seeded)) for _ in range(50)]
    values = torch.tensor([metrics.precision_recall(*pair) for pair in sets])
    errors = torch.tensor([intervals.errors_by_halves(metrics.precision_recall, *pair, 0) for pair in sets])
    share = ((values - values.mean(0)).abs() < 1.96 * errors).double().mean(0)
    assert share.min() >= 0.90 and errors.mean(0).div(values.std(0)).max() < 1.6


def test_errors_by_halves_are_those_of_the_seed_and_fall_with_the_number_of_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeded = torch.Generator().manual_seed(0)
    a, b = cloud(600, 6, seeded, scale=0.9), cloud(600, 6, seeded)

    def errors(n: int, seed: int = 0) -> list[float]:
        return intervals.errors_by_halves(metrics.density_coverage, a[:n], b[:n], seed)

    assert errors(100) == errors(100) != errors(100, 1)
    assert errors(150)[1] / errors(600)[1] == pytest.approx(2, rel=0.4)
    whole = errors(600)
    monkeypatch.setattr(intervals, "MOST_HALVED", 300)
    assert errors(600) == pytest.approx(whole, rel=0.5) and errors(600) != whole  # of 300, scaled to 600


def test_a_share_of_none_or_all_has_an_error() -> None:
    assert 0.003 < intervals.error_of_share(0.0, 400) < 0.004
    assert intervals.error_of_share(1.0, 400) == pytest.approx(intervals.error_of_share(0.0, 400))
    assert intervals.error_of_share(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)


def test_an_interval_holds_its_value() -> None:
    low, high = intervals.interval(3.0, intervals.error_of_mean(torch.tensor([1.0, 3.0, 5.0])))
    assert low < 3 < high and high - 3 == pytest.approx(1.96 * 2 / math.sqrt(3))
