"""What a prior is worth: both kinds, and the PixelCNN without class and without attention, at equal parameters.

    python benchmarks/priors.py [--codes DIR] [--level top] [--images N] [--parameters N] [--json FILE] [--png FILE]
                                [--device cuda]

In: a run of extract_codes. Out: held-out nats per code along training, beside the order-0 entropy; with --json
{"curves": {name: [[images, nats], ...]}, ...}, with --png a plot. All models see the same batches in turn, with one
learning-rate schedule and no dropout; each has the width inside its blocks (`residual`) with which its layers come
nearest to the given number of parameters. One seed. Without --codes they learn random codes, which shows only that the
script runs.
"""

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from codes import make_shards
from measure import alone, arguments, write

from vqscale.batch import to_device
from vqscale.data.codes import CodeReader
from vqscale.data.loader import build_loader
from vqscale.data.shards import Manifest, resolve
from vqscale.engine.optim import learning_rate_at
from vqscale.engine.parallel import TorchEngine
from vqscale.evaluation.codes import Codes, likelihood, read_codes
from vqscale.evaluation.inputs import DataSet
from vqscale.evaluation.metrics import order0_entropy
from vqscale.models.init import initialise
from vqscale.models.prior import PriorConfig, nll
from vqscale.sources import PRIORS

PARAMETERS = 2_000_000  # for which the widths below are meant; other sizes scale them
PIXELCNN = PriorConfig(hidden=128, layers=6, attention_every=3, heads=4, filter=3, class_dim=64)
VARIANTS = {
    "pixelcnn": PIXELCNN,
    "transformer": PriorConfig("transformer", hidden=192, layers=6, heads=4),
    "pixelcnn without class": PIXELCNN,
    "pixelcnn without attention": dataclasses.replace(PIXELCNN, attention_every=0),
}
NO_CLASS = "pixelcnn without class"


def build(config: PriorConfig, parameters: int, shape: Mapping[str, Any]) -> Any:
    """The prior whose layers have about `parameters` parameters: its hidden width by scale, `residual` by search."""
    width = max(1, round(config.hidden * (parameters / PARAMETERS) ** 0.5 / (4 * config.heads)))
    config = dataclasses.replace(config, hidden=4 * config.heads * width)

    def size(eighths: int) -> int:
        with torch.device("meta"):
            model = PRIORS[config.kind](dataclasses.replace(config, residual=8 * eighths), **shape)
        return model.num_parameters()["layers"]

    base, each = size(1), size(2) - size(1)  # linear in the width
    chosen = max(1, 1 + round((parameters - base) / each))
    model = PRIORS[config.kind](dataclasses.replace(config, residual=8 * chosen), **shape)
    initialise(model, seed=0)
    return model


class Variant:
    """One model in training."""

    def __init__(self, name: str, model: Any, device: str):
        self.topology = alone(device)
        self.name, self.model, self.seconds = name, model, 0.0
        optimizer = {"betas": (0.9, 0.999), "weight_decay": 0.0}
        self.engine = TorchEngine(model, self.topology, precision="fp32", accumulation=1, optimizer=optimizer)
        self.curve: list[tuple[int, float]] = []

    def labels(self, label: torch.Tensor) -> torch.Tensor:
        return torch.full_like(label, self.model.num_classes) if self.name == NO_CLASS else label

    def step(self, codes: torch.Tensor, label: torch.Tensor, upper: list[torch.Tensor], learning_rate: float) -> None:
        start = time.perf_counter()
        self.model.train()
        self.engine.begin_micro_batch(last=True)
        self.engine.backward(nll(self.engine.model(codes, self.labels(label), upper), codes))
        self.engine.step(learning_rate, 1.0)
        self.seconds += time.perf_counter() - start

    def evaluate(self, codes: Codes, level: str, images: int) -> None:
        self.model.eval()
        given = dataclasses.replace(codes, labels=self.labels(codes.labels))
        self.curve.append((images, likelihood(self.model, given, level, self.topology, batch=64).per_code()))
        print(f"{images:>9,} images  {self.name:28} {self.curve[-1][1]:.4f} nats per code", flush=True)


