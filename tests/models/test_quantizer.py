"""The quantizer against independent oracles: vector-quantize-pytorch, torch.optim.Adam, brute force, known answers."""

import math

import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch
from support.quantizers import D, K, inputs, learn, quantizer, state, update, with_dead_codes
from torch import nn

from vqscale.models.codebook import nearest_codes, perplexity, search_block
from vqscale.models.quantizer import Quantized, QuantizerConfig, VectorQuantizer

# ---- nearest code, value, gradient


def test_nearest_is_the_brute_force_nearest():
    rng = torch.Generator().manual_seed(0)
    z, embedding = torch.randn(300, 16, generator=rng), torch.randn(50, 16, generator=rng)
    assert torch.equal(nearest_codes(z, embedding), torch.cdist(z.double(), embedding.double()).argmin(1))


def test_ties_go_to_the_lowest_index():
    codebook = torch.tensor([[2.0, 0], [1.0, 0], [0.0, 1], [1.0, 0]])
    assert nearest_codes(torch.zeros(3, 2), codebook).tolist() == [1] * 3
    far = torch.full((5000, 2), 9.0)  # also where the codes are compared in several parts
    assert nearest_codes(torch.zeros(3, 2), torch.cat([far, codebook, far, codebook])).tolist() == [5001] * 3


def test_a_search_over_65536_codes_never_holds_more_than_the_stated_block(monkeypatch):
    made: list[int] = []
    addmm = torch.addmm

    def watch(*args, **kwargs):
        out = addmm(*args, **kwargs)
        made.append(out.numel())
        return out

    monkeypatch.setattr(torch, "addmm", watch)
    codebook = torch.randn(65536, 8, generator=torch.Generator().manual_seed(0))  # points well apart
    codes = nearest_codes(codebook[1000:1100].clone(), codebook)
    assert codes.tolist() == list(range(1000, 1100))
    assert max(made) <= 2**19 and sum(made) == 100 * 65536
    for device, most in (("cpu", 2**19), ("cuda", 2**23)):
        assert all(math.prod(search_block(codes, torch.device(device))) == most for codes in (2, 512, 65536))


def test_straight_through_gradient_and_value_match_the_reference_library():
    oracle = vector_quantize_pytorch.VectorQuantize(
        dim=D, codebook_size=K, commitment_weight=0.25, accept_image_fmap=True, rotation_trick=False
    )
    q = quantizer().eval()
    oracle._codebook.embed.copy_(q.embedding[None])
    oracle.eval()
    ours, theirs = inputs().requires_grad_(), inputs().requires_grad_()
    weight = torch.randn(ours.shape)
    mine = q(ours)
    (mine.vectors * weight).sum().backward()
    vectors, codes, _ = oracle(theirs)
    assert torch.equal(mine.codes, codes)
    torch.testing.assert_close(mine.vectors, vectors)
    assert torch.equal(ours.grad, weight)
    # the library's own straight-through, in training, without learning
    oracle.train()
    trained, _, commitment = oracle(theirs, freeze_codebook=True)
    (trained * weight).sum().backward(retain_graph=True)
    torch.testing.assert_close(theirs.grad, ours.grad)
    torch.testing.assert_close(mine.commitment, commitment.squeeze())


def test_the_value_is_the_code_to_the_last_bit():
    q = quantizer()
    out = q((inputs() * 1e3).requires_grad_())
    assert torch.equal(out.vectors, q.lookup(out.codes))


def test_commitment_moves_z_towards_its_code_and_codebook_loss_has_no_gradient():
    q, z = quantizer(commitment=0.5), inputs().requires_grad_()
    out = q(z)
    out.commitment.backward()
    expected = 0.5 * 2 * (z - q.lookup(out.codes)) / z.numel()
    torch.testing.assert_close(z.grad, expected.detach())
    assert not out.codebook_loss.requires_grad
    torch.testing.assert_close(out.commitment.detach(), 0.5 * out.codebook_loss)


# ---- moving averages


