"""Named tensors, whole, sharded or this rank's part of them: their bytes, an exchange of values, a check for NaN,
reading that ranks share."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from vqscale.topology import Topology

Tensors = dict[str, Tensor]  # by name
Scalar = Float[Tensor, ""]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def exchange(one: Tensors, other: Tensors) -> None:
    """Swap the values of `other` with those of the same names in `one`, in place."""
    for name, tensor in other.items():
        values = one[name].detach().clone()
        one[name].copy_(tensor)
        tensor.copy_(values)


@torch.no_grad()
def fill_together(tensors: Tensors, fill: Callable[[Tensors], None], topology: Topology) -> None:
    """Fill tensors in place. Each rank calls `fill` with its sharded ones and an equal share of the plain ones, whose
    values it then sends to the others. Collective; a ValueError or OSError of any rank is a ValueError on all."""
    plain = [name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)]
    plain.sort(key=lambda name: (-total_bytes([tensors[name]]), name))  # so that the shares are equal
    owners = {name: number % topology.world_size for number, name in enumerate(plain)}
    mine = {name: one for name, one in tensors.items() if owners.get(name, topology.rank) == topology.rank}
    topology.on_each(partial(fill, mine))
    for name, owner in owners.items() if topology.world_size > 1 else ():
        values = tensors[name].contiguous().clone()
        topology.broadcast_(values.view(-1).view(torch.uint8), owner)
        tensors[name].copy_(values)


def first_not_finite(tensors: Tensors, topology: Topology) -> str:
    """The name of the first tensor that holds NaN or infinity on any rank, or "". Collective; one read by the host."""
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    parts = [local_part(tensors[name]) for name in names]
    if not names:
        return ""
    # Extremes, and not `isfinite`, because they need no memory of the tensor's size.
    extremes = [torch.stack(torch.aminmax(part)) if part.numel() else part.new_zeros(2) for part in parts]
    finite = torch.stack([pair.isfinite() for pair in extremes]).all(1)
    counts = topology.all_reduce_((~finite).to(torch.int32))
    return next((name for name, count in zip(names, counts.tolist(), strict=True) if count), "")
