"""What ranks learn of each other once per step, one step late, without making training wait."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vqscale.topology import Topology


def count_bad(flags: Tensor, kinds: int) -> Tensor:
    """Unreadable samples of a micro-batch: flags uint8 [b] (0 = good, n = the n-th kind) -> counts int64 [kinds]."""
    return torch.bincount(flags.to(torch.int64), minlength=kinds + 1)[1:]


class Agreement:
    """Stop requests and unreadable samples, summed over ranks on the control group."""

    def __init__(self, topology: Topology, kinds: Sequence[str]):
        self._topology = topology
        self._kinds = kinds
        self._pending: Any = None
        self._values = torch.zeros(1 + len(kinds), dtype=torch.int64)

    def exchange(self, stop: bool, bad: Tensor) -> tuple[bool, dict[str, int]]:
        """Post this step's values; returns the previous step's, the same on all ranks."""
        previous = self.collect()
        self._values = torch.cat([torch.tensor([int(stop)]), bad])
        if self._topology.world_size > 1:
            self._pending = dist.all_reduce(self._values, group=self._topology.control, async_op=True)
        return previous

    def collect(self) -> tuple[bool, dict[str, int]]:
        """Wait for what was posted; afterwards nothing is pending."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        stop, *bad = self._values.tolist()
        self._values = torch.zeros_like(self._values)
        return bool(stop), {kind: count for kind, count in zip(self._kinds, bad, strict=True) if count}
