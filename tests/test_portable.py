"""Other systems, as far as Linux can try them: what macOS lacks is taken away, and Apple's GPU is fake."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import priors
from support.vqvaes import SIZES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vqscale.batch import as_float64
from vqscale.config import StageConfig
from vqscale.evaluation.inputs import EvaluateConfig
from vqscale.models.quantizer import QuantizerConfig
from vqscale.models.sampling import Options, RowSampler
from vqscale.models.vqvae import VQVAE, VQVAEConfig
from vqscale.stages import train_vqvae
from vqscale.topology import Topology, bring_up, device_of, slower_than_asked, take_down

SCRIPT = Path(__file__).parent / "support" / "without_linux.py"
GPU = torch.device("cuda", 0)
BATCH = 3


def test_the_chain_runs_where_linux_s_calls_and_files_are_missing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no answer within" not in done.stdout and "could not be found out" not in done.stdout
    (refusal,) = [line for line in done.stderr.splitlines() if "DeepSpeed" in line]
    assert refusal.startswith("vqscale: error: strategy=zero2 needs DeepSpeed") and "strategy=single, ddp" in refusal
    assert list((tmp_path / "runs" / "debug" / "sample").glob("*.tar"))


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on a GPU, as Apple's do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor) and tensor.is_cuda and tensor.dtype == torch.float64:
                raise TypeError(f"{func} made float64 on a GPU")
        return out


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors on a GPU without float64. Called cuda: torch here has nothing of mps, not even fake tensors."""
    monkeypatch.setattr("vqscale.batch.WITHOUT_FLOAT64", ("cuda",))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(GPU), NoFloat64():
        with torch.compiler.set_stance("force_eager"):
            yield


def test_float64_numbers_of_an_apple_gpu_are_on_the_cpu(apple: None) -> None:
    tensor = torch.empty(2)
    with pytest.raises(TypeError, match="made float64 on a GPU"):
        tensor.double()
    assert (as_float64(tensor).device.type, as_float64(tensor).dtype) == ("cpu", torch.float64)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_a_vqvae_s_training_step_on_an_apple_gpu(apple: None, codebook: str) -> None:
    config = VQVAEConfig(quantizer=QuantizerConfig(num_codes=16, code_dim=8, codebook=codebook), **SIZES)
    model = VQVAE(config, resolution=16).train()
    image = torch.empty(BATCH, 3, 16, 16, dtype=torch.uint8)
    loss, _ = train_vqvae.training_step(train_vqvae.TrainVQVAEConfig())(
        model, {"image": image, "position": torch.arange(BATCH)}
    )
    alone = Topology(0, 1, 0, 1, 1, "single", GPU)
    update = model.update_codebooks(alone, seed=0, images_seen=0, applied=True, learning_rate=1e-3)
    assert loss.device == GPU and loss.requires_grad and update


@pytest.mark.parametrize("kind", ["pixelcnn", "transformer"])
def test_a_row_of_codes_is_drawn_on_an_apple_gpu(apple: None, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = priors.KINDS[kind](priors.SMALL[kind], num_codes=priors.K, grid=(4, 3), num_classes=priors.CLASSES)
    monkeypatch.setattr(Tensor, "__bool__", lambda _: True)  # fake numbers are finite
    with torch.inference_mode():
        state = model.eval().sampling_weights(torch.float32).state(2 * BATCH)
        state.reset(torch.zeros(2 * BATCH, dtype=torch.int64), [])
        numbers = torch.zeros(3, BATCH, dtype=torch.float64, device="cpu")
        sampler = RowSampler(state, Options(heat=None, top_k=3, top_p=0.9, guided=True, graphs=False))
        sampler.draw(0, numbers, numbers[:, 0], numbers[:, 0])
    assert state.codes.device == GPU


@pytest.mark.parametrize(
    ("here", "world", "words"),
    [
        (False, "1", "device=mps, but torch .* sees no Apple GPU here"),
        (True, "2", "device=mps is for one process, not 2: start without a launcher, or use device=cpu"),
    ],
)
def test_an_apple_gpu_that_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, here: bool, world: str, words: str
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: here)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=words):
        device_of("mps")


def test_a_stage_that_needs_float64_runs_on_the_cpu_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of("mps").type == "mps" and device_of("auto").type == "cpu"
    config = EvaluateConfig(device="mps")
    try:
        topology = bring_up(config)
    finally:
        take_down(orderly=True)
    assert topology.device.type == "cpu"
    assert slower_than_asked(config, topology.device) == [
        "device=mps lacks float64, in which this stage computes: it runs on the CPU"
    ]
    assert slower_than_asked(StageConfig(device="mps"), torch.device("mps")) == []
