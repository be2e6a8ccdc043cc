"""The checks of shapes under pytest find what is wrong, and nothing else."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int, TypeCheckError, UInt8
from support import shapes
from torch import Tensor, nn


def double(x: Float[Tensor, "b d"], times: int = 2) -> Float[Tensor, "b d"]:
    """Doubles."""
    return x * times


def cut(x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Loses a row, against what it says."""
    return x[1:]


class Layer(nn.Module):
    """A module whose forward says a shape."""

    def forward(self, x: list[Int[Tensor, "b h w"]], picture: UInt8[np.ndarray, "h w 3"] | None = None) -> int:
        return len(x)

    @staticmethod
    def size(x: Float[Tensor, "b d"]) -> int:
        """Elements."""
        return x.numel()


@pytest.fixture
def module() -> ModuleType:
    """This module's functions, checked, in a module of their own."""
    made = ModuleType(__name__)
    vars(made).update(double=double, cut=cut, Layer=type("Layer", (nn.Module,), dict(vars(Layer))))
    shapes.check_shapes_of(made, __name__)
    return made


def test_what_fits_passes(module: ModuleType) -> None:
    x = torch.ones(2, 3)
    assert module.double(x).sum() == 12
    assert module.double(x, times="stand-in" and 3).sum() == 18
    assert module.Layer()([torch.ones(1, 2, 3, dtype=torch.int64)]) == 1
    assert module.Layer.size(x) == 6


def test_what_does_not_fit_is_an_error(module: ModuleType) -> None:
    for call in (
        lambda: module.double(torch.ones(2)),
        lambda: module.double(torch.ones(2, 3, dtype=torch.int64)),
        lambda: module.cut(torch.ones(2, 3)),
        lambda: module.Layer()([torch.ones(1, 2, dtype=torch.int64)]),
        lambda: module.Layer()([], np.zeros((4, 4, 3))),
        lambda: module.Layer.size(torch.ones(2)),
    ):
        with pytest.raises(TypeCheckError):
            call()


def test_compiled_code_is_traced_without_the_checks(module: ModuleType) -> None:
    compiled = torch.compile(lambda x: module.double(x), backend="eager", fullgraph=True)
    assert compiled(torch.ones(2, 3)).sum() == 12


def test_the_packages_with_tensors_are_checked() -> None:
    assert isinstance(sys.meta_path[0], shapes._Finder)
    from vqscale.models import quantizer

    assert isinstance(quantizer.__spec__.loader, shapes._Loader)
