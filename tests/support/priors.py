"""Small priors of both kinds whose every tensor is random: zeros at the end of branches would hide what is sought."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vqscale.models.pixelcnn import PixelCNN
from vqscale.models.prior import LevelPrior, PriorConfig
from vqscale.models.transformer import Transformer

K, CLASSES = 11, 3
KINDS: dict[str, type[LevelPrior]] = {"pixelcnn": PixelCNN, "transformer": Transformer}
_SHARED: dict[str, Any] = {"hidden": 16, "residual": 12, "heads": 4, "conditioning_layers": 2, "dropout": 0.2}
SMALL = {
    "pixelcnn": PriorConfig(layers=3, output_layers=1, class_dim=8, **_SHARED),
    "transformer": PriorConfig(kind="transformer", layers=2, **_SHARED),
}


def build(kind: str, grid: tuple[int, int] = (5, 4), upper: Sequence[tuple[int, int]] = (), **changes: Any) -> Any:
    """An untrained prior of this kind with the sizes above, `changes` apart."""
    config = dataclasses.replace(SMALL[kind], **changes)
    model = KINDS[kind](config, num_codes=K, grid=grid, num_classes=CLASSES, upper_grids=upper)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 1.2 / max(1, parameter[0].numel()) ** 0.5)
    return model


def draw(shape: Sequence[int], seed: int = 3, high: int = K) -> Tensor:
    """Random codes."""
    return torch.randint(high, tuple(shape), generator=torch.Generator().manual_seed(seed))
