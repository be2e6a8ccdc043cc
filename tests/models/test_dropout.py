"""Dropout is a function of (seed, position, layer, element): rate, independence, recompute, compile."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vqscale.models.dropout import Dropout, drop_labels, drop_mask, dropout_key, layer_word

GOLDEN_KEYS = [2659898248569622777, -6090027864693113979, -8658293471161497562]
GOLDEN_BITS = ["1011001001111000", "1110000101110011", "0001111111001111"]
KEYS = dropout_key(7, torch.arange(6))


def test_golden_values():
    """The numbers themselves are a contract: a change would alter every run that resumes."""
    key = dropout_key(7, torch.tensor([0, 1, 123456789012]))
    assert key.tolist() == GOLDEN_KEYS
    bits = drop_mask(key, layer_word(3), 16, 0.5).int()
    assert ["".join(map(str, row)) for row in bits.tolist()] == GOLDEN_BITS


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p):
    x = torch.ones(4, 200, 300)
    y = Dropout(p, 0)(x, KEYS[:4])
    dropped = (y == 0).double().mean(dim=(1, 2))
    assert torch.allclose(dropped, torch.full((4,), p).double(), atol=5 * (p * (1 - p) / 60_000) ** 0.5)
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)))


def test_samples_layers_and_seeds_are_independent():
    """Any two masks agree on about half of the elements at p = 1/2, also when one is shifted against the other."""
    n = 1 << 15
    other = dropout_key(8, torch.arange(6))
    cases = [(KEYS, 0), (KEYS, 1), (other, 0)]
    masks = torch.cat([drop_mask(key, layer_word(layer), n, 0.5) for key, layer in cases])
    for shift in (0, 1, 2, 64):
        signs = masks.double() * 2 - 1
        agreement = signs @ signs.roll(shift, dims=1).t() / n
        if shift == 0:
            agreement.fill_diagonal_(0)
        assert agreement.abs().max() < 5 / n**0.5
    assert (masks.double().mean(dim=0) - 0.5).abs().max() < 0.5  # no element is the same in all masks


def test_identity_without_key_in_evaluation_and_at_zero():
    x = torch.randn(2, 5)
    assert Dropout(0.5, 0)(x, None) is x
    assert Dropout(0.0, 0)(x, KEYS[:2]) is x
    assert Dropout(0.5, 0).eval()(x, KEYS[:2]) is x
    assert not torch.equal(Dropout(0.5, 0)(x, KEYS[:2]), x)


def test_same_mask_in_any_batch_and_any_memory_format():
    x, drop = torch.randn(6, 4, 3, 8), Dropout(0.3, 5)
    whole = drop(x, KEYS)
    parts = torch.cat([drop(x[:1], KEYS[:1]), drop(x[1:4], KEYS[1:4]), drop(x[4:], KEYS[4:])])
    assert torch.equal(whole, parts)
    assert torch.equal(whole, drop(x.to(memory_format=torch.channels_last), KEYS))


def test_same_mask_in_recompute_and_under_compile():
    drop = Dropout(0.4, 2)

    def branch(x: torch.Tensor) -> torch.Tensor:
        return drop(torch.tanh(x) * 2, KEYS).square().sum()

    plain, recomputed = (torch.linspace(-1, 1, 6 * 50).view(6, 50).requires_grad_() for _ in range(2))
    branch(plain).backward()
    checkpoint(branch, recomputed, use_reentrant=False, preserve_rng_state=False).backward()
    assert torch.equal(plain.grad, recomputed.grad)
    compiled = torch.compile(drop, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(plain.detach(), KEYS), drop(plain.detach(), KEYS))


def test_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Dropout(0.5, 0)(torch.ones(6, 100), KEYS)
    assert torch.equal(before, torch.get_rng_state())


def test_labels_are_dropped_at_the_rate_asked_for():
    label, key = torch.full((20_000,), 3), dropout_key(1, torch.arange(20_000))
    dropped = drop_labels(label, key, 0.25, null=9)
    assert set(dropped.tolist()) == {3, 9}
    assert abs((dropped == 9).double().mean().item() - 0.25) < 0.015
    assert drop_labels(label, None, 0.25, null=9) is label


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_refuses_a_rate_out_of_range(p):
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
        Dropout(p, 0)