def run(folder: Path, held_out: Path, args: Any) -> dict[str, Any]:
    manifest = Manifest.load(folder)
    levels, num_codes = manifest.extra["levels"], manifest.extra["num_codes"]
    names = list(levels)[: list(levels).index(args.level) + 1]
    grids = [tuple(levels[name]) for name in names]
    shape = {"num_codes": num_codes, "num_classes": len(manifest.classes), "grid": grids[-1], "upper_grids": grids[:-1]}
    variants = [Variant(name, build(config, args.parameters, shape), args.device) for name, config in VARIANTS.items()]
    views = manifest.extra["views"]
    reader = CodeReader({name: levels[name] for name in names}, views=views, flip=True, num_codes=num_codes)
    batches = iter(build_loader(folder, read=reader, global_batch=args.batch, seed=0))
    codes = read_codes(DataSet("held out", held_out, Manifest.load(held_out), args.evaluate))
    steps = max(1, args.images // args.batch)
    evaluations = {steps * n // args.points for n in range(1, args.points + 1)}
    for step in range(steps):
        batch = to_device(next(batches), torch.device(args.device))
        target, upper = batch[args.level].long(), [batch[name].long() for name in names[:-1]]
        rate = learning_rate_at(
            step, peak=args.learning_rate, warmup=steps // 20, schedule="cosine", total=steps, final=0.05
        )
        for variant in variants:
            variant.step(target, batch["label"], upper, rate)
            if step + 1 in evaluations:
                variant.evaluate(codes, args.level, (step + 1) * args.batch)
    usage = manifest.extra.get("usage", {}).get(args.level, codes.usage(args.level))
    return {
        "order0_entropy": order0_entropy(codes.usage(args.level), np.asarray(usage, np.float64)),
        "level": args.level,
        "images": steps * args.batch,
        "held_out": len(codes),
        "parameters": {variant.name: variant.model.num_parameters()["layers"] for variant in variants},
        "seconds": {variant.name: variant.seconds for variant in variants},
        "curves": {variant.name: variant.curve for variant in variants},
    }


def plot(result: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name, curve in result["curves"].items():
        axes.plot(*zip(*curve, strict=True), marker=".", label=f"{name}, {result['parameters'][name] / 1e6:.2f}M")
    axes.axhline(result["order0_entropy"], color="grey", linestyle=":", label="order-0 entropy")
    axes.set(xlabel="images", ylabel=f"held-out nats per code, {result['level']}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__)
    parser.add_argument("--codes", type=Path, help="a run of extract_codes")
    parser.add_argument("--level", default="top")
    parser.add_argument("--images", type=int, default=64_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--parameters", type=int, default=PARAMETERS, help="of each model's layers")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak")
    parser.add_argument("--evaluate", type=int, default=1_024, help="held-out samples, at most")
    parser.add_argument("--points", type=int, default=8, help="of each curve")
    parser.add_argument("--png", type=Path, help="a plot of the curves")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.parameters, args.evaluate, args.points = 4, 300_000, 16, 2
    with tempfile.TemporaryDirectory() as scratch:
        if args.codes is None:
            make_shards(Path(scratch), 1, 64)
            result = run(Path(scratch), Path(scratch), args)
        else:
            result = run(resolve(args.codes, "train"), resolve(args.codes, "holdout"), args)
    for name, curve in result["curves"].items():
        print(f"{name:28} {result['parameters'][name]:>10,} parameters  {curve[-1][1]:.4f} nats per code")
    print(f"order-0 entropy {result['order0_entropy']:.4f}; {result['images']:,} images, {result['held_out']} held out")
    write(args.json, result)
    if args.png:
        plot(result, args.png)
    return result


if __name__ == "__main__":
    main()
