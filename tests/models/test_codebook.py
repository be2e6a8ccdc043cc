"""Codebooks that start from data: reproducible, used, level by level; and a short training from there."""

import pytest
import torch
import torch.nn.functional as F
from support.vqvaes import images, update, vqvae
from torch import Tensor

from vqscale.models.vqvae import VQVAE

# ---- init


def nothing() -> None:
    """Between two batches."""


def test_codebooks_from_data_are_reproducible_consistent_and_used():
    data = images(32)
    one, same, other = (vqvae(fitted=False) for _ in range(3))
    before = torch.get_rng_state()
    one.init_codebooks(iter([data]), seed=0)
    same.init_codebooks(iter(data.split(8)), seed=0)
    other.init_codebooks(iter([data]), seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for a, b, c in zip(*(m.quantizers.values() for m in (one, same, other)), strict=True):
        torch.testing.assert_close(a.embedding, b.embedding)
        assert not torch.allclose(a.embedding, c.embedding)
        assert torch.equal(a.embedding_sum, a.embedding * a.cluster_size[:, None])
    assert one.training and all(q.images == 0 for q in one.quantizers.values())
    out = one(data, torch.arange(32))
    metrics = update(one)
    assert all(metrics[f"used_codes/{name}"] == 16 for name in one.level_names)
    assert out.codebook_loss < 0.5 * spread(one, data)


def spread(model: VQVAE, data: Tensor) -> float:
    """What one code per level would leave: the variance of the encoder vectors, summed over levels."""
    with torch.no_grad():
        vectors = [model._sample_vectors([data], index, 0, nothing) for index in range(len(model.levels))]
    return sum(v.var(dim=0, correction=0).mean().item() for v in vectors)


def test_fewer_vectors_than_codes_repeat_with_a_jitter():
    model = vqvae(num_codes=64, fitted=False)
    model.init_codebooks([images(1)], seed=0)  # 16 top vectors, 64 bottom ones
    q = model.quantizers["top"]
    assert len(q.embedding.unique(dim=0)) == 64
    model.eval()
    z = model._sample_vectors([images(1)], 0, 0, nothing)
    assert torch.cdist(q.embedding.double(), z.double()).min(1).values.max() < 0.02 * z.std()
    with pytest.raises(ValueError, match="at least one batch"):
        model.init_codebooks([], seed=0)


def test_lower_levels_start_from_the_quantized_levels_above():
    model, stale = vqvae(fitted=False), vqvae(fitted=False)
    data = images(16)
    model.init_codebooks([data], seed=0)
    key_vectors = stale._sample_vectors([data], 1, 0, nothing)  # the bottom's vectors under the top's random codebook
    assert not torch.allclose(model.eval()._sample_vectors([data], 1, 0, nothing), key_vectors)


# ---- training


def test_sixty_steps_lower_the_loss_and_use_the_codes():
    model = vqvae([4, 2], resolution=32, fitted=False, hidden=32, residual_hidden=16, num_codes=32)

    def batch(step: int) -> Tensor:  # a disc and a bar of random colours and places
        generator = torch.Generator().manual_seed(step)
        y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
        place, colour = torch.rand(8, 3, generator=generator) * 1.6 - 0.8, torch.rand(8, 6, generator=generator) * 2 - 1
        disc = (x - place[:, 0, None, None]) ** 2 + (y - place[:, 1, None, None]) ** 2 < 0.2
        bar = (x - place[:, 2, None, None]).abs() < 0.15
        image = torch.where(bar[:, None], colour[:, 3:, None, None], torch.tensor(1.0))
        return torch.where(disc[:, None], colour[:, :3, None, None], image)

    model.init_codebooks([batch(step) for step in range(8)], seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for step in range(60):
        image = batch(step)
        out = model(image, torch.arange(8) + 8 * step)
        mse = F.mse_loss(out.reconstruction, image)
        optimizer.zero_grad()
        (mse + out.commitment).backward()
        optimizer.step()
        metrics = update(model, step)
        losses.append(mse.item())
    assert sum(losses[-10:]) < 0.35 * sum(losses[:3]) / 3 * 10
    assert metrics["used_codes/top"] >= 10 and metrics["used_codes/bottom"] >= 16
    assert all(q.embedding.isfinite().all() for q in model.quantizers.values())
