"""Self-checks: they pass on sound machinery and stop on machinery that is wrong."""

import pytest
import torch
from torch import Tensor

from vqscale.evaluation import samples
from vqscale.evaluation.features import Extractor, Features
from vqscale.evaluation.samples import CheckFailed, check_extractor, check_metrics
from vqscale.evaluation.statistics import FeatureSet, moments_of


def features(n: int = 60) -> FeatureSet:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    return FeatureSet(n, {"pooled": moments_of(x)}, x, x)


def images() -> Tensor:
    return torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_sound_machinery_passes_and_says_what_was_checked(quick: Extractor) -> None:
    lines = check_metrics(features()) + check_extractor(quick, images())
    assert len(lines) == 4
    assert "recall" in lines[2] and "Noise of 0, 8 and 32" in lines[3]


def test_few_images_and_copies_are_no_failure() -> None:
    assert len(check_metrics(features(5))) == 1
    same = FeatureSet(40, {}, torch.ones(40, 8), torch.ones(40, 8))
    assert check_metrics(same) == ["Precision and recall of the reference against itself are 1."]


def test_a_network_that_sees_nothing_is_found(quick: Extractor) -> None:
    blind = Extractor(
        "blind", "0", True, "none", "none", lambda x: Features(torch.ones(len(x), 4), torch.ones(len(x), 4))
    )
    with pytest.raises(CheckFailed, match="self-check: blind: noise moves its features by 0, 0, 0; no score"):
        check_extractor(blind, images())


def test_a_network_that_dices_is_found() -> None:
    dice = Extractor(
        "dice", "0", True, "none", "none", lambda x: Features(torch.rand(len(x), 4), torch.ones(len(x), 4))
    )
    with pytest.raises(CheckFailed, match="dice"):
        check_extractor(dice, images())


def test_a_distance_that_is_not_0_of_a_set_to_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "frechet_distance", lambda a, b: 1.0)
    with pytest.raises(CheckFailed, match="the reference is at distance 1 from itself"):
        check_metrics(features())


def test_swapped_arguments_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = samples.precision_recall
    monkeypatch.setattr(samples, "precision_recall", lambda generated, real: right(real, generated))
    with pytest.raises(CheckFailed, match="copies of one image have precision 0"):
        check_metrics(features())
