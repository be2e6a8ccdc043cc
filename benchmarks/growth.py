"""How the cost of a VQ-VAE's training step grows with batch, levels, codes and resolution.

    python benchmarks/growth.py [--json FILE] [--quick] [--minutes M] [--device cuda] [--page docs/benchmarks.md]

In: nothing. Out: rows `<what>/<value>`: images per second over those of the base, each point in turns with it, and
`by_flops`, what the arithmetic alone would give: the base's FLOPs per image over the point's. With --page, the section
of that page between its marks, and the plot beside it, are written anew.

The base: batch 8, two levels, K = 512, 128 px, hidden 128; fp32. A step is what `train_step.py` measures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from measure import Row, arguments, at_least, finish, in_turns, median, ratio, write_section
from torch.utils.flop_counter import FlopCounterMode
from train_step import Trainer, Way

from vqscale.models.quantizer import QuantizerConfig
from vqscale.topology import keep_freed_memory

BASE: dict[str, int] = {"batch": 8, "levels": 2, "codes": 512, "resolution": 128}
POINTS: dict[str, list[int]] = {
    "batch": [1, 2, 4, 16, 32],
    "levels": [1, 3],
    "codes": [64, 4_096, 32_768],
    "resolution": [64, 256],
}
STRIDES = {1: [4], 2: [4, 2], 3: [4, 2, 2]}  # bottom first
TITLES = {"batch": "images per batch", "levels": "levels", "codes": "codes per level (K)", "resolution": "pixels"}
HEIGHTS = [0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5]  # marked on the axis
PLOT = "images/growth.png"


def trainer_of(point: dict[str, int], quick: bool, device: str) -> Trainer:
    return Trainer(
        "vqvae",
        Way("fp32"),
        quick,
        device,
        batch=point["batch"],
        side=point["resolution"] // (4 if quick else 1),
        downsample=STRIDES[point["levels"]],
        quantizer=QuantizerConfig(num_codes=point["codes"]),
    )


def flops_per_image(trainer: Trainer) -> float:
    """Of one step, the distances to the codes included."""
    with FlopCounterMode(display=False) as counter:
        trainer()
    return counter.get_total_flops() / trainer.steps.batch


def measure(what: str, place: int, base: Trainer, seconds: float, args: Any) -> Row:
    """One point in turns with the base."""
    batch, other = BASE["batch"], trainer_of(BASE | {what: place}, args.quick, args.device)
    by_flops = flops_per_image(base) / flops_per_image(other)
    taken = in_turns({"base": base, "other": other}, 40, seconds)
    rate = other.steps.batch / median(taken["other"])
    print(f"{what} {place}: {rate:.2f} images/s, {batch / median(taken['base']):.2f} at the base", flush=True)
    value = ratio(taken["base"], taken["other"]) * other.steps.batch / batch
    return at_least(None, value, by_flops=by_flops, images_per_second=rate)


def plot(tree: dict[str, dict[str, Row]]) -> Figure:
    """One panel per quantity: measured, and what the arithmetic alone would give."""
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    for axes, (what, rows) in zip(figure.subplots(1, len(tree)), tree.items(), strict=True):
        points = {int(value): row for value, row in rows.items()} | {BASE[what]: {"value": 1.0, "by_flops": 1.0}}
        places = sorted(points)
        axes.plot(places, [points[p]["value"] for p in places], "o-", label="measured")
        axes.plot(places, [points[p]["by_flops"] for p in places], ":", color="gray", label="by FLOPs alone")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places], fontsize=7)
        low, high = axes.get_ylim()
        heights = [height for height in HEIGHTS if low <= height <= high]
        axes.set_yticks(heights, [f"{height:g}" for height in heights], fontsize=7)
        axes.set_xlabel(TITLES[what])
    figure.axes[0].set_ylabel("images/s over the base's")
    figure.axes[0].legend(fontsize=7)
    return figure


def publish(page: Path, tree: dict[str, dict[str, Row]]) -> None:
    """The page's section and its plot."""
    lines = [
        "Images per second of a VQ-VAE's training step over those of the base (batch 8, two levels, K = 512, 128 px,",
        "hidden 128, fp32); in brackets what the arithmetic alone would give.",
        "",
    ]
    for what, rows in tree.items():
        told = ", ".join(f"{value}: {row['value']:.2f} ({row['by_flops']:.2f})" for value, row in rows.items())
        lines.append(f"- {TITLES[what]}: {told}")
    plot(tree).savefig(page.parent / PLOT, dpi=110)
    write_section(page, "growth", "\n".join([*lines, "", f"![How images per second grow and fall]({PLOT})"]))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, minutes=5)
    parser.add_argument("--page", type=Path, help="write the section `growth` of this page, and the plot beside it")
    args = parser.parse_args(argv)
    keep_freed_memory()
    base, seconds = trainer_of(BASE, args.quick, args.device), 60 * args.minutes / sum(map(len, POINTS.values()))
    tree = {
        what: {str(value): measure(what, value, base, 0.7 * seconds, args) for value in values}
        for what, values in POINTS.items()
    }
    if args.page:
        publish(args.page, tree)
    return finish(args, tree)


if __name__ == "__main__":
    main()
