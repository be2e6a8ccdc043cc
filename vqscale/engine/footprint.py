"""What training needs, without running it: bytes kept and sent per rank, FLOPs, activations, time between saves.

In: parameter shapes, a strategy and a number of ranks; a model's step on fake tensors.  Out: bytes and FLOPs. The
layouts are those of engine/parallel.py and engine/zero.py; state between steps is fp32.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vqscale.engine.optim import adamw_groups
from vqscale.engine.parallel import SHARDED, shard_count, shard_dim

_FP32 = 4  # bytes
_ZERO_ALIGNMENT = 2  # elements to which DeepSpeed pads a rank's part of a flat group


def bytes_per_rank(
    module: nn.Module, strategy: str, world_size: int, nodes: int, *, precision: str, accumulation: int, average: bool
) -> dict[str, int]:
    """Peak over ranks of the bytes kept: parameters, gradients, optimizer (two moments), master (ZeRO's fp32 copy),
    average (the weight EMA), and gathered: the whole weights of two units at a time, this one and the next. Frozen
    parameters have none of these but the first and the last."""
    shapes = [parameter.shape for parameter in module.parameters()]
    trained = [parameter.shape for parameter in module.parameters() if parameter.requires_grad]
    parameters, numel = (sum(map(math.prod, some)) for some in (shapes, trained))
    part, gathered, master, gradients = numel, 0, 0, numel
    if strategy in SHARDED:
        shards = shard_count(strategy, world_size, nodes)
        parameters, part = _largest_shard(shapes, shards), _largest_shard(trained, shards)
        gradients = part if accumulation == 1 else numel  # reduced once per step: whole until then
    elif strategy == "zero3":
        parameters, part = (sum(-(-math.prod(shape) // world_size) for shape in some) for some in (shapes, trained))
        master = gradients = part
    elif strategy.startswith("zero"):
        groups = [group["params"] for group in adamw_groups(module.parameters(), weight_decay=1.0)]
        quantum = _ZERO_ALIGNMENT * world_size
        sizes = [sum(parameter.numel() for parameter in group) for group in groups]
        part = master = sum(-(-size // quantum) * _ZERO_ALIGNMENT for size in sizes)
        gradients = part if strategy == "zero2" else numel
    if strategy in (*SHARDED, "zero3"):
        gathered = 2 * max(_unit_sizes(module))
    elements = {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": 2 * part,
        "master": master,
        "average": part if average else 0,
    }
    kept = {what: _FP32 * count for what, count in elements.items()}
    return kept | {"gathered": gathered_bytes(strategy, precision) * gathered}


def gathered_bytes(strategy: str, precision: str) -> int:
    """Bytes of a weight as it travels between ranks."""
    return 2 if precision == "bf16" and strategy in SHARDED else _FP32


def checkpoint_bytes(numel: int, *, average: bool, frozen: int = 0) -> int:
    """Of a whole checkpoint, all ranks' parts: weights and, but of `frozen` ones, two moments and the weight EMA.
    Buffers are left out."""
    return _FP32 * (numel + (numel - frozen) * (3 if average else 2))


def save_interval(save_seconds: float, seconds_between_failures: float) -> float:
    """Seconds of training between two saves that lose the least time.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
    Computer Systems 22, 2006, equation 37. save_seconds: how long training waits for one save, more than 0.
    """
    ratio = save_seconds / (2 * seconds_between_failures)
    if ratio >= 1:
        return seconds_between_failures
    return 2 * seconds_between_failures * math.sqrt(ratio) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def _largest_shard(shapes: Iterable[Sequence[int]], shards: int) -> int:
    """Elements of rank 0's shards. A dimension that does not divide has equal chunks, the last one smaller."""
    total = 0
    for shape in shapes:
        dim = shard_dim(shape, shards)
        total += math.prod(shape) // shape[dim] * -(-shape[dim] // shards)
    return total


def _unit_sizes(module: Any) -> list[int]:
    units = [sum(p.numel() for p in unit.parameters()) for unit in module.wrap_units()]
    return [*units, sum(p.numel() for p in module.parameters()) - sum(units)]


def sent_per_step(
    numel: int, strategy: str, world_size: int, nodes: int, *, precision: str, accumulation: int, frozen: int = 0
) -> int:
    """Bytes that each rank sends in one optimizer step, by rings: (n - 1) / n of a tensor to scatter-reduce it over n
    ranks or to gather it, twice that to all-reduce it. `frozen` weights of all `numel` are gathered in forward alone.
    Codebook statistics and flags, below a megabyte, are left out."""

    def ring(elements: float, ranks: int) -> float:
        return _FP32 * elements * (ranks - 1) / ranks

    weight = gathered_bytes(strategy, precision) / _FP32
    sharded = 2 * accumulation * weight + 1  # gathered in forward and in backward of every micro-batch, reduced once
    trained = numel - frozen
    if strategy == "hsdp":
        shards = shard_count(strategy, world_size, nodes)
        within = sharded * ring(trained, shards) + accumulation * weight * ring(frozen, shards)
        return int(within + 2 * ring(trained / shards, world_size // shards))
    per_step = {
        "single": 0,
        "ddp": 2,
        "fsdp": sharded,
        "zero1": 2,
        "zero2": accumulation + 1,  # reduced after every micro-batch
        "zero3": 3 * accumulation,
    }
    in_forward = {"fsdp": accumulation * weight, "zero3": accumulation}.get(strategy, 0)
    return int(per_step[strategy] * ring(trained, world_size) + in_forward * ring(frozen, world_size))


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocated and nothing has freed yet."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return made

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def step_flops(module: nn.Module, step: Callable[[], Tensor]) -> int:
    """FLOPs of `step`, which returns the loss, and of its backward: two per multiply-add of matrix products,
    convolutions and attention; recomputation counts. For a model and inputs on meta or fake tensors."""
    with FlopCounterMode(display=False) as flops:
        step().backward()
    module.zero_grad(set_to_none=True)
    return flops.get_total_flops()


def activation_bytes(module: nn.Module, step: Callable[[], Tensor]) -> int:
    """Peak bytes of activations of `step`, which returns the loss, and of its backward, on fake tensors.

    Everything alive at once counts, except for the weights and their gradients: what backward needs, its own
    temporaries, the inputs' conversions, autocast's copies of weights.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]
    with _LiveBytes([*module.parameters(), *module.buffers()]) as live:
        step().backward()
    for handle in handles:
        handle.remove()
    return live.peak
