"""Steps left out because their gradient was not finite: counted, their samples named, ended when there are too many."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vqscale.engine.tensors import Scalar, Tensors, first_not_finite
from vqscale.topology import Topology

log = logging.getLogger("vqscale")
SampleAt = Callable[[int], Mapping[str, Any]]  # of a position
MicroBatch = tuple[Scalar, Int[Tensor, "b"]]  # its loss and positions


class SkippedSteps:
    """`total` over the whole run, `in_a_row` until now; the same on every rank."""

    def __init__(self, limit: int, sample_at: SampleAt, topology: Topology, total: int, images_seen: int):
        """limit: the run ends after so many in a row. sample_at: position -> {shard, key, …}. total: until now, at
        `images_seen`, where all tensors were finite."""
        self.total, self.in_a_row = total, 0
        self._limit, self._sample_at, self._topology = limit, sample_at, topology
        self._applied_at = self._finite_at = images_seen
        self._learning_rate = 0.0  # of the last step that was applied

    def count(self, applied: bool, micro_batches: Sequence[MicroBatch], images_seen: int, learning_rate: float) -> None:
        """Called after every step with this rank's micro-batches. If the step was skipped, names samples in the log: of
        the micro-batches whose loss is not finite, or all of them if only the gradient was not."""
        if applied:
            self.in_a_row, self._applied_at, self._learning_rate = 0, images_seen, learning_rate
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        at_fault = [one for one in micro_batches if not torch.isfinite(one[0])]
        what = "a loss that is not finite" if at_fault else "finite losses here"
        samples = [self._sample_at(p) for _, positions in at_fault or micro_batches for p in positions.tolist()]
        named = ", ".join(f"{sample['shard']}:{sample['key']}" for sample in samples)
        log.warning("the step to %d images is left out (no finite gradient); %s: %s", images_seen, what, named)

    def refuse_not_finite(self, tensors: Tensors, images_seen: int) -> None:
        """Raises ValueError, on every rank alike, when a step has made a tensor NaN or infinite. Collective."""
        if name := first_not_finite(tensors, self._topology):
            raise ValueError(
                f"{name} is not finite after the step to {self._applied_at} images, whose learning rate was "
                f"{self._learning_rate:g} (all was finite at {self._finite_at}): nothing of it is saved, earlier "
                "checkpoints stay, and the same command with a lower learning_rate goes on from them"
            )
        self._finite_at = images_seen

    def check(self, images_seen: int) -> None:
        """Raises ValueError after too many in a row, on every rank alike."""
        if self.in_a_row and self.in_a_row >= self._limit:
            log.warning(
                "the last applied step, to %d images, had a learning rate of %g: if that is too high, lower it; "
                "the same command goes on from the last checkpoint that training went on from",
                *(self._applied_at, self._learning_rate),
            )
            raise ValueError(
                f"{self.in_a_row} steps in a row had no finite gradient, the last at {images_seen} images; "
                "log/<rank>.log names their samples"
            )
