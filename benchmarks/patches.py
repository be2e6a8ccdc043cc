"""Square patches of photographs, for benchmarks/quality.py.

    python benchmarks/patches.py FOLDER OUT [--side 64] [--count 40000] [--shrink 2]

In: a folder of images, searched deeply. Out: OUT/train and OUT/holdout, PNGs in one class: patches at places drawn by a
fixed seed, as many of each photograph, whose sides were divided by --shrink first. Every tenth photograph, by the order
of the names, gives held-out patches only.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from vqscale.data.images import decode_image, read_image_file
from vqscale.data.listing import list_folder


def cut(photograph: Path, side: int, shrink: int, count: int, rng: np.random.Generator) -> list[Image.Image]:
    """`count` patches; none of a photograph that is too small or does not decode."""
    try:
        whole = to_pil_image(decode_image(read_image_file(photograph)))
    except ValueError:
        return []
    whole = whole.resize((whole.width // shrink, whole.height // shrink), Image.Resampling.BOX)
    if min(whole.size) < side:
        return []
    corners = rng.integers(0, [whole.width - side + 1, whole.height - side + 1], size=(count, 2))
    return [whole.crop((x, y, x + side, y + side)) for x, y in corners.tolist()]


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """How many patches each part has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--side", type=int, default=64, help="of a patch, pixels")
    parser.add_argument("--count", type=int, default=40_000, help="patches in all, about")
    parser.add_argument("--shrink", type=int, default=2, help="divides the photographs' sides")
    args = parser.parse_args(argv)
    try:
        photographs = list_folder(str(args.folder))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    each, rng = -(-args.count // len(photographs.items)), np.random.default_rng(0)
    written = {"train": 0, "holdout": 0}
    for part, listing in photographs.split("every:10").items():
        folder = args.out / part / "patch"
        folder.mkdir(parents=True)
        patches = (cut(args.folder / item.path, args.side, args.shrink, each, rng) for item in listing.items)
        for number, patch in enumerate(itertools.chain.from_iterable(patches), 1):
            patch.save(folder / f"{number:06d}.png", compress_level=1)
            written[part] = number
    print(f"{args.out}: {written['train']:,} patches to train on, {written['holdout']:,} held out")
    return written


if __name__ == "__main__":
    main()
