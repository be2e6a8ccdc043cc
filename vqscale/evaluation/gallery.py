"""Which images to show: sample shards -> the first images of each class.

In: a data set.  Out: {class name: images}; or the images at given positions.  Shapes: r pixels a side.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from vqscale.data.cache import Cache
from vqscale.data.images import SUFFIXES, decode_image, resize_center_crop
from vqscale.data.parts import read_samples
from vqscale.data.shards import Manifest


def first_of_each_class(
    folder: Path,
    manifest: Manifest,
    *,
    resolution: int,
    per_class: int,
    most_classes: int,
    cache: Cache | None = None,
) -> dict[str, list[UInt8[Tensor, "3 r r"]]]:
    """The first `per_class` images of classes spread evenly over all that occur, at most `most_classes`.

    Raises ValueError for an image that is damaged.
    """
    if not per_class or not most_classes:
        return {}
    positions = _positions_by_class(folder, manifest, per_class)
    present = sorted(positions)
    step = max(1.0, len(present) / most_classes)
    chosen = [present[int(n * step)] for n in range(min(len(present), most_classes))]
    return {
        _name(manifest, label): [image for image, _ in images_at(folder, manifest, positions[label], resolution, cache)]
        for label in chosen
    }


def _name(manifest: Manifest, label: int) -> str:
    return manifest.classes[label] if 0 <= label < len(manifest.classes) else str(label)


def _positions_by_class(folder: Path, manifest: Manifest, per_class: int) -> dict[int, list[int]]:
    positions: dict[int, list[int]] = {}
    labels = (label for shard in range(len(manifest.shards)) for label in manifest.index(folder, shard).labels.tolist())
    for position, label in enumerate(labels):
        of_class = positions.setdefault(label, [])
        if len(of_class) < per_class:
            of_class.append(position)
    return positions


def images_at(
    folder: Path, manifest: Manifest, positions: Sequence[int], resolution: int, cache: Cache | None = None
) -> list[tuple[UInt8[Tensor, "3 r r"], str]]:
    """(image, class name) at each position in stored order. Raises ValueError for a damaged one."""
    return [
        (resize_center_crop(decode_image(next(iter(parts.values()))), resolution), _name(manifest, label))
        for _, label, parts in read_samples(folder, SUFFIXES, positions, cache)
    ]
