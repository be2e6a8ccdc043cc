"""Tests that compare a device with the CPU: one function, with `cuda`, marked `gpu`, and with `cpu`.

The latter compares the CPU with itself, so that a test is known to run before it meets a card.
"""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

_NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch sees none here")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, _NO_CARD])
DEVICES = ["cpu", CUDA]


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|found - expected| / |expected| over all tensors, on the CPU in float64; NaN where one has NaN."""
    pairs = list(zip(found, expected, strict=True))
    assert all(one.shape == other.shape for one, other in pairs)
    difference = sum(
        (one.detach().cpu().double() - other.detach().cpu().double()).square().sum() for one, other in pairs
    )
    norm = sum(other.detach().cpu().double().square().sum() for _, other in pairs)
    return float((difference / norm) ** 0.5)


def gradients(module: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    """Of all parameters that the loss depends on, which are then without gradients again."""
    loss.backward()
    found = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    module.zero_grad()
    return found


def moved(values: Sequence[Tensor], device: str) -> Iterator[Tensor]:
    return (value.to(device) for value in values)
