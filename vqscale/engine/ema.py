"""Exponential moving average of the weights, sharded exactly as the weights are."""

import torch

from vqscale.engine.tensors import Tensors


class WeightEMA:
    """Averages of this rank's part of the weights, without collectives.

    The half-life counts images, and grows with the run while it is young (Karras et al. 2024, EDM2, section 3):
    decay = 0.5 ^ (batch / min(halflife, rampup · images_seen)).
    """

    def __init__(self, weights: Tensors, *, halflife: int, rampup: float):
        self.halflife = halflife
        self.rampup = rampup
        self._weights = weights
        self.averages = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, images_seen: int, batch: int) -> None:
        """Average in the weights of the step that ended at `images_seen`."""
        halflife = min(self.halflife, self.rampup * images_seen) if self.rampup > 0 else self.halflife
        weight = 1 - 0.5 ** (batch / max(halflife, 1e-8))
        torch._foreach_lerp_(list(self.averages.values()), [w.detach() for w in self._weights.values()], weight)
