"""How fast a VQ-VAE-2 learns: ours, the usual PyTorch port, and the port with a library's quantizer, in two forms.

    python benchmarks/quality.py DATA [DATA ...] [--port DIR] [--sides SIDE ...] [--points N ...] [--rates R ...]
                                 [--seeds S ...] [--beta2 B] [--precision fp32|bf16] [--device cuda] [--evaluate N]
                                 [--ours KEY=VALUE ...] [--runs DIR] [--json FILE] [--quick]

In: packed data sets with held-out images (`vqscale pack`); with --port, the folder of the port's `vqvae.py` and what
that imports. Out: for every data set, side, learning rate and seed the held-out MSE (images in [-1, 1]) and the codes
that it uses after each of --points images. Rows, where there is a port: `<data set>/<images>/rate <R>`, our MSE over
the best baseline's at that rate, and `<data set>/<images>/best rates`, each side at its best one; the largest ratio
of all seeds. --json has the curves, too.

Sides: `ours` is `vqscale train_vqvae` with configs/clipart64, but no flips, and what --ours says; `port` the port at
its own defaults, which are of the same size; `library` the port with vector-quantize-pytorch's quantizer (moving
averages, start by k-means, dead codes restarted; gradients by the rotation trick, its default); `library_straight` the
same with straight-through gradients. All see the same images in the same order, 64 a step, at the same constant rate,
and are judged on the same held-out ones, the values clamped to [-1, 1]; ours by its averaged weights, as it is used.
Adam's beta2 is what configs/clipart64 says in ours, and --beta2 in the others.
Every training is kept under --runs, in a folder named after all that it was asked, and not done twice: the same
command goes on where it was stopped.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import alone, arguments, at_most, port_loss, port_model, table, write
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from vqscale.config import load
from vqscale.data.images import ImageReader, to_float
from vqscale.data.loader import build_loader
from vqscale.data.sequential import sequential_batches
from vqscale.data.shards import Manifest, resolve
from vqscale.engine.parallel import autocast
from vqscale.files import read_jsonl
from vqscale.stages.train_vqvae import TrainVQVAEConfig

CONFIG = Path(__file__).parents[1] / "configs" / "clipart64" / "train_vqvae.yaml"
SIDES = ("ours", "port", "library", "library_straight")
LEVELS = ("top", "bottom")
MSE = "held_out/reconstruction_mse"
BATCH = 64  # of configs/clipart64
GOAL = 0.9
ADAM = 0.999  # beta2: PyTorch's default, which the port trains with

Curve = list[dict[str, Any]]  # {"images", "mse", "used_codes": [top, bottom]} at each point


def ours(data: str, run_dir: Path, points: Sequence[int], rate: float, seed: int, args: Any) -> Curve:
    """The system itself, by its command."""
    options = {
        "data": data,
        "run_dir": run_dir,
        "total_images": points[-1],
        "evaluate_every": points[0],
        "evaluate_images": args.evaluate,
        "learning_rate": rate,
        "seed": seed,
        "precision": args.precision,
        "device": args.device,
        "flip": False,
    }
    settings = [f"{key}={value}" for key, value in options.items()]
    subprocess.run([sys.executable, "-m", "vqscale", "train_vqvae", str(CONFIG), *settings, *args.ours], check=True)
    measured = {line["images_seen"]: line for line in read_jsonl(run_dir / "metrics.jsonl") if MSE in line}
    return [
        {
            "images": point,
            "mse": measured[point][MSE],
            "used_codes": [measured[point][f"held_out/used_codes/{level}"] for level in LEVELS],
        }
        for point in points
    ]


class LibraryQuantizer(nn.Module):
    """vector-quantize-pytorch's, in the place of the port's: [b, h, w, d] -> the same, loss, codes [b, h, w]."""

    def __init__(self, dim: int, num_codes: int, rotation_trick: bool):
        super().__init__()
        self.quantizer = VectorQuantize(
            dim,
            num_codes,
            decay=0.99,
            commitment_weight=1.0,
            kmeans_init=True,
            threshold_ema_dead_code=2,
            rotation_trick=rotation_trick,
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            vectors, codes, loss = self.quantizer(z.float().flatten(1, 2))
        return vectors.view(z.shape), loss.mean(), codes.view(z.shape[:-1])


def baseline(side: str, data: str, run_dir: Path, points: Sequence[int], rate: float, seed: int, args: Any) -> Curve:
    """Trains the port, with its own quantizer or the library's."""
    torch.manual_seed(seed)
    model: Any = port_model(args.port)
    if side != "port":
        for level in ("t", "b"):
            old = getattr(model, f"quantize_{level}")
            setattr(model, f"quantize_{level}", LibraryQuantizer(old.dim, old.n_embed, side == "library"))
    config = load(TrainVQVAEConfig, CONFIG, ["flip=false", f"data={data}", f"seed={seed}"])
    folder, held_out = resolve(data, "train"), resolve(data, "holdout")
    read = partial(ImageReader, Manifest.load(folder).transform["resolution"])
    loader = build_loader(
        folder,
        read=read(config.flip, config.crop, seed),
        global_batch=BATCH,
        seed=seed,
        shuffle_window=config.shuffle_window,
    )
    model.to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, args.beta2))
    curve: Curve = []
    for step, batch in enumerate(loader, 1):
        image = to_float(batch["image"].to(args.device))
        with autocast(alone(args.device), args.precision):
            reconstruction, latent_loss = model(image)
        optimizer.zero_grad()
        port_loss(reconstruction.float(), image, latent_loss.float()).backward()
        optimizer.step()
        if (seen := step * BATCH) in points:
            curve.append({"images": seen, **judge(model, held_out, read(), args)})
            print(f"{run_dir.name}: {curve[-1]}", flush=True)
        if seen == points[-1]:
            break
    return curve


