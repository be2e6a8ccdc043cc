"""A training step waits for the GPU once, for the gradient norm. Counted without a GPU: what reads a number from a
tensor in a step on the CPU, and how tensors get to the GPU in a step on tensors without memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import priors
from support.quantizers import ALONE
from support.vqvaes import vqvae
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vqscale.engine.parallel import TorchEngine
from vqscale.models.vqvae import VQVAE, VQVAEConfig
from vqscale.stages import train_prior, train_vqvae
from vqscale.topology import Topology

READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "bincount"}


class Waits(TorchDispatchMode):
    """Operations for which a program waits for its GPU: numbers read, shapes that depend on values, and copies between
    devices, unless they are non-blocking and from pinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pinned: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if kwargs.get("pin_memory"):
            self.pinned.append(made)
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in READS or by_mask or self._copies_slowly(name, made, args, kwargs):
            self.found.append(name)
        return made

    def _copies_slowly(self, name: str, made: Any, args: Any, kwargs: Any) -> bool:
        if name not in ("_to_copy", "copy_"):
            return False
        source = args[0] if name == "_to_copy" else args[1]
        blocking = not (kwargs.get("non_blocking") or args[2:3] == (True,))
        return source.device != made.device and (blocking or not any(_share(source, one) for one in self.pinned))


def _share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _vqvae_batch(device: str = "cpu") -> Any:
    image = torch.zeros(4, 3, 16, 16, dtype=torch.uint8, device=device)
    return {"image": image, "position": torch.arange(4, device=device)}


def _vqvae_step() -> tuple[Any, Any, Any]:
    return vqvae(), train_vqvae.training_step(train_vqvae.TrainVQVAEConfig()), _vqvae_batch()


def _prior_step() -> tuple[Any, Any, Any]:
    model = priors.build("pixelcnn", grid=(4, 4), upper=[(2, 2)], attention_every=1)
    codes = {"top": priors.draw((4, 2, 2)), "bottom": priors.draw((4, 4, 4))}
    batch = codes | {"label": torch.zeros(4, dtype=torch.int64), "position": torch.arange(4)}
    return model, train_prior.training_step(replace(train_prior.TrainPriorConfig(), level="bottom")), batch


@pytest.mark.parametrize("prepare", [_vqvae_step, _prior_step])
def test_a_step_reads_one_number(prepare: Callable[[], tuple[Any, Any, Any]]) -> None:
    model, step_fn, batch = prepare()
    topology = Topology(0, 1, 0, 1, 1, "single", torch.device("cpu"))
    optimizer = {"betas": (0.9, 0.999), "weight_decay": 0.0}
    engine = TorchEngine(model.train(), topology, precision="fp32", accumulation=1, optimizer=optimizer)
    with Waits() as waits:
        engine.begin_micro_batch(last=True)
        engine.backward(step_fn(engine.model, batch)[0])
        applied, _ = engine.step(1e-3, 1.0)
        if isinstance(model, VQVAE):
            model.update_codebooks(ALONE, seed=0, images_seen=4, applied=applied, learning_rate=1e-3)
    assert waits.found == ["_local_scalar_dense"]


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_what_codebooks_learn_from_reaches_the_gpu_without_waiting(codebook: str) -> None:
    quantizer = replace(VQVAEConfig().quantizer, codebook=codebook, num_codes=16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = VQVAE(VQVAEConfig(hidden=16, residual_hidden=8, quantizer=quantizer), resolution=16)
        batch = _vqvae_batch("cuda")
        with Waits() as waits:
            train_vqvae.training_step(train_vqvae.TrainVQVAEConfig())(model, batch)
            learned = model.update_codebooks(ALONE, seed=0, images_seen=4, applied=True, learning_rate=1e-3)
        assert learned["restarts/top"].is_cuda
    assert waits.found == []
    assert len(waits.pinned) == 2, "one small copy a level"


def test_the_counter_counts() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), Waits() as waits:
        pageable = torch.zeros(3, device="cpu")
        pageable.to("cuda"), pageable.to("cuda", non_blocking=True)
        torch.empty(3, device="cpu", pin_memory=True).to("cuda", non_blocking=True)
    assert waits.found == ["_to_copy", "_to_copy"]
    with Waits() as waits:
        numbers = torch.arange(3)
        numbers.nonzero(), numbers.sum().item(), numbers[numbers > 1]
    assert waits.found == ["nonzero", "_local_scalar_dense", "index"]
