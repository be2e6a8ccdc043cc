"""Weights of any model here from (seed, parameter name): the same on any device, rank and sharding.

In: a module whose tensors exist (memory of any content, as after `to_empty`, is enough).  Out: the same module, filled.

Each tensor is drawn whole, in float32, on the CPU, from a generator of its own, then copied to where it lives; of a
DTensor the rank keeps its part.  The rule is found per module, first match first:

1. any `bias`: 0;
2. normalisation layers: weight 1;
3. `nn.Embedding`: normal with standard deviation `init_scale`;
4. any other tensor of two or more dimensions: normal with standard deviation `init_scale` / sqrt(fan-in).

`init_scale` is an attribute of the module (default 1, which keeps the variance of a linear layer; sqrt(2) before
ReLU, He et al. 2015, arXiv 1502.01852, equation 10; 0 starts a residual branch as the identity).  A module with
buffers to fill (masks, a codebook) has `init_buffers(generator)`.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from vqscale.seeding import generator, key_of

RELU_GAIN = math.sqrt(2)  # He et al. 2015, equation 10
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)

Layer = TypeVar("Layer", bound=nn.Module)


def with_init_scale(layer: Layer, scale: float) -> Layer:
    """The layer, whose weights will start at `scale` times what keeps the variance."""
    layer.init_scale = scale  # type: ignore[assignment]
    return layer


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter, and the buffers of modules that say how, from (seed, name).

    Raises TypeError for a parameter that no rule covers, naming it.
    """
    for path, parameter in model.named_parameters():  # tied weights once, under their first name
        module = model.get_submodule(path.rpartition(".")[0])
        fill(parameter, _draw(module, path, parameter.shape, generator(seed, key_of(path))))
    for prefix, module in model.named_modules():
        fill_buffers = getattr(module, "init_buffers", None)
        if fill_buffers is not None:
            fill_buffers(generator(seed, key_of(f"{prefix}.buffers")))


def _draw(module: nn.Module, path: str, shape: torch.Size, rng: torch.Generator) -> Tensor:
    """One whole float32 tensor on the CPU by the module's rule. Raises TypeError where there is none."""
    if "bias" in path.rpartition(".")[2]:
        return torch.zeros(shape)
    if isinstance(module, _NORMS):
        return torch.ones(shape)
    scale = float(getattr(module, "init_scale", 1.0))
    if isinstance(module, nn.Embedding):
        return torch.randn(shape, generator=rng) * scale
    if len(shape) >= 2:
        return torch.randn(shape, generator=rng) * (scale / math.sqrt(_fan_in(module, shape)))
    raise TypeError(f"no rule for parameter {path} {tuple(shape)} of {type(module).__name__}")


def _fan_in(module: nn.Module, shape: torch.Size) -> float:
    """Products summed into one output element."""
    if isinstance(module, _ConvTransposeNd):  # weight [in, out / groups, ...]; a stride spreads the taps over outputs
        taps = math.prod(shape[2:]) / math.prod(module.stride)
        return shape[0] / module.groups * taps
    return math.prod(shape[1:])


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, the same on every rank, into one that may be sharded."""
    if isinstance(tensor, DTensor):
        whole = whole.to(tensor.device, tensor.dtype)
        # src_data_rank=None: every rank has the same tensor and cuts its own part, without communication
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)
