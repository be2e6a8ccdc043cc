"""Restarts of dead codes: kept, preferred where badly quantized, and alike at any number of ranks."""

import pytest
import torch
from support.quantizers import D, K, Rank, inputs, learn, quantizer, state, update, with_dead_codes
from torch import Tensor

from vqscale.models.codebook import choose_restarts
from vqscale.models.quantizer import QuantizerConfig, VectorQuantizer

# ---- restarts


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_dead_codes_restart_at_encoder_vectors_and_stay(codebook):
    q = with_dead_codes(codebook=codebook)
    z = inputs()
    assert learn(q, z)["restarts/top"] == 2
    vectors = z.permute(0, 2, 3, 1).reshape(-1, D)
    restarted = q.embedding[[2, 5]].clone()
    assert (
        torch.cdist(restarted.double(), vectors.double()).min(1).values.max() < 1e-6
    )  # both are vectors of the batch,
    assert not torch.equal(restarted[0], restarted[1])  # and not the same one
    torch.testing.assert_close(q.embedding_sum, q.embedding * q.cluster_size[:, None])
    metrics = learn(q, z)  # neither undone, nor dead again
    assert metrics["restarts/top"] == 0
    assert q.counts.sum() == 0 and q.cluster_size[[2, 5]].min() > 0.1
    assert torch.cdist(q.embedding[[2, 5]], restarted).diagonal().max() < 1.0
    assert q.eval()(z).codes.unique().tolist() == sorted({*q(z).codes.unique().tolist(), 2, 5})


def test_a_restart_resets_the_codes_own_adam_state():
    q = with_dead_codes(codebook="gradient")
    q.adam_mean.fill_(1)
    q.adam_square.fill_(1)
    learn(q, inputs())
    assert q.adam_mean[[2, 5]].abs().max() == 0 and q.adam_square[[2, 5]].abs().max() == 0
    assert q.adam_mean[0].abs().min() > 0.5


def test_codes_in_use_are_not_restarted_and_zero_switches_restarts_off():
    assert learn(quantizer(restart_below=0.01), inputs())["restarts/top"] == 0
    q = with_dead_codes()
    q.config = QuantizerConfig(num_codes=K, code_dim=D, restart_below=0.0)
    before = q.embedding[2].clone()
    assert learn(q, inputs())["restarts/top"] == 0
    torch.testing.assert_close(q.embedding[2], before)


def test_restarts_prefer_badly_quantized_vectors():
    q = with_dead_codes()
    z = q.lookup(torch.zeros(6, 4, 4, dtype=torch.int64))  # a background that code 0 hits exactly,
    z[:, :, ::2, ::2] += 3.0  # and a few cells that it misses
    learn(q, z)
    assert (q.embedding[[2, 5]] - q.embedding[0]).abs().min() > 1


@pytest.mark.parametrize(("num_codes", "restarted"), [(16384, 256), (65536, 1024)])
def test_a_large_codebook_restarts_more_codes_in_a_step(num_codes, restarted):
    """In proportion: with 256 at most, 6 % of 65,536 codes were still unused after 500 steps."""
    q = quantizer(num_codes=num_codes, restart_below=0.5)
    q.cluster_size[1000:] = 0
    assert learn(q, inputs(images=64, side=8))["restarts/top"] == restarted


# ---- distribution


class Ranks:
    """Calls a function per rank in turn, with a sum over all of them, as an all_reduce gives it."""

    def __init__(self, world: int):
        self.world = world
        self.totals: list[Tensor] = []

    def run(self, quantizers: list[VectorQuantizer], images: int, **options) -> list[dict[str, Tensor]]:
        parts: list[Tensor] = []

        class Collected(Exception):
            pass

        def collect(total: Tensor) -> None:
            parts.append(total.clone())
            raise Collected

        for rank, q in enumerate(quantizers):
            with pytest.raises(Collected):
                update(q, images, ranks=Rank(rank, self.world, collect), **options)
        total = torch.stack(parts).sum(0)
        return [
            update(q, images, ranks=Rank(rank, self.world, lambda t: t.copy_(total)), **options)
            for rank, q in enumerate(quantizers)
        ]


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize(("world", "micro"), [(2, 4), (2, 2), (4, 1)])
def test_ranks_and_accumulation_do_not_change_the_codebook(codebook, world, micro):
    one, ranks = with_dead_codes(codebook=codebook), [with_dead_codes(codebook=codebook) for _ in range(world)]
    z, first = inputs(images=8), 8 * 1234567890123  # a global batch of 8 far into the run
    position = torch.arange(first, first + 8)
    for step in range(3):
        one(z, position + 8 * step)
        alone = update(one, 8, key=step)
        for rank, q in enumerate(ranks):
            for start in range(rank * 8 // world, (rank + 1) * 8 // world, micro):
                part = slice(start, start + micro)
                q(z[part], (position + 8 * step)[part])
        shared = Ranks(world).run(ranks, 8 // world, key=step)
        if step == 0:
            assert alone["restarts/top"] == 2
        for q, metrics in zip(ranks, shared, strict=True):
            assert all(torch.equal(q.state_dict()[name], ranks[0].state_dict()[name]) for name in state(q))
            torch.testing.assert_close(q.embedding, one.embedding)
            torch.testing.assert_close(q.cluster_size, one.cluster_size)
            for name, value in alone.items():
                torch.testing.assert_close(metrics[name], value)
        z = z.flip(0) * 1.1


def test_without_positions_ranks_still_agree():
    ranks = [with_dead_codes(), with_dead_codes()]
    for q, part in zip(ranks, inputs(images=8).chunk(2), strict=True):
        q(part)
    metrics = Ranks(2).run(ranks, 4)
    assert metrics[0]["restarts/top"] == 2
    assert torch.equal(ranks[0].embedding, ranks[1].embedding)


def test_a_sample_seen_by_two_ranks_is_caught():
    ranks = [with_dead_codes(), with_dead_codes()]
    for q, part in zip(ranks, inputs(images=8).chunk(2), strict=True):
        q(part, torch.arange(4))
    with pytest.raises(RuntimeError, match="belongs to no rank, or to two"):
        Ranks(2).run(ranks, 4)


def test_codes_used_alike_restart_in_their_own_order():
    """As they do on a GPU, where `topk` has another order among equals."""
    used = torch.tensor([2.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 2.0] * 40)
    pool = torch.cat([torch.randn(180, D), torch.ones(180, 2)], dim=1)
    codes, restart, _ = choose_restarts(used, pool, torch.tensor(0.5), key=3)
    expected = [*(used == 0).nonzero()[:, 0].tolist(), *(used == 1).nonzero()[:, 0].tolist()][:180]
    assert codes.tolist() == expected and restart.sum() == 160


def test_restarts_differ_with_the_key():
    made = []
    for key in (1, 2, 1):
        q = with_dead_codes()
        q(inputs(), torch.arange(6))
        update(q, 6, key=key)
        made.append(q.embedding[[2, 5]])
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
