"""Plain model -> trained model: compile -> shard (DDP / FSDP2 / HSDP), and the torch engine around it.

Activation checkpointing happens inside the blocks' own forward, so it comes first by construction.  Compilation and
sharding act on the units that the model names in `wrap_units()`; the quantizer is in none of them.  A model on the meta
device gets its memory here, of a sharded one only this rank's part.
"""

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from vqscale.engine.optim import build_adamw, moments, set_learning_rate
from vqscale.engine.tensors import Scalar, Tensors, exchange, local_part, total_bytes
from vqscale.engine.zero import ZeroEngine
from vqscale.topology import Topology

Initialise = Callable[[nn.Module], None]
SHARDED = ("fsdp", "hsdp")  # the strategies that shard parameters here
# Of parameters and inputs
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


class Engine(Protocol):
    """What `fit` asks of a strategy. `module` is the plain model, `model` what a training step calls.

    `averages` is the weight EMA, laid out as `local_weights`, or empty.
    """

    module: nn.Module
    model: Any
    optimizer_steps: int

    def begin_micro_batch(self, last: bool) -> None: ...
    def backward(self, loss: Scalar) -> None: ...
    def step(self, learning_rate: float, max_norm: float) -> tuple[bool, Scalar]: ...
    def local_weights(self) -> Tensors: ...
    def exchange_weights(self, values: Tensors) -> None: ...
    def as_checkpoint_tensors(self, averages: Tensors) -> Tensors: ...
    def from_checkpoint_tensors(self, fill: Callable[[Tensors], None], averages: Tensors) -> None: ...
    def bytes_on_this_rank(self) -> dict[str, int]: ...


