"""Nats per code: exact, and dearer when the conditioning belongs to another sample."""

import math
from typing import Any

import pytest
import torch

from vqscale.data.shards import Manifest
from vqscale.evaluation.codes import Codes, bits_per_dim, likelihood, other_classes, other_samples, read_codes
from vqscale.evaluation.inputs import DataSet
from vqscale.models.prior import code_nll
from vqscale.sources import load_model
from vqscale.topology import Topology


def codes_of(world: Any, limit: int = 0) -> Codes:
    folder = world.root / "codes" / "holdout"
    return read_codes(DataSet("codes", folder, Manifest.load(folder), limit))


@torch.inference_mode()
def test_nll_is_the_mean_over_all_codes_at_any_batch(world: Any, topology: Topology) -> None:
    codes = codes_of(world)
    prior = load_model(world.root / "prior_bottom", "prior").model
    target = codes.levels["bottom"].long()
    expected = float(code_nll(prior(target, codes.labels, [codes.levels["top"].long()]), target).double().mean())
    for batch in (5, 26, 100):
        assert likelihood(prior, codes, "bottom", topology, batch=batch).per_code() == pytest.approx(expected, rel=1e-6)


@torch.inference_mode()
def test_each_class_has_its_own_mean(world: Any, topology: Topology) -> None:
    codes = codes_of(world)
    prior = load_model(world.root / "prior_top", "prior").model
    target = codes.levels["top"].long()
    each = code_nll(prior(target, codes.labels), target).double().flatten(1).mean(1)
    found = likelihood(prior, codes, "top", topology, batch=7)
    expected = {label: float(each[codes.labels == label].mean()) for label in range(3)}
    assert found.by_class() == pytest.approx(expected, rel=1e-6)
    assert len({round(value, 4) for value in expected.values()}) == 3
    shifted = (codes.labels + 1) % 3  # a sample counts for its own class whatever class the prior is given
    partner = torch.tensor([int((codes.labels == label).nonzero()[0]) for label in shifted])
    other = likelihood(prior, codes, "top", topology, labels_of=partner).by_class()
    each = code_nll(prior(target, shifted), target).double().flatten(1).mean(1)
    assert other == pytest.approx({label: float(each[codes.labels == label].mean()) for label in range(3)}, rel=1e-6)


@torch.inference_mode()
def test_exchanged_conditioning_is_what_the_prior_sees(world: Any, topology: Topology) -> None:
    codes = codes_of(world)
    prior = load_model(world.root / "prior_bottom", "prior").model
    target, others = codes.levels["bottom"].long(), other_samples(len(codes), 0)
    upper = codes.levels["top"][others].long()
    expected = float(code_nll(prior(target, codes.labels, [upper]), target).double().mean())
    plain = likelihood(prior, codes, "bottom", topology).per_code()
    assert likelihood(prior, codes, "bottom", topology, upper_of=others).per_code() == pytest.approx(expected, rel=1e-6)
    assert abs(expected - plain) > 1e-4
    classes = other_classes(codes.labels, 0)
    expected = float(
        code_nll(prior(target, codes.labels[classes], [codes.levels["top"].long()]), target).double().mean()
    )
    assert likelihood(prior, codes, "bottom", topology, labels_of=classes).per_code() == pytest.approx(
        expected, rel=1e-6
    )
    assert abs(expected - plain) > 1e-4


def test_the_codes_are_all_there_in_order(world: Any) -> None:
    codes = codes_of(world)
    assert len(codes) == 26 and codes.labels.tolist() == [n % 3 for n in range(26)]
    assert codes.levels["top"].shape == (26, 4, 4) and codes.levels["bottom"].shape == (26, 8, 8)
    assert codes.above("bottom") == ["top"] and codes.above("top") == []
    assert codes.usage("top").sum() == 26 * 16
    assert len(codes_of(world, limit=7)) == 7


@pytest.mark.parametrize("n", [2, 3, 50])
def test_other_samples_are_a_derangement(n: int) -> None:
    partner = other_samples(n, 1)
    assert sorted(partner.tolist()) == list(range(n)) and (partner != torch.arange(n)).all()
    assert torch.equal(partner, other_samples(n, 1))
    assert n < 4 or not torch.equal(partner, other_samples(n, 2))


@pytest.mark.parametrize("labels", [[0, 1], [0] * 5 + [1] * 5, [2, 2, 0, 1, 1, 0, 2, 0, 1], [7] * 3 + [1, 2, 3]])
def test_other_classes_differ_and_are_each_used_once(labels: list[int]) -> None:
    own = torch.tensor(labels)
    partner = other_classes(own, 3)
    assert sorted(partner.tolist()) == list(range(len(labels)))
    assert (own[partner] != own).all()


def test_a_class_of_most_samples_is_exchanged_as_far_as_it_goes() -> None:
    own = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])
    partner = other_classes(own, 0)
    assert sorted(partner.tolist()) == list(range(8))
    assert int((own[partner] != own).sum()) == 4  # the two others, and the two that get them


def test_bits_per_dim_by_hand() -> None:
    nats = {"top": math.log(512), "bottom": math.log(512)}
    grids = {"top": (32, 32), "bottom": (64, 64)}
    assert bits_per_dim(nats, grids, 256) == pytest.approx(9 * (1024 + 4096) / (3 * 256**2))
