"""Training metrics: tensors until flush, then one line of metrics.jsonl, then trackers.

In: tensors by name, added every step without host synchronisation.  Out: means over the steps since the last flush
and over all ranks.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqscale.engine.pace import SlowestRank
from vqscale.files import read_jsonl, write_atomically
from vqscale.topology import Topology

log = logging.getLogger("vqscale")


class MetricLog:
    """Accumulates on every rank; rank 0 writes. Made by all ranks together."""

    def __init__(self, path: Path, topology: Topology, track: Callable[[dict[str, float], int], None]):
        self.path = path
        self._topology = topology
        self._track = track
        self._precision = torch.float64 if topology.device.type == "cpu" else torch.float32
        self._sums: dict[str, Tensor] = {}
        self._slowest = SlowestRank(topology)

    def add(self, values: Mapping[str, Tensor], micro_batches: int = 1) -> None:
        """Add one step's values, or those of one of its `micro_batches`."""
        # All on one device and in one precision, so that a flush is a single reduction.
        where: dict[str, Any] = {"device": self._topology.device, "dtype": self._precision, "non_blocking": True}
        for name, value in values.items():
            share = value.detach().to(**where) / micro_batches
            self._sums[name] = self._sums[name] + share if name in self._sums else share

    def flush(
        self, images_seen: int, steps: int, host_values: Mapping[str, float], own_seconds: float = 0.0
    ) -> dict[str, float]:
        """Means over `steps` steps and all ranks, written with `host_values` (already global) and the slowest rank as
        one line. own_seconds: this rank's own work per step."""
        names, ranks = sorted(self._sums), self._topology.world_size
        values = torch.stack([self._sums[name].reshape(()) for name in names])
        work = values.new_zeros(ranks)
        work[self._topology.rank] = own_seconds
        sums = self._topology.all_reduce_(torch.cat([values, work]))
        sums[: len(names)] /= ranks * steps
        means = sums.tolist()
        slowest = self._slowest.compare(means[len(names) :])
        line = {**dict(zip(names, means[: len(names)], strict=True)), **host_values, **slowest}
        self._sums = {}
        self.write(images_seen, line)
        return line

    def write(self, images_seen: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, with null for what is not finite, and the trackers. A full log disk must not stop
        the run."""
        if not self._topology.is_main:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"images_seen": images_seen, **finite}) + "\n")
        except OSError as error:
            log.warning("%s: a line is lost: %s", self.path, error.strerror)
        self._track(dict(values), images_seen)


def drop_lines_beyond(path: Path, images_seen: int) -> None:
    """Keep the lines up to `images_seen`, so that the file stays monotone after a resume. A torn last line goes too."""
    if not path.is_file():
        return
    lines = [line for line in read_jsonl(path) if line.get("images_seen", math.inf) <= images_seen]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