def test_one_ema_step_matches_the_reference_library():
    oracle = vector_quantize_pytorch.VectorQuantize(
        dim=D, codebook_size=K, decay=0.9, eps=1e-12, accept_image_fmap=True, threshold_ema_dead_code=0
    )
    q = quantizer(decay=0.9)
    oracle._codebook.embed.copy_(q.embedding[None])
    oracle._codebook.embed_avg.copy_(q.embedding_sum[None])
    oracle._codebook.cluster_size.copy_(q.cluster_size[None])
    for seed in (2, 3):
        oracle.train()(inputs(seed=seed))
        learn(q, inputs(seed=seed))
        torch.testing.assert_close(q.embedding, oracle._codebook.embed[0])
        torch.testing.assert_close(q.cluster_size, oracle._codebook.cluster_size[0])
        torch.testing.assert_close(q.embedding_sum, oracle._codebook.embed_avg[0])


def test_the_decay_rises_to_its_value_and_a_resume_goes_on_from_there():
    q = quantizer(decay_warmup=10, decay=0.9)
    expected = q.cluster_size.clone()
    for t in range(120):
        if t == 5:
            q.load_state_dict(quantizer(decay_warmup=10, decay=0.9).state_dict() | state(q))
        counts = q(inputs(seed=t), track=False).codes.flatten().bincount(minlength=K)
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * counts
        learn(q, inputs(seed=t))
        torch.testing.assert_close(q.cluster_size, expected)
    assert decay == 0.9


def test_codes_follow_encoder_vectors_that_shrink_early():
    q = quantizer(decay_warmup=10, restart_below=0.1)
    vectors = q.embedding.repeat_interleave(4, dim=0).view(2, 4, 4, D).permute(0, 3, 1, 2)
    for t in range(20):
        z = vectors * 0.8**t + 0.01 * inputs(2, seed=t)
        metrics = learn(q, z)
    assert metrics["used_codes/top"] >= K - 1  # a constant decay of 0.99 leaves the codes behind, and one or two in use


def test_forward_never_changes_the_codebook_and_evaluation_leaves_no_trace():
    q = quantizer(restart_below=0.1)
    before = state(q)
    q.train()(inputs())
    assert all(torch.equal(before[name], value) for name, value in q.state_dict().items())
    update(q, 6, applied=False)
    q.eval()(inputs())
    assert q.counts.sum() == 0 and q.images == 0


def test_a_skipped_step_discards_its_statistics():
    q, fresh = quantizer(restart_below=0.1), quantizer(restart_below=0.1)
    q(inputs(seed=5))
    before = state(q)
    assert update(q, 6, applied=False) == {}
    assert all(torch.equal(before[name], value) for name, value in q.state_dict().items())
    learn(q, inputs())
    learn(fresh, inputs())
    assert torch.equal(q.embedding, fresh.embedding)


def test_an_unused_code_keeps_its_place_however_long():
    q = quantizer(decay=0.5)
    far = torch.full((D,), 50.0)
    q.embedding[3] = far
    q.embedding_sum[3] = far
    for _ in range(200):  # 0.5 ** 200 is below float32's smallest number
        learn(q, inputs(images=2))
    torch.testing.assert_close(q.embedding[3], far)
    torch.testing.assert_close(q.embedding, q.embedding_sum / q.cluster_size[:, None])


def test_counting_twice_is_caught():
    q = quantizer()
    q(inputs())
    q(inputs())  # a recomputed forward
    with pytest.raises(AssertionError, match="12 images after 6"):
        update(q, 6)
    q.discard_statistics()
    q(inputs())
    q.counts += 1
    with pytest.raises(RuntimeError, match="96 vectors once each"):
        update(q, 6)


def test_metrics_have_known_answers():
    assert perplexity(torch.tensor([5.0, 5, 5, 5])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([9.0, 0, 0, 0])).item() == pytest.approx(1)
    assert perplexity(torch.tensor([1.0, 3])).item() == pytest.approx(4 / 3**0.75)
    q = quantizer()
    q.set_codebook(torch.eye(K, D) * 10)
    z = torch.zeros(1, D, 1, 2)
    z[0, 0, 0, 0] = z[0, 1, 0, 1] = 10
    metrics = learn(q, z)
    assert metrics["perplexity/top"].item() == pytest.approx(2)
    assert metrics["used_codes/top"] == 2 and metrics["restarts/top"] == 0


# ---- the gradient codebook


