"""Exponential moving average of the weights, sharded exactly as the weights are."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class WeightEMA:
    """Averages of the local parts of the weights; no collectives.

    The half-life counts images, and grows with the run while it is young (Karras et al. 2024, EDM2, section 3):
    decay = 0.5 ^ (batch / min(halflife, rampup · images_seen)).
    """

    def __init__(
        self, weights: dict[str, Tensor], changed: Callable[[], None] = lambda: None, *, halflife: int, rampup: float
    ):
        """`changed` is called whenever `swapped_in` wrote to the weights."""
        self.halflife = halflife
        self.rampup = rampup
        self._weights, self._changed = weights, changed
        self.averages = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, images_seen: int, batch: int) -> None:
        """Take in the weights after the step that ended at `images_seen`."""
        halflife = min(self.halflife, self.rampup * images_seen) if self.rampup > 0 else self.halflife
        weight = 1 - 0.5 ** (batch / max(halflife, 1e-8))
        torch._foreach_lerp_(list(self.averages.values()), [w.detach() for w in self._weights.values()], weight)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The averages in the model's place, for evaluation; the weights come back unchanged."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            kept = weight.detach().clone()
            weight.copy_(self.averages[name])
            self.averages[name].copy_(kept)
        self._changed()
