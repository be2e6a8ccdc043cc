"""Steps left out because their gradient was not finite: counted, their samples named, ended when there are too many."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vqscale.engine.optim import Scalar

log = logging.getLogger("vqscale")
MicroBatch = tuple[Scalar, Int[Tensor, "b"]]  # its loss and positions


class SkippedSteps:
    """`total` over the whole run, `in_a_row` until now; the same on every rank."""

    def __init__(self, limit: int, sample_at: Callable[[int], Mapping[str, Any]]):
        """limit: the run ends after so many in a row. sample_at: position -> {shard, key, …}."""
        self.total = self.in_a_row = 0
        self._limit, self._sample_at = limit, sample_at

    def count(self, applied: bool, micro_batches: Sequence[MicroBatch], images_seen: int) -> None:
        """Called after every step with this rank's micro-batches. If the step was skipped, names samples in the log: of
        the micro-batches whose loss is not finite, or all of them if only the gradient was not."""
        if applied:
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        at_fault = [one for one in micro_batches if not torch.isfinite(one[0])]
        what = "a loss that is not finite" if at_fault else "finite losses here"
        samples = [self._sample_at(p) for _, positions in at_fault or micro_batches for p in positions.tolist()]
        named = ", ".join(f"{sample['shard']}:{sample['key']}" for sample in samples)
        log.warning("the step to %d images is left out (no finite gradient); %s: %s", images_seen, what, named)

    def check(self, images_seen: int) -> None:
        """Raises ValueError after too many in a row, on every rank alike."""
        if self.in_a_row >= self._limit:
            raise ValueError(
                f"{self.in_a_row} steps in a row had no finite gradient, the last at {images_seen} images; "
                "log/<rank>.log names their samples"
            )