def test_gradient_codebook_is_adam_on_the_codebook_loss():
    q = quantizer(codebook="gradient")
    oracle = nn.Parameter(q.embedding.clone())
    adam = torch.optim.Adam([oracle], lr=1e-2)
    for step in range(4):
        z = inputs(seed=step)
        codes = q(z).codes
        loss = F.mse_loss(F.embedding(codes, oracle), z.permute(0, 2, 3, 1))
        torch.testing.assert_close(loss.detach(), q(z, track=False).codebook_loss)
        adam.zero_grad()
        loss.backward()
        adam.step()
        update(q, 6, learning_rate=1e-2)
        torch.testing.assert_close(q.embedding, oracle.detach())
    assert {"adam_mean", "adam_square", "updates"} <= q.state_dict().keys()


# ---- precision


def test_float32_under_autocast_and_after_a_cast():
    z = inputs() * 20 + 100  # distances that bfloat16 can't tell apart
    q = quantizer()
    q.set_codebook(z.permute(0, 2, 3, 1).reshape(-1, D)[:K])
    expected = q(z)
    sums, counts = q.sums.clone(), q.counts.clone()
    q.discard_statistics()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = q(z)
    assert torch.equal(out.codes, expected.codes) and torch.equal(out.commitment, expected.commitment)
    assert torch.equal(q.sums, sums) and torch.equal(q.counts, counts)
    before = q.embedding.clone()
    q.to(torch.bfloat16).half()
    assert all(b.dtype == torch.float32 for b in q.buffers()) and torch.equal(q.embedding, before)
    assert q(z.bfloat16()).vectors.dtype == torch.bfloat16


def test_float64_model_has_a_float64_quantizer():
    q = quantizer(codebook="gradient", restart_below=0.2).double()
    out = q(inputs().double(), torch.arange(6))
    update(q, 6)
    assert out.vectors.dtype == out.commitment.dtype == torch.float64
    assert all(b.dtype == torch.float64 for b in q.buffers())


def test_the_search_is_exact_whatever_the_matmul_setting():
    before = torch.get_float32_matmul_precision()
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.addmm.default:
                seen.append(torch.backends.cuda.matmul.fp32_precision)
            return func(*args, **(kwargs or {}))

    try:
        torch.set_float32_matmul_precision("high")
        with Watch():
            nearest_codes(torch.randn(10, 4), torch.randn(6, 4))
        assert seen == ["ieee"] and torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


# ---- state


def test_statistics_are_not_in_the_state_dict_and_a_reload_continues_exactly():
    q = with_dead_codes()
    learn(q, inputs(seed=3))
    assert set(q.state_dict()) == {"embedding", "cluster_size", "embedding_sum", "updates"}
    copy = VectorQuantizer(q.config)
    copy.load_state_dict(q.state_dict())
    for model in (q, copy):
        learn(model, inputs(seed=4))
    assert torch.equal(q.embedding, copy.embedding)


def test_a_step_leaves_the_global_generator_alone():
    q = with_dead_codes()
    before = torch.get_rng_state()
    learn(q, inputs())
    assert torch.equal(before, torch.get_rng_state())


def test_decode_of_codes_and_the_mean_vector():
    q = quantizer()
    out: Quantized = q(inputs())
    assert torch.equal(q.lookup(out.codes.int()), q.embedding[out.codes].permute(0, 3, 1, 2))
    q.cluster_size.copy_(torch.arange(K) + 1.0)
    q.embedding_sum.copy_(q.embedding * q.cluster_size[:, None])
    weights = q.cluster_size / q.cluster_size.sum()
    torch.testing.assert_close(q.mean_vector(), weights @ q.embedding)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"num_codes": 1}, "num_codes=1"),
        ({"num_codes": 70000}, "num_codes=70000: must be from 2 to 65536"),
        ({"code_dim": 0}, "code_dim=0"),
        ({"codebook": "emma"}, "codebook=emma: choose from ema, gradient"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"decay_warmup": -1}, "decay_warmup=-1"),
        ({"commitment": -1.0}, "commitment=-1.0"),
        ({"restart_below": 1.5}, "restart_below=1.5"),
    ],
)
def test_bad_options_are_refused(option, match):
    with pytest.raises(ValueError, match=match):
        QuantizerConfig(**option)
