"""An extractor that costs nothing."""

import time
from pathlib import Path

import torch
from torch import Tensor

from vqscale.evaluation.features import Extractor, Features

SIDE = 16


def projection(name: str = "lite0", *, calls: Path | None = None, pause: float = 0.0) -> Extractor:
    """A fixed random projection of the pixels of 16 x 16 images, under a real extractor's name.

    calls: a file that gets a line per batch. pause: seconds that a batch takes.
    """
    weight = torch.randn(3 * SIDE * SIDE, 24, generator=torch.Generator().manual_seed(9)) / 50

    def features(images: Tensor) -> Features:
        time.sleep(pause)
        if calls is not None:
            with calls.open("a") as file:
                file.write(f"{len(images)}\n")
        pooled = (images.float().flatten(1) / 255) @ weight
        return Features(pooled, pooled[:, :10] * 5, pooled[:, :7])

    return Extractor(name, "f" * 64, True, "none", "random projection", features)