class TorchEngine:
    """single, DDP, FSDP2 and HSDP: one optimizer over the (possibly sharded) parameters."""

    def __init__(
        self,
        module: nn.Module,
        topology: Topology,
        *,
        precision: str,
        accumulation: int,
        optimizer: dict[str, Any],
        initialise: Initialise | None = None,
    ):
        """`module`: initialised, on the CPU or the rank's device, the same values on every rank; or on the meta device,
        and `initialise` fills it, sharded or not, by the same rule on every rank.

        Raises ValueError for an unknown precision.
        """
        if precision not in DTYPES:
            raise ValueError(f"precision={precision}: choose {', '.join(DTYPES)}")
        self._accumulation = accumulation
        self.module = module.to(dtype=DTYPES[precision]) if precision == "fp64" else module
        self.model = _distribute(self.module, topology, precision, initialise)
        self._names = {parameter: name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        self._optimizer = build_adamw(self._names, **optimizer)

    @property
    def optimizer_steps(self) -> int:
        """Adam's step count, the same for every parameter."""
        return int(next(iter(self._optimizer.state.values()))["step"])

    @optimizer_steps.setter
    def optimizer_steps(self, count: int) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(count)

    def begin_micro_batch(self, last: bool) -> None:
        """Before each micro-batch's forward: gradients are reduced over ranks after the last one only."""
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last
        elif isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)

    def backward(self, loss: Scalar) -> None:
        """`loss`: the mean over this micro-batch, undivided."""
        (loss / self._accumulation).backward()

    def step(self, learning_rate: float, max_norm: float) -> tuple[bool, Scalar]:
        """Clip, check and apply. Returns (applied, global gradient norm before clipping).

        The norm is reduced over all ranks, so that a gradient that is not finite on one of them skips the step on all.
        This is the step's one host read.
        """
        limit = max_norm if max_norm > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(list(self._names), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        applied = bool(torch.isfinite(norm))
        if applied:
            set_learning_rate(self._optimizer, learning_rate)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return applied, norm

    def local_weights(self) -> Tensors:
        """This rank's part of every trained parameter, by name; views, not copies."""
        return {name: local_part(parameter.detach()) for parameter, name in self._names.items()}

    def exchange_weights(self, values: Tensors) -> None:
        """Swap the model's weights with `values`, laid out as `local_weights`."""
        exchange(self.local_weights(), values)

    def as_checkpoint_tensors(self, averages: Tensors) -> Tensors:
        """Parameters, persistent buffers, optimizer moments and averages under the model's own names, as tensors that
        any sharding can read; views, not copies."""
        tensors = {f"model.{name}": value.detach() for name, value in self.module.state_dict().items()}
        tensors |= {f"optimizer.{key}": value for key, value in moments(self._optimizer, self._names).items()}
        sharded = {name: parameter for parameter, name in self._names.items() if name in averages}
        return tensors | {f"ema.{name}": _sharded_as(p, averages[name]) for name, p in sharded.items()}

    def from_checkpoint_tensors(self, fill: Callable[[Tensors], None], averages: Tensors) -> None:
        """`fill` writes a checkpoint's values into the tensors of `as_checkpoint_tensors`: the engine's own memory."""
        fill(self.as_checkpoint_tensors(averages))

    def bytes_on_this_rank(self) -> dict[str, int]:
        """Bytes kept between steps, by what they are for."""
        adam = [local_part(moment) for moment in moments(self._optimizer, self._names).values()]
        weights = [local_part(parameter.detach()) for parameter in self.module.parameters()]
        return {"parameters": total_bytes(weights), "optimizer": total_bytes(adam)}


def autocast(topology: Topology, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 arithmetic over fp32 parameters, or nothing."""
    return torch.autocast(topology.device.type, torch.bfloat16, enabled=precision == "bf16")


def _sharded_as(parameter: Tensor, local: Tensor) -> Tensor:
    """`local`, this rank's part of some tensor, as that tensor, sharded as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def materialise(module: nn.Module, topology: Topology, initialise: Initialise | None) -> None:
    """Move the module to the rank's device. Memory for what was on the meta device is filled with NaN first, so that a
    parameter which `initialise` forgets shows at the first step."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        module.to(topology.device)
        return
    module.to_empty(device=topology.device)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            local_part(tensor.detach()).fill_(math.nan)
    if initialise is not None:
        initialise(module)


def _distribute(module: nn.Module, topology: Topology, precision: str, initialise: Initialise | None) -> Any:
    if topology.strategy in SHARDED:
        _shard(module, topology, precision)
    materialise(module, topology, initialise)
    if topology.strategy != "ddp":
        return module
    for parameter in module.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_with_strides, parameter.stride()))
    on_gpu = [topology.local_rank] if topology.device.type == "cuda" else None
    with warnings.catch_warnings():  # its successor does not exist in every torch that we support
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(module, device_ids=on_gpu, broadcast_buffers=False, gradient_as_bucket_view=True)


def _with_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """A view of the gradient. DDP compares even the strides of dimensions of size 1, such as a 1x1 kernel's in
    channels_last, and warns of a slow copy where they differ."""
    return gradient.as_strided(gradient.shape, strides) if gradient.is_contiguous() else gradient


def _shard(module: Any, topology: Topology, precision: str) -> None:
    shards = shard_count(topology.strategy, topology.world_size, topology.nodes)
    mesh = _mesh(topology, shards)
    # In bf16 autocast would make and keep a copy of all weights; instead they are gathered as bf16. The residual stream
    # stays as autocast has it.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dim(parameter.shape, shards))

    # Torch warns whenever a model returns a view, such as a prior's logits, because writing into it is unsafe.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for unit in [*module.wrap_units(), module]:
        fully_shard(unit, mesh=mesh, shard_placement_fn=placement, mp_policy=policy)
    for method in getattr(module, "public_methods", ()):
        register_fsdp_forward_method(module, method)


def shard_dim(shape: Sequence[int], shards: int) -> int:
    """The dimension along which FSDP2 shards a parameter: the first that divides evenly, else 0.

    FSDP2's default is always 0: where a tensor has fewer rows than there are ranks, the first ranks then hold a whole
    row each and the last ranks nothing.
    """
    return next((dim for dim, size in enumerate(shape) if size % shards == 0), 0)


def shard_count(strategy: str, world_size: int, nodes: int) -> int:
    """The number of shards of a parameter under fsdp and hsdp: hsdp shards within a node (on one node: among half the
    ranks) and replicates across nodes."""
    if strategy == "fsdp":
        return world_size
    return world_size // nodes if nodes > 1 else world_size // 2


def _mesh(topology: Topology, shards: int) -> DeviceMesh:
    kind = topology.device.type
    if topology.strategy == "fsdp":
        return init_device_mesh(kind, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (topology.world_size // shards, shards), mesh_dim_names=("replicate", "shard"))


def make_engine(
    module: nn.Module, topology: Topology, config: Any, accumulation: int, initialise: Initialise | None = None
) -> Engine:
    """The engine of the strategy that was launched; `config` is a FitConfig. See TorchEngine for the rest."""
    optimizer = {"betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    common: dict[str, Any] = {"precision": config.precision, "accumulation": accumulation, "optimizer": optimizer}
    if topology.engine == "deepspeed":
        materialise(module, topology, initialise)
        return ZeroEngine(module, topology, max_norm=config.max_norm, **common)
    return TorchEngine(module, topology, initialise=initialise, **common)


def compile_units(module: nn.Module, strategy: str = "single") -> None:
    """torch.compile on each of the model's units, in place; names stay as they are. Units that are sharded on their own
    are compiled on their own; otherwise a model may name larger ones in `compiled_units()`."""
    from torch._dynamo import config as dynamo  # a second's import, which other runs do without

    larger = getattr(module, "compiled_units", None) if strategy in ("single", "ddp") else None
    units = (larger or module.wrap_units)()  # type: ignore[operator]
    # Dynamo counts the graphs of all modules as one function's, and beyond its limit, 8, units would stay eager. A unit
    # has several: in training and in evaluation, for batches of several sizes.
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(dynamo, limit, max(getattr(dynamo, limit), 8 * len(units)))
    for unit in units:
        unit.compile()


def assert_same_everywhere(values: dict[str, Tensor], topology: Topology) -> None:
    """Every rank holds bit-identical values; raises RuntimeError naming the first that differs."""
    for name, value in values.items():
        first = topology.broadcast_(value.detach().clone())
        differs = (first != value).any().to(torch.int64).reshape(1)
        if int(topology.all_reduce_(differs)):
            raise RuntimeError(f"{name} differs between ranks")