@torch.no_grad()
def judge(model: Any, held_out: Path, read: ImageReader, args: Any) -> dict[str, Any]:
    """The held-out MSE of the port, and the codes used, as `train_vqvae` measures its own."""
    model.eval()
    error, images, used = 0.0, 0.0, [set[int](), set[int]()]
    for batch in sequential_batches(held_out, read=read, batch=64, limit=args.evaluate):
        image, weight = to_float(batch["image"].to(args.device)), batch["weight"].to(args.device)
        with autocast(alone(args.device), args.precision):
            top, bottom, _, *codes = model.encode(image)
            reconstruction = model.decode(top, bottom)
        each = (reconstruction.float().clamp(-1, 1) - image).square().flatten(1).mean(1)
        error, images = error + float((each * weight).sum()), images + float(weight.sum())
        for seen, level in zip(used, codes, strict=True):
            seen.update(level[weight > 0].flatten().tolist())
    model.train()
    return {"mse": error / images, "used_codes": [len(seen) for seen in used]}


def train(side: str, rate: float, seed: int, data: str, args: Any) -> Curve:
    """One training, or what it measured when it was done before."""
    name = f"{Path(data).name}/{side} rate {rate:g} seed {seed}"
    asked = [args.device, args.precision, f"held out {args.evaluate}", *map(str, args.points)]
    asked += args.ours if side == "ours" else [f"beta2={args.beta2}"] * (args.beta2 != ADAM)
    run_dir = args.runs / " ".join([name, *asked]).replace(" ", "-")
    result = run_dir / "curve.json"
    if not result.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        learn = ours if side == "ours" else partial(baseline, side)
        write(result, learn(data, run_dir, args.points, rate, seed, args))
    curve: Curve = json.loads(result.read_text())
    for point in curve:
        said = f"{point['images']:>8,} images  MSE {point['mse']:.5f}  codes {point['used_codes']}"
        print(f"{name:40} {said}", flush=True)
    return curve


def compare(curves: Mapping[tuple[str, float, int], Sequence[float]], points: Sequence[int]) -> dict[str, Any]:
    """The rows of one data set. `curves`: the MSE at every point by side, rate and seed."""
    sides, rates, seeds = (sorted(set(values)) for values in zip(*curves, strict=True))
    others = [side for side in sides if side != "ours"]

    def best(side: str, seed: int) -> float:
        return min(rates, key=lambda rate: curves[side, rate, seed][-1])

    def ratio(number: int, seed: int, rate: float | None = None) -> float:
        mse = {side: curves[side, rate or best(side, seed), seed][number] for side in sides}
        return mse["ours"] / min(mse[side] for side in others)

    if len(others) in (0, len(sides)):
        return {}
    return {
        str(point): {
            **{f"rate {rate:g}": at_most(GOAL, max(ratio(number, seed, rate) for seed in seeds)) for rate in rates},
            "best rates": at_most(GOAL, max(ratio(number, seed) for seed in seeds)),
        }
        for number, point in enumerate(points)
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__)
    parser.add_argument("data", nargs="+", help="packed data sets, of one name each")
    parser.add_argument("--port", type=Path, help="the folder of the port's vqvae.py")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="of these only; all but ours need --port")
    parser.add_argument("--points", nargs="+", type=int, default=[16_000, 32_000, 64_000], help="images")
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4], help="learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights and order")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of all sides")
    parser.add_argument("--evaluate", type=int, default=2_000, help="held-out images, at most")
    parser.add_argument("--beta2", type=float, default=ADAM, help="Adam's, of all but ours")
    parser.add_argument("--ours", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of ours")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="where trainings are kept")
    args = parser.parse_args(argv)
    if args.quick:
        args.points, args.evaluate = [128, 256], 64
    if any(point % args.points[0] for point in args.points) or args.points != sorted(set(args.points)):
        parser.error(f"--points {args.points}: each is to be a larger multiple of the first")
    if args.points[0] % BATCH:
        parser.error(f"--points {args.points}: the first is to be a multiple of {BATCH}, the images of a step")
    if args.port and not (args.port / "vqvae.py").is_file():
        parser.error(f"--port {args.port}: has no vqvae.py")
    sides = args.sides or (SIDES if args.port else SIDES[:1])
    if not args.port and (others := [side for side in sides if side != "ours"]):
        parser.error(f"--sides {' '.join(others)}: needs --port, the folder of the port's vqvae.py")
    rows: dict[str, Any] = {}
    curves: dict[str, Curve] = {}
    for data in args.data:
        found = {}
        for case in itertools.product(sides, args.rates, args.seeds):
            curve = train(*case, data, args)
            found[case] = [point["mse"] for point in curve]
            curves[f"{Path(data).name}/{case[0]}/rate {case[1]:g}/seed {case[2]}"] = curve
        rows[Path(data).name] = compare(found, args.points)
    print(table(rows), flush=True)
    write(args.json, {"rows": rows, "curves": curves})
    return rows


if __name__ == "__main__":
    main()
