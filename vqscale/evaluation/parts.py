"""A pass over a data set part by part, each part a file: what was computed before a kill is not computed again.

In: batches of images, and a function of them.  Out: named tensors with a row per image.  A part is a run of consecutive
images, the same at any number of ranks; ranks take turns at the parts, so that a run which goes on with more or fewer
of them finds what is there. A part with an image that can't be read is not kept.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vqscale.batch import Batch
from vqscale.files import write_atomically

PART = 256  # images; of Inception's features some 5 MB

Rows = Callable[[Batch], dict[str, Tensor]]  # a batch -> what to keep of it, tensors of [b, ...]


def parts_of(total: int) -> list[range]:
    """0 … total - 1 in runs of PART, the last one shorter."""
    return [range(first, min(total, first + PART)) for first in range(0, total, PART)]


def path_of(folder: Path, part: range) -> Path:
    """Where a part is kept."""
    return folder / f"{part.start:09d}-{part.stop:09d}.safetensors"


def unfinished(folder: Path, parts: Iterable[range]) -> list[range]:
    """The parts that are not there or can't be read."""
    return [part for part in parts if _load(folder, part) is None]


def compute_parts(folder: Path, parts: Iterable[range], batches: Iterable[Batch], rows: Rows, block: int) -> int:
    """Write the rows of every part; `batches` are `read_runs` over just these parts, in blocks of `block`.

    Returns how many images could not be read.
    """
    stream, unread = iter(batches), 0
    for part in parts:
        found = [_kept(next(stream), rows) for _ in range(math.ceil(len(part) / block))]
        tensors = {name: torch.cat([some[name] for some in found]).contiguous() for name in found[0]}
        missing = len(part) - len(next(iter(tensors.values())))
        if not missing:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path_of(folder, part), safetensors.torch.save(tensors))
        unread += missing
    for _ in stream:  # ends it: ranks leave together
        raise AssertionError("more batches than parts")
    return unread


def _kept(batch: Batch, rows: Rows) -> dict[str, Tensor]:
    """The rows of samples that count, on the CPU."""
    kept = batch["weight"] > 0
    return {name: value.cpu()[kept] for name, value in rows(batch).items()}


def finished(folder: Path, parts: Iterable[range]) -> Iterator[tuple[range, dict[str, Tensor]]]:
    """(part, its rows) for each part that is there."""
    for part in parts:
        found = _load(folder, part)
        if found is not None:
            yield part, found


def _load(folder: Path, part: range) -> dict[str, Tensor] | None:
    try:
        found = safetensors.torch.load_file(path_of(folder, part))
    except (OSError, safetensors.SafetensorError):
        return None
    return found if found and all(len(rows) == len(part) for rows in found.values()) else None
