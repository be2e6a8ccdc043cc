"""Features of a data set part by part, each part a file: what was computed before a kill is not computed again.

In: a data set, an extractor.  Out: its FeatureSet.  A part is a run of consecutive images, the same at any number of
ranks; ranks take turns at the parts, so that a run which goes on with more or fewer of them finds what is there. A part
with an image that can't be read is not kept, and ends in an error.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vqscale.data.shards import write_atomically
from vqscale.data.workers import Batch
from vqscale.evaluation.collect import Collector
from vqscale.evaluation.features import Extractor, Features
from vqscale.evaluation.statistics import FeatureSet
from vqscale.topology import Topology

PART = 256  # images; of Inception's features some 5 MB


def parts_of(total: int) -> list[range]:
    """0 … total - 1 in runs of PART, the last one shorter."""
    return [range(first, min(total, first + PART)) for first in range(0, total, PART)]


def path_of(folder: Path, part: range) -> Path:
    """Where a part is kept."""
    return folder / f"{part.start:09d}-{part.stop:09d}.safetensors"


def unfinished(folder: Path, parts: Iterable[range]) -> list[range]:
    """The parts that are not there or can't be read."""
    return [part for part in parts if _load(folder, part) is None]


def compute_parts(
    folder: Path, parts: Iterable[range], batches: Iterable[Batch], extractor: Extractor, place: Topology, block: int
) -> None:
    """Write the features of every part; `batches` are `read_runs` over just these parts, in blocks of `block`."""
    stream = iter(batches)
    for part in parts:
        found = [_rows(next(stream), extractor, place) for _ in range(math.ceil(len(part) / block))]
        tensors = {name: torch.cat([rows[name] for rows in found]).contiguous() for name in found[0]}
        if len(tensors["pooled"]) == len(part):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path_of(folder, part), safetensors.torch.save(tensors))
    for _ in stream:  # ends it: ranks leave together
        raise AssertionError("more batches than parts")


def _rows(batch: Batch, extractor: Extractor, place: Topology) -> dict[str, Tensor]:
    found = extractor(batch["image"].to(place.device))
    rows = batch["weight"] > 0
    tensors = {"pooled": found.pooled, "logits": found.logits, "spatial": found.spatial}
    return {name: value.float().cpu()[rows] for name, value in tensors.items() if value is not None}


def gather_parts(folder: Path, total: int, resolution: int, extractor: Extractor, place: Topology) -> FeatureSet:
    """All parts of all ranks as one. Every rank must call it. Raises ValueError if images are missing."""
    collector = Collector(extractor, total, place)
    # Widths are known on a rank that has no part, too.
    blank = torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8, device=place.device)
    collector.add(blank, torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    for part, found in _loaded(folder, parts_of(total)[place.rank :: place.world_size]):
        features = Features(*(found[name].to(place.device) if name in found else None for name in _ORDER))  # type: ignore
        collector.add_features(features, torch.arange(part.start, part.stop), torch.ones(len(part)))
    return collector.finish()


_ORDER = ("pooled", "logits", "spatial")


def _loaded(folder: Path, parts: Iterable[range]) -> Iterator[tuple[range, dict[str, Tensor]]]:
    for part in parts:
        found = _load(folder, part)
        if found is not None:
            yield part, found


def _load(folder: Path, part: range) -> dict[str, Tensor] | None:
    try:
        found = safetensors.torch.load_file(path_of(folder, part))
    except (OSError, safetensors.SafetensorError):
        return None
    return found if len(found.get("pooled", ())) == len(part) else None
