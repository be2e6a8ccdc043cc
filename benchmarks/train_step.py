"""Training steps of both models, every way of computing against plain fp32 NCHW eager.

    python benchmarks/train_step.py [--json FILE] [--quick] [--minutes M] [--device cuda] [--compile]
                                    [--models vqvae prior]

In: nothing. Out: images per second of each way, its ratio to plain fp32, the share of the matrix-product peak reached,
and the losses of all ways over the same batches side by side. Rows: `<model>/<way>`, the ratio to plain fp32, whose
limit is the ratio of the two matrix-product rates, and `<model>/share of product rate`, what plain fp32 reaches of it.

The VQ-VAE is the two-level 256 px one (hidden 128, residual 32, batch 8), the prior a 32x32 one with attention. Each
way has a model of its own with the same first weights; the ways take turns, step by step. A step is forward, backward,
clip, AdamW and the codebook's update, by the engine that trains. bf16 is left out where the processor multiplies it
slower than fp32, and that is said.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import Row, alone, arguments, at_least, finish, in_turns, median, product_rate, ratio
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vqscale.engine.parallel import TorchEngine, autocast, compile_units
from vqscale.models.dropout import dropout_key
from vqscale.models.init import initialise
from vqscale.models.pixelcnn import PixelCNN
from vqscale.models.prior import PriorConfig, nll
from vqscale.models.vqvae import VQVAE, VQVAEConfig
from vqscale.topology import keep_freed_memory

LEARNING_RATE = 3e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 12  # steps of each way, at most
GOALS = {"bf16 channels_last": 1.9, "bf16 channels_last compiled": 2.5}
PRIOR = PriorConfig(hidden=256, residual=256, layers=8, attention_every=4, filter=5, dropout=0.1)
QUICK_PRIOR = PriorConfig(hidden=64, residual=64, layers=2, attention_every=2, filter=3, dropout=0.1)


@dataclass(frozen=True)
class Way:
    """One way of computing a step."""

    precision: str
    channels_last: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        return self.precision + " channels_last" * self.channels_last + " compiled" * self.compiled


class VQVAESteps:
    """A VQ-VAE and its training step; batches are images of smooth noise, the same for every way."""

    def __init__(self, way: Way, quick: bool, device: str = "cpu", *, batch: int = 8, side: int = 0, **model: Any):
        """`side`: of the images, 0 = this benchmark's; `model`: other fields of the config."""
        self.batch, self.side, self.device = batch, side or (64 if quick else 256), device
        config = VQVAEConfig(hidden=32 if quick else 128, residual_hidden=32, **model)
        self.model = VQVAE(config, resolution=self.side)
        initialise(self.model, seed=0)
        self.model.to(device)
        self.model.init_codebooks([self.images(n) for n in range(4)], seed=0)
        self.format = torch.channels_last if way.channels_last else torch.contiguous_format

    def images(self, step: int) -> Tensor:
        """float32 [batch, 3, side, side] in [-1, 1]."""
        rng = torch.Generator(self.device).manual_seed(step)
        coarse = torch.rand(self.batch, 3, 16, 16, generator=rng, device=self.device) * 2 - 1
        return F.interpolate(coarse, size=(self.side, self.side), mode="bilinear")

    def loss(self, model: Any, step: int) -> Tensor:
        image = self.images(step).contiguous(memory_format=self.format)
        output = model(image, position=torch.arange(self.batch, device=self.device))
        return F.mse_loss(output.reconstruction.float(), image) + output.commitment

    def after(self, step: int) -> None:
        self.model.update_codebooks(
            alone(self.device),
            seed=0,
            images_seen=step * self.batch,
            applied=True,
            learning_rate=LEARNING_RATE,
        )


class PriorSteps:
    """A class-conditional prior and its training step on random codes."""

    def __init__(
        self,
        way: Way,
        quick: bool,
        device: str = "cpu",
        *,
        batch: int = 8,
        side: int = 0,
        config: PriorConfig | None = None,
    ):
        """`side`: of the grid, 0 = this benchmark's; `config`: None = this benchmark's."""
        self.batch, self.device, side = batch, device, side or (8 if quick else 32)
        config = config or (QUICK_PRIOR if quick else PRIOR)
        self.model = PixelCNN(config, num_codes=512, grid=(side, side), num_classes=1000, upper_grids=())
        initialise(self.model, seed=0)

    def loss(self, model: Any, step: int) -> Tensor:
        rng, place = torch.Generator(self.device).manual_seed(step), {"device": self.device}
        codes = torch.randint(512, (self.batch, *self.model.grid), generator=rng, **place)
        label = torch.randint(1000, (self.batch,), generator=rng, **place)
        return nll(model(codes, label, dropout_key=dropout_key(0, torch.arange(self.batch, **place) + step)), codes)

    def after(self, step: int) -> None:
        """Nothing follows a prior's step."""


