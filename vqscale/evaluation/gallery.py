"""Which images to show: sample shards -> the first images of each class.

In: a data set.  Out: {class name: images uint8 [3, R, R]}; or the images at given positions.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from vqscale.data.cache import Cache, RemoteTar, open_place, tar_places
from vqscale.data.images import SUFFIXES, decode_image, resize_center_crop
from vqscale.data.shards import Manifest, read_row


def first_of_each_class(
    folder: Path,
    manifest: Manifest,
    *,
    resolution: int,
    per_class: int,
    most_classes: int,
    cache: Cache | None = None,
) -> dict[str, list[Tensor]]:
    """The first `per_class` images of classes spread evenly over all that occur, at most `most_classes`.

    Raises ValueError for an image that is damaged.
    """
    rows = _rows_by_class(folder, manifest, per_class)
    present = sorted(rows)
    step = max(1.0, len(present) / most_classes)
    places = tar_places(folder, manifest, cache or Cache())
    chosen = [present[int(n * step)] for n in range(min(len(present), most_classes))]
    return {
        _name(manifest, label): [
            resize_center_crop(image, resolution) for image in _read(folder, manifest, places, rows[label])
        ]
        for label in chosen
    }


def _name(manifest: Manifest, label: int) -> str:
    return manifest.classes[label] if 0 <= label < len(manifest.classes) else str(label)


def _rows_by_class(folder: Path, manifest: Manifest, per_class: int) -> dict[int, list[tuple[int, int]]]:
    rows: dict[int, list[tuple[int, int]]] = {}
    for shard in range(len(manifest.shards)):
        for row, label in enumerate(manifest.index(folder, shard).labels.tolist()):
            found = rows.setdefault(label, [])
            if len(found) < per_class:
                found.append((shard, row))
    return rows


def _read(
    folder: Path, manifest: Manifest, places: Sequence[Path | RemoteTar], rows: list[tuple[int, int]]
) -> Iterator[Tensor]:
    for shard, row in rows:
        with open(open_place(places[shard]), "rb") as file:
            parts = read_row(file, manifest.index(folder, shard), row, SUFFIXES)
        yield decode_image(next(iter(parts.values())))


def images_at(
    folder: Path, manifest: Manifest, positions: Sequence[int], resolution: int, cache: Cache | None = None
) -> list[tuple[Tensor, str]]:
    """(image uint8 [3, R, R], class name) at each position in stored order. Raises ValueError for a damaged one."""
    places = tar_places(folder, manifest, cache or Cache())
    starts = np.cumsum([0, *(shard.num_samples for shard in manifest.shards)])
    found = []
    for position in positions:
        shard = int(np.searchsorted(starts, position, side="right")) - 1
        row = int(position - starts[shard])
        (image,) = _read(folder, manifest, places, [(shard, row)])
        label = int(manifest.index(folder, shard).labels[row])
        found.append((resize_center_crop(image, resolution), _name(manifest, label)))
    return found
