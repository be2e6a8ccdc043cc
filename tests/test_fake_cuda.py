"""The GPU path on fake CUDA tensors, which have a device, a type and a shape, but no values and no GPU.

An operation on tensors of two devices raises here as on a GPU. What needs values is left out: backward passes, and the
host's looks at logits and labels.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import priors
from support.vqvaes import SIZES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vqscale.engine.ema import WeightEMA
from vqscale.engine.optim import build_adamw
from vqscale.models.dropout import dropout_key
from vqscale.models.prior import nll
from vqscale.models.quantizer import QuantizerConfig
from vqscale.models.sampling import choose
from vqscale.models.vqvae import VQVAE, VQVAEConfig
from vqscale.stages import train_vqvae
from vqscale.topology import Topology

KINDS = ("pixelcnn", "transformer")
BATCH = 3
CUDA = torch.device("cuda", 0)
ALONE = Topology(0, 1, 0, 1, 1, "single", CUDA)


class Transfers(TorchDispatchMode):
    """Notes operations between the host's tensors and the device's; single numbers do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {tensor.device.type for tensor in tensors_in([args, kwargs, out]) if tensor.ndim}
        if len(devices) > 1:
            self.seen.append(str(func))
        return out


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [value] if isinstance(value, Tensor) else []


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    """Fake tensors, new ones on a GPU; autocast believes that there is one."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_args, **_options: True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.amp.autocast_mode.is_bf16_supported", lambda *_: True, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(CUDA), Transfers() as noted:
        with torch.compiler.set_stance("force_eager"):  # kernels are made for real tensors only
            yield noted
    assert noted.seen == []


def on_gpu(value: Any) -> bool:
    tensors = tensors_in(value)
    return bool(tensors) and all(tensor.device == CUDA for tensor in tensors)


def vqvae(codebook: str = "ema") -> VQVAE:
    config = VQVAEConfig(quantizer=QuantizerConfig(num_codes=16, code_dim=8, codebook=codebook), **SIZES)
    return VQVAE(config, resolution=16)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_a_vqvae_s_training_step(transfers: Transfers, codebook: str, precision: torch.dtype) -> None:
    """Forward, AdamW on gradients of the right shapes, codebooks, weight EMA."""
    model = vqvae(codebook).train()
    assert on_gpu(list(model.state_dict().values()))
    optimizer = build_adamw(model.parameters(), betas=(0.9, 0.999), weight_decay=0.01)
    averages = WeightEMA(dict(model.named_parameters()), halflife=100, rampup=0.05)
    batch: Any = {"image": torch.empty(BATCH, 3, 16, 16, dtype=torch.uint8), "position": torch.arange(BATCH)}
    for step in range(2):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss, metrics = train_vqvae.training_step(train_vqvae.TrainVQVAEConfig())(model, batch)
        assert on_gpu([loss, metrics]) and loss.dtype == torch.float32 and loss.requires_grad
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        assert transfers.seen == []
        update = model.update_codebooks(ALONE, seed=0, images_seen=step, applied=True, learning_rate=1e-3)
        assert len(transfers.seen) <= len(model.levels)  # which cells restarts come from: one small table a level
        transfers.seen.clear()
        averages.update(BATCH, BATCH)
        assert on_gpu([update, averages.averages])
    assert all(level.embedding.dtype == torch.float32 for level in model.quantizers.values())
    assert on_gpu([state for state in optimizer.state.values()])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_encoding_and_decoding(transfers: Transfers, precision: torch.dtype) -> None:
    model = vqvae().eval()
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
        image = torch.empty(BATCH, 3, 16, 16)
        codes = model.encode(image)
        outputs = [model.decode(codes), model.decode_upper(codes[:1]), model(image).reconstruction]
    assert on_gpu([codes, outputs])
    assert [(tuple(level.shape), level.dtype) for level in codes] == [
        ((BATCH, *grid), torch.int64) for grid in model.grids
    ]
    assert all(output.shape == image.shape and output.dtype == precision for output in outputs)


def test_images_enter_a_vqvae_with_channels_last(transfers: Transfers) -> None:
    model, seen = vqvae().eval(), []
    model.levels[-1].encoder.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    with torch.inference_mode():
        model.encode(torch.empty(BATCH, 3, 16, 16))
    assert seen == [True]


def prior_and_inputs(kind: str, levels: int) -> tuple[Any, Tensor, Tensor, list[Tensor]]:
    upper = [(2, 2)] * (levels - 1)
    changes: dict[str, Any] = {"attention_every": 2, "class_dropout": 0.5} if kind == "pixelcnn" else {}
    config = priors.dataclasses.replace(priors.SMALL[kind], **changes)
    model = priors.KINDS[kind](config, num_codes=priors.K, grid=(4, 3), num_classes=priors.CLASSES, upper_grids=upper)
    codes, label = torch.zeros(BATCH, 4, 3, dtype=torch.int64), torch.zeros(BATCH, dtype=torch.int64)
    return model, codes, label, [torch.zeros(BATCH, *grid, dtype=torch.int64) for grid in upper]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_s_forward(transfers: Transfers, kind: str, levels: int, precision: torch.dtype) -> None:
    model, codes, label, upper = prior_and_inputs(kind, levels)
    key = dropout_key(0, torch.arange(BATCH))
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
        logits = model.train()(codes, label, upper, dropout_key=key)
        loss = nll(logits, codes)
    assert on_gpu([key, logits, loss]) and logits.shape == (BATCH, priors.K, 4, 3)
    assert logits.dtype == precision and loss.dtype == torch.float32


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_sampling(transfers: Transfers, kind: str, levels: int, precision: torch.dtype) -> None:
    """All rows of two batches, one after the other in the same memory, with every way of choosing a code."""
    model, _, label, upper = prior_and_inputs(kind, levels)
    uniform = torch.zeros(BATCH, dtype=torch.float64)
    ways: list[dict[str, Any]] = [{}, {"temperature": torch.ones((), dtype=torch.float64)}, {"top_k": 3, "top_p": 0.9}]
    with torch.inference_mode():
        weights = model.eval().sampling_weights(precision)
        for _ in range(2):
            state = weights.state(BATCH)
            state.reset(label, upper)
            for row in range(4):
                state.begin_row(row)
                for column in range(3):
                    logits = state.next_logits(column)
                    assert on_gpu(logits) and logits.shape == (BATCH, priors.K) and logits.dtype == precision
                    state.row[:, column] = choose(logits, uniform, **ways[column])
                state.end_row(row)
    assert on_gpu(state.codes) and state.codes.shape == (BATCH, 4, 3) and state.codes.dtype == torch.int64