STEPS: dict[str, Any] = {"vqvae": VQVAESteps, "prior": PriorSteps}


class Trainer:
    """One model on its engine, one step at a time."""

    def __init__(self, model: str, way: Way, quick: bool, device: str = "cpu", **options: Any):
        self.steps, self.topology = STEPS[model](way, quick, device, **options), alone(device)
        self.steps.model.train()
        if way.compiled:
            compile_units(self.steps.model)
        self.precision = way.precision
        optimizer = {"betas": (0.9, 0.999), "weight_decay": 0.0}
        self.engine = TorchEngine(
            self.steps.model, self.topology, precision=way.precision, accumulation=1, optimizer=optimizer
        )
        self.losses: list[float] = []

    def __call__(self) -> None:
        step = len(self.losses)
        self.engine.begin_micro_batch(last=True)
        with autocast(self.topology, self.precision):
            loss = self.steps.loss(self.engine.model, step)
        self.engine.backward(loss)
        self.engine.step(LEARNING_RATE, 1.0)
        self.steps.after(step + 1)
        self.losses.append(loss.item())


def flops_per_image(model: str, quick: bool, device: str) -> float:
    """Of a forward and a backward pass, counted on a plain eager step."""
    trainer = Trainer(model, Way("fp32"), quick, device)
    with FlopCounterMode(display=False) as counter:
        trainer()
    return counter.get_total_flops() / trainer.steps.batch


def measure(model: str, ways: Sequence[Way], args: Any, peaks: dict[str, float]) -> dict[str, Row]:
    """The rows of one model; the first way is what the others are compared with."""
    trainers: dict[str, Callable[[], None]] = {way.name: Trainer(model, way, args.quick, args.device) for way in ways}
    in_turns(trainers, 2)  # allocations, compilation
    seconds = in_turns(trainers, ROUNDS, 60 * args.minutes / len(args.models))
    flops, rows = flops_per_image(model, args.quick, args.device), {}
    print(f"{model}: {flops / 1e9:.1f} GFLOP per image")
    for way in ways:
        trainer = trainers[way.name]
        assert isinstance(trainer, Trainer)
        rate = trainer.steps.batch / median(seconds[way.name])
        gain = ratio(seconds[ways[0].name], seconds[way.name])
        share = rate * flops / peaks[way.precision]
        print(
            f"  {way.name:30} {rate:7.2f} images/s  {gain:5.2f}x  {share:4.0%} of the {way.precision} product's rate"
            f"  losses {' '.join(f'{loss:.4f}' for loss in trainer.losses[:: max(1, len(trainer.losses) // 6)])}"
        )
        if way == ways[0]:
            rows[f"{model}/share of product rate"] = at_least(None, share, limit=1.0, images_per_second=rate)
            continue
        rows[f"{model}/{way.name}"] = at_least(
            GOALS.get(way.name) if model == "vqvae" else None,
            gain,
            limit=peaks[way.precision] / peaks["fp32"] if way.precision != "fp32" else None,
            images_per_second=rate,
            share_of_product_rate=share,
            losses=trainer.losses,
        )
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, minutes=4)
    parser.add_argument("--compile", action="store_true", help="torch.compile too: minutes at the first step")
    parser.add_argument("--models", nargs="+", choices=STEPS, default=list(STEPS))
    args = parser.parse_args(argv)
    keep_freed_memory()
    peaks = {name: product_rate(dtype, args.device) for name, dtype in DTYPES.items()}
    print(", ".join(f"matrix product in {name}: {rate / 1e9:.1f} GFLOP/s" for name, rate in peaks.items()))
    precisions = ["fp32", "bf16"] if peaks["bf16"] > peaks["fp32"] else ["fp32"]
    if len(precisions) == 1:
        print("bf16 is left out: this processor multiplies it slower than fp32")
    rows: dict[str, Any] = {}
    for model in args.models:
        formats = (False, True) if model == "vqvae" else (False,)
        ways = [Way(p, last) for p in precisions for last in formats]
        if args.compile:
            ways += [Way(p, formats[-1], compiled=True) for p in precisions]
        rows |= measure(model, ways, args, peaks)
    return finish(args, rows)


if __name__ == "__main__":
    main()
