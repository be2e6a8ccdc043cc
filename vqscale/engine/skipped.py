"""Steps left out because their gradient was not finite: counted, their samples named, ended when there are too many."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("vqscale")
Part = tuple[Tensor, Tensor]  # loss and positions int64 [b] of one micro-batch


class SkippedSteps:
    """`total` over the whole run, `in_a_row` until now; the same on every rank."""

    def __init__(self, limit: int, sample_at: Callable[[int], Mapping[str, Any]]):
        """limit: the run ends after so many in a row. sample_at: position -> {shard, key, …}."""
        self.total = self.in_a_row = 0
        self._limit, self._sample_at = limit, sample_at

    def count(self, applied: bool, parts: Sequence[Part], images_seen: int) -> None:
        """After every step, with this rank's micro-batches of it. Names the samples in each rank's log where the step
        was left out: of the micro-batches whose loss is not finite, or of all if only the gradient was not."""
        if applied:
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        at_fault = [part for part in parts if not torch.isfinite(part[0])]
        what = "a loss that is not finite" if at_fault else "finite losses here"
        samples = [self._sample_at(p) for _, positions in at_fault or parts for p in positions.tolist()]
        named = ", ".join(f"{sample['shard']}:{sample['key']}" for sample in samples)
        log.warning("the step to %d images is left out (no finite gradient); %s: %s", images_seen, what, named)

    def check(self, images_seen: int) -> None:
        """Raises ValueError after too many in a row, on every rank alike."""
        if self.in_a_row >= self._limit:
            raise ValueError(
                f"{self.in_a_row} steps in a row had no finite gradient, the last at {images_seen} images; "
                "log/<rank>.log names their samples"
            )
