"""Parts of `gpu.py`: the machine's ceilings, and training steps of the VQ-VAE and of both priors.

In: a `Case`.  Out: its rows. A step is all that `fit` does between a batch on the device and the next: forward,
backward, clip, AdamW, the codebook's update. "Its convolutions", "its products": every convolution and matrix product
of one step on random tensors of the same shapes, types and strides, one after the other and nothing else.
"""

import dataclasses
import gc
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from gpu_rows import Case
from measure import alone, median, port_loss, port_model, product_rate, timed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vqscale.data.images import to_float
from vqscale.engine.parallel import TorchEngine, autocast, compile_units
from vqscale.models.init import initialise
from vqscale.models.prior import PriorConfig
from vqscale.models.quantizer import QuantizerConfig
from vqscale.models.vqvae import VQVAE, VQVAEConfig
from vqscale.sources import PRIORS
from vqscale.stages import train_prior, train_vqvae

PAPER = Path(__file__).parents[1] / "configs" / "imagenet256"
ADAM = {"betas": (0.9, 0.999), "weight_decay": 0.0}
SMALL: dict[str, Any] = {"hidden": 16, "residual": 16, "heads": 2, "filter": 3}
K, CLASSES = 512, 1_000


def paper_config(level: str) -> PriorConfig:
    """The prior of configs/imagenet256, without activation checkpointing."""
    values = yaml.safe_load((PAPER / f"train_prior_{level}.yaml").read_text())["model"]
    return PriorConfig(**(values | {"activation_checkpointing": False}))


