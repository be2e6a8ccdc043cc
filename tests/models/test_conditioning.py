"""Trained priors use their class and the codes above, and guidance draws samples to the class.

Codes made by rule: each is the code above it, or one of its class's four, or any. Both kinds learn them in seconds.
"""

import functools
from typing import Any

import pytest
import torch
from support.priors import KINDS
from torch import Tensor

from vqscale.models.dropout import dropout_key
from vqscale.models.init import initialise
from vqscale.models.prior import PriorConfig, nll, resize_nearest
from vqscale.models.sampling import sample_codes

K, CLASSES, GRID, UPPER = 12, 3, (4, 4), (2, 2)
STEPS, BATCH, TEST = 120, 32, 256
SIZES: dict[str, Any] = {
    "hidden": 16,
    "residual": 16,
    "layers": 2,
    "heads": 2,
    "conditioning_layers": 1,
    "class_dropout": 0.2,
}


def made(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, labels, codes above) of n samples."""
    rng = torch.Generator().manual_seed(seed)
    label, upper = torch.randint(CLASSES, (n,), generator=rng), torch.randint(K, (n, *UPPER), generator=rng)
    of_class = label[:, None, None] * 4 + torch.randint(4, (n, *GRID), generator=rng)
    choice = torch.rand(n, *GRID, generator=rng)
    codes = torch.where(choice < 0.4, resize_nearest(upper, GRID), of_class)
    return torch.where(choice > 0.8, torch.randint(K, (n, *GRID), generator=rng), codes), label, upper


@functools.cache
def trained(kind: str) -> Any:
    model = KINDS[kind](PriorConfig(kind, **SIZES), num_codes=K, grid=GRID, num_classes=CLASSES, upper_grids=[UPPER])
    initialise(model, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        codes, label, upper = made(BATCH, seed=step)
        key = dropout_key(0, torch.arange(BATCH) + step * BATCH)
        loss = nll(model(codes, label, [upper], dropout_key=key), codes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_another_samples_class_or_codes_above_cost_nats(kind: str) -> None:
    model, (codes, label, upper) = trained(kind), made(TEST, seed=10_000)
    plain = float(nll(model(codes, label, [upper]), codes))
    assert plain < 2.1  # of ln 12 = 2.48; the rule's own entropy is about 1.9
    assert float(nll(model(codes, (label + 1) % CLASSES, [upper]), codes)) > plain + 0.1
    assert float(nll(model(codes, label, [upper.roll(1, 0)]), codes)) > plain + 0.1
    assert float(nll(model(codes, torch.full_like(label, CLASSES), [upper]), codes)) > plain + 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_draws_samples_to_their_class(kind: str) -> None:
    model, (_, _, upper) = trained(kind), made(TEST, seed=10_001)
    label, ids = torch.arange(TEST) % CLASSES, torch.arange(TEST)
    share = []
    for guidance in (-1.0, 0.0, 2.0):  # -1: the class is not used at all
        drawn = sample_codes(model, label, [upper], seed=0, sample_ids=ids, guidance=guidance)
        share.append(float((drawn // 4 == label[:, None, None]).double().mean()))
    assert share[0] + 0.1 < share[1] < share[2] - 0.1
    assert share[0] < 0.5