def prior_of(case: Case, level: str, **changes: Any) -> Any:
    """A prior with torch's own random weights, on the device: the paper's, or a small one."""
    side = (32 if case.full else 4) * (2 if level == "bottom" else 1)
    config = paper_config(level)
    if not case.full:
        shallow = {"layers": 2, "attention_every": config.attention_every and 2}
        stacks = {"output_layers": min(1, config.output_layers), "conditioning_layers": 1}
        config = dataclasses.replace(config, **SMALL, **shallow, **stacks)
    config = dataclasses.replace(config, **changes)
    upper = [(side // 2, side // 2)] if level == "bottom" else []
    with torch.device(case.device):
        return PRIORS[config.kind](config, num_codes=K, grid=(side, side), num_classes=CLASSES, upper_grids=upper)


def vqvae_of(case: Case, side: int = 256, num_codes: int = K) -> VQVAE:
    """The 256 px VQ-VAE of two levels with fitted codebooks, on the device; a small one on a CPU."""
    quantizer = QuantizerConfig(num_codes=num_codes)
    small = {} if case.full else {"hidden": 16, "residual_hidden": 8}
    config = VQVAEConfig(quantizer=quantizer, **small)
    model = VQVAE(config, resolution=side if case.full else 32)
    initialise(model, seed=0)
    model.to(case.device)
    model.init_codebooks([to_float(images(case, 32, side))], seed=0)
    return model


def images(case: Case, batch: int, side: int = 256) -> Tensor:
    side = side if case.full else 32
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=case.device)


class Stepper:
    """A model on the engine that trains it, and one batch on the device; a call is one optimizer step in bf16."""

    def __init__(self, case: Case, model: Any, step_fn: Any, batch: dict[str, Tensor], compiled: bool = False):
        self.topology, self.step_fn, self.batch = alone(case.device), step_fn, batch
        if compiled:
            compile_with(None if case.full else "aot_eager", model)
        self.engine = TorchEngine(model, self.topology, precision="bf16", accumulation=1, optimizer=ADAM)
        self.engine.module.train()

    def __call__(self) -> None:
        self.engine.begin_micro_batch(last=True)
        with autocast(self.topology, "bf16"):
            loss, _ = self.step_fn(self.engine.model, self.batch)
        self.engine.backward(loss)
        self.engine.step(3e-4, 1.0)
        if isinstance(self.engine.module, VQVAE):
            self.engine.module.update_codebooks(self.topology, seed=0, images_seen=0, applied=True, learning_rate=3e-4)


def compile_with(backend: Any, model: nn.Module) -> None:
    """What `compile: true` does, by another backend unless it is None: inductor's takes minutes on a CPU."""
    plain = nn.Module.compile
    other = {} if backend is None else {"backend": backend}
    with mock.patch.object(nn.Module, "compile", lambda unit, **options: plain(unit, **options | other)):
        compile_units(model)


def seconds_of(case: Case, step: Callable[[], Any]) -> float:
    """Seconds of one step, of many that the host queues one after the other."""
    budget = 3.0 if case.full else 0.2
    for _ in range(2):
        step()
    count = max(1, min(50, int(budget / max(1e-4, timed(step)) / 3)))
    return median([timed(lambda: [step() for _ in range(count)]) / count for _ in range(3)])


def release() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def largest(batch: int, action: Callable[[int], Any]) -> tuple[int, Any]:
    """`action(batch)`, with half of the batch as often as the memory is too small. Returns (batch, its result)."""
    while True:
        try:
            return batch, action(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        release()


def synchronisations(step: Callable[[], None]) -> int:
    """How often one step waits for the GPU, as torch warns of it. Raises ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError("it needs a GPU")
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen)


# --- convolutions and products alone ----------------------------------------------------------------------------------

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
PRODUCTS = (*CONVOLUTIONS, *(op.default for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)))


class Like(NamedTuple):
    """A tensor's layout."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Recorder(TorchDispatchMode):
    """Counts the convolutions and products of what runs under it, by their arguments' layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.calls[func, tuple(layout(value) for value in args)] += 1
        return func(*args, **(kwargs or {}))


def layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Like(tuple(value.shape), tuple(value.stride()), value.dtype)
    return tuple(map(layout, value)) if isinstance(value, list | tuple) else value


def random_like(value: Any, device: str, contiguous: bool) -> Any:
    """The argument again: a tensor of this layout with random values, anything else as it was."""
    if isinstance(value, Like):
        if 0 in value.strides:  # an expanded tensor, which cannot be filled
            return torch.randn(value.shape, device=device).to(value.dtype)
        filled = torch.empty_strided(value.shape, value.strides, dtype=value.dtype, device=device).normal_()
        return filled.contiguous() if contiguous else filled
    return [random_like(item, device, contiguous) for item in value] if isinstance(value, tuple) else value


def record(step: Callable[[], None]) -> Counter[tuple[Any, ...]]:
    with Recorder() as recorder:
        step()
    return recorder.calls


def seconds_alone(
    calls: Mapping[tuple[Any, ...], int], device: str, ops: tuple[Any, ...] = PRODUCTS, contiguous: bool = False
) -> float:
    """Seconds of these calls of one step, each on inputs of its own. contiguous: images as NCHW."""
    total = 0.0
    for (func, arguments), count in calls.items():
        if func not in ops:
            continue
        inputs = [random_like(value, device, contiguous) for value in arguments]
        func(*inputs)
        total += count * median([timed(lambda: [func(*inputs) for _ in range(5)]) / 5 for _ in range(3)])  # noqa: B023
    return total


# --- the parts --------------------------------------------------------------------------------------------------------


def ceilings(case: Case) -> None:
    rows, device = case.rows, case.device
    with rows.attempt("ceilings/bf16 product TFLOP/s"):
        rows.put("ceilings/bf16 product TFLOP/s", product_rate(torch.bfloat16, device, (256,)) / 1e12)
    size = 1 << (30 if case.full else 22)
    here, there = (torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    pageable = torch.zeros(size, dtype=torch.uint8)
    pinned = pageable.pin_memory() if case.on_gpu else pageable.clone()
    copies = {
        "device copy": (here, there, 2),
        "pinned copy to the card": (here, pinned, 1),
        "pinned copy from the card": (pinned, here, 1),
        "pageable copy from the card": (pageable, here, 1),
    }
    for name, (target, source, times) in copies.items():
        with rows.attempt(f"ceilings/{name} GB/s"):
            seconds = seconds_of(case, lambda: target.copy_(source, non_blocking=True))  # noqa: B023
            rows.put(f"ceilings/{name} GB/s", times * size / seconds / 1e9)
    names = [f"ceilings/3x5 convolution{backward} TFLOP/s" for backward in ("", " backward")]
    with rows.attempt(*names):
        for name, rate in zip(names, convolution_rates(case), strict=True):
            rows.put(name, rate / 1e12)


def convolution_rates(case: Case) -> tuple[float, float]:
    """FLOP/s of a prior's vertical convolution in bf16 and NHWC, and of its backward pass."""
    batch, inputs, outputs, side = (64, 512, 4096, 32) if case.full else (2, 16, 32, 8)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": case.device}
    image = torch.randn(batch, inputs, side + 2, side + 4, **options).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, 3, 5, **options).contiguous(memory_format=torch.channels_last)
    out = F.conv2d(image.requires_grad_(), weight.requires_grad_())
    gradient, flops = torch.randn_like(out), 2 * 15 * inputs * outputs * batch * side**2

    def backward() -> None:
        torch.autograd.grad(out, (image, weight), gradient, retain_graph=True)

    with torch.no_grad():
        forward = seconds_of(case, lambda: F.conv2d(image, weight))
    return flops / forward, 2 * flops / seconds_of(case, backward)


def vqvae(case: Case) -> None:
    rows = case.rows

    def stepper(batch: int, compiled: bool = False, side: int = 256, num_codes: int = K) -> Stepper:
        made = {"image": images(case, batch, side), "position": torch.arange(batch, device=case.device)}
        step_fn = train_vqvae.training_step(train_vqvae.TrainVQVAEConfig())
        step = Stepper(case, vqvae_of(case, side, num_codes), step_fn, made, compiled)
        step()
        return step

    batch, step = largest(128 if case.full else 4, stepper)
    eager = seconds_of(case, step)
    rows.put("vqvae/images per second", batch / eager, batch=batch, compiled=False)
    with rows.attempt("vqvae/host synchronisations"):
        rows.put("vqvae/host synchronisations", synchronisations(step))
    calls = record(step)
    alone_seconds = seconds_alone(calls, case.device, CONVOLUTIONS)
    rows.put("vqvae/step over its convolutions", eager / alone_seconds, convolution_seconds=alone_seconds)
    with rows.attempt("vqvae/convolutions NHWC over NCHW"):
        plain = seconds_alone(calls, case.device, CONVOLUTIONS, contiguous=True)
        rows.put("vqvae/convolutions NHWC over NCHW", plain / alone_seconds)
    best = eager
    with rows.attempt("vqvae/compiled over eager"):
        del step
        release()
        compiled = seconds_of(case, stepper(batch, compiled=True))
        rows.put("vqvae/compiled over eager", eager / compiled, images_per_second=batch / compiled)
        best = min(eager, compiled)
        rows.put("vqvae/images per second", batch / best, batch=batch, compiled=best == compiled)
        rows.put("vqvae/step over its convolutions", best / alone_seconds, convolution_seconds=alone_seconds)
    with rows.attempt("vqvae/over the port"):
        release()
        theirs = seconds_of(case, port_step(case, batch))
        rows.put("vqvae/over the port", theirs / best, port_images_per_second=batch / theirs, batch=batch)
    for side in (64, 256):
        name = f"vqvae/65,536 codes over 512 at {side} px"
        with rows.attempt(name):
            release()
            batch_size, most = (64, 65_536) if case.full else (4, 5_000)
            few, many = (seconds_of(case, stepper(batch_size, side=side, num_codes=n)) for n in (K, most))
            rows.put(name, few / many, images_per_second=batch_size / few)


def port_step(case: Case, batch: int) -> Callable[[], None]:
    """A training step of the usual port on the same images, as its own script trains: fp32, Adam. Raises ValueError
    without --port."""
    if case.port is None:
        raise ValueError("no --port was given")
    with torch.device(case.device):
        model = port_model(case.port)
    adam, given = torch.optim.Adam(model.parameters(), lr=3e-4), to_float(images(case, batch))

    def step() -> None:
        model.zero_grad()
        reconstruction, latent = model(given)
        port_loss(reconstruction, given, latent).backward()
        adam.step()

    return step


def priors(case: Case) -> None:
    """Both eagerly first: compiling takes longest."""
    rate, measured = product_rate(torch.bfloat16, case.device, (256,)), dict[str, PriorSteps]()
    for level, batch in {"top": 48, "bottom": 16}.items():
        with case.rows.attempt(*(name for name in case.rows.rows if name.startswith(level))):
            measured[level] = PriorSteps(case, level, batch if case.full else 2, rate)
            measured[level].eagerly()
    for level, steps in measured.items():
        with case.rows.attempt(f"{level}/compiled over eager"):
            steps.compiled()


class PriorSteps:
    """One level's prior in training, one way after the other: two of them do not fit into a card's memory."""

    def __init__(self, case: Case, level: str, batch: int, rate: float):
        """batch: halved until it fits. rate: FLOP/s of a bf16 product."""
        self.case, self.level, self.batch, self.rate = case, level, batch, rate
        self.seconds = self.products = math.inf
        self.flops = 0

    def step(self, batch: int, compiled: bool = False, recompute: bool = False) -> Stepper:
        """Its first step done."""
        release()
        case, model = self.case, prior_of(self.case, self.level, activation_checkpointing=recompute)
        grids = dict(zip(("top", "bottom"), [*model.upper_grids, model.grid], strict=False))
        given = {name: torch.randint(K, (batch, *grid), device=case.device) for name, grid in grids.items()}
        given["label"] = torch.randint(CLASSES, (batch,), device=case.device)
        given["position"] = torch.arange(batch, device=case.device)
        step_fn = train_prior.training_step(train_prior.TrainPriorConfig(level=self.level))
        step = Stepper(case, model, step_fn, given, compiled)
        step()
        return step

    def put(self, seconds: float, way: str) -> None:
        details = {"images_per_second": self.batch / seconds, "batch": self.batch, "way": way}
        self.case.rows.put(f"{self.level}/share of product rate", self.flops / seconds / self.rate, **details)
        self.case.rows.put(f"{self.level}/step over its products", seconds / self.products, **details)

    def eagerly(self) -> None:
        rows, level, case = self.case.rows, self.level, self.case
        self.batch, step = largest(self.batch, self.step)
        self.seconds = seconds_of(case, step)
        with FlopCounterMode(display=False) as counter:
            step()
        self.flops, self.products = counter.get_total_flops(), seconds_alone(record(step), case.device)
        self.put(self.seconds, "eager")
        with rows.attempt(f"{level}/host synchronisations"):
            rows.put(f"{level}/host synchronisations", synchronisations(step))
        with rows.attempt(f"{level}/activations kept over recomputed"):
            del step
            recomputed = seconds_of(case, self.step(self.batch, recompute=True))
            rows.put(f"{level}/activations kept over recomputed", recomputed / self.seconds)

    def compiled(self) -> None:
        seconds = seconds_of(self.case, self.step(self.batch, compiled=True))
        self.case.rows.put(f"{self.level}/compiled over eager", self.seconds / seconds)
        if seconds < self.seconds:
            self.put(seconds, "compiled")
