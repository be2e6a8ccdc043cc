"""DeepSpeed's ZeRO stages 1, 2 and 3 behind the same interface as the torch engine, and their state in and out.

Under ZeRO a rank holds, of every parameter, a contiguous flat range of the fp32 master copy and of Adam's two moments:
a `Fragment`. Everything here goes through those ranges: the weight EMA averages them in place, and a checkpoint
gets each tensor whole, one at a time, sharded by rows as FSDP2 shards it. So a checkpoint knows nothing of ZeRO, and
every strategy reads every other's. Source: Rajbhandari et al. 2020, "ZeRO".
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from vqscale.engine.optim import MOMENTS, adamw_groups, fresh_state, set_learning_rate
from vqscale.engine.tensors import Scalar, Tensors, exchange, total_bytes
from vqscale.topology import Topology


@dataclass(frozen=True)
class Fragment:
    """This rank's range of one parameter: flat elements `start` … of the fp32 master copy and of the two moments."""

    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class ZeroEngine:
    """zero1 shards optimizer state over ranks, zero2 gradients too, zero3 parameters too."""

    def __init__(
        self,
        module: nn.Module,
        topology: Topology,
        *,
        precision: str,
        accumulation: int,
        max_norm: float,
        optimizer: dict[str, Any],
    ):
        """`module`: initialised, the same values on every rank.

        Raises ValueError where DeepSpeed is not installed, or for a precision that it does not train in.
        """
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={precision} under strategy={topology.strategy}: choose fp32 or bf16")
        self._topology = topology
        self.module = module
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        stage = int(topology.strategy.removeprefix("zero"))
        deepspeed = _import_deepspeed(topology)
        groups = adamw_groups(self._parameters.values(), optimizer["weight_decay"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own use of torch
            self.model, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=torch.optim.AdamW(groups, lr=0.0, betas=optimizer["betas"]),
                config=_config(stage, precision, accumulation, max_norm),
                dist_init_required=False,
            )
        # Parameters that are not trained are whole under stages 1 and 2; stage 3 shards them too.
        self._frozen = {n: p for n, p in module.named_parameters() if stage == 3 and n not in self._parameters}
        self._gathered = deepspeed.zero.GatheredParameters
        self._ranges = _Stage3(self._optimizer, topology) if stage == 3 else _Stage12(self._optimizer)
        self._adam: Any = self._optimizer.optimizer
        for flat in self._ranges.flats:
            self._adam.state[flat] = fresh_state(flat)
        self._fragments = {name: self._ranges.fragment(p) for name, p in self._parameters.items()}
        self._mesh = init_device_mesh(topology.device.type, (topology.world_size,), mesh_dim_names=("shard",))
        self._last = True

    @property
    def optimizer_steps(self) -> int:
        """Adam's step count, the same for every parameter."""
        return int(self._adam.state[self._ranges.flats[0]]["step"])

    @optimizer_steps.setter
    def optimizer_steps(self, count: int) -> None:
        for flat in self._ranges.flats:
            self._adam.state[flat]["step"].fill_(count)

    def begin_micro_batch(self, last: bool) -> None:
        """Before each micro-batch's forward; DeepSpeed counts micro-batches by itself."""
        self._last = last

    def backward(self, loss: Scalar) -> None:
        """`loss`: the mean over this micro-batch, undivided."""
        self.model.backward(loss)
        if not self._last:
            self.model.step()  # no update: it counts the micro-batch

    def step(self, learning_rate: float, max_norm: float) -> tuple[bool, Scalar]:
        """Clip, check and apply. Returns (applied, global gradient norm before clipping); see TorchEngine.step.

        DeepSpeed clips at the `max_norm` that it was built with.
        """
        set_learning_rate(self._adam, learning_rate)
        self.model.step()
        applied = not self._optimizer.overflow
        norm = self.model.get_global_grad_norm() if applied else math.inf
        return applied, torch.as_tensor(norm, dtype=torch.float32, device=self._topology.device)

    def local_weights(self) -> Tensors:
        """This rank's range of every trained parameter's fp32 master copy, by name, flat; views, not copies."""
        return {name: fragment.master for name, fragment in self._fragments.items()}

    def exchange_weights(self, values: Tensors) -> None:
        """Swap the model's weights with `values`, laid out as `local_weights`; the working copies follow."""
        exchange(self.local_weights(), values)
        self._ranges.publish()

    def as_checkpoint_tensors(self, averages: Tensors) -> Tensors:
        """Parameters, persistent buffers, optimizer moments and averages under the model's own names, as tensors that
        any sharding can read; copies, except for buffers and what stages 1 and 2 do not train. Collective."""
        with self._gathered([*self._frozen.values()]):
            state = {n: t.clone() if n in self._frozen else t for n, t in self.module.state_dict().items()}
        tensors = {f"model.{name}": value for name, value in state.items() if name not in self._parameters}
        for prefix, local in self._local_ranges(averages):
            tensors |= {f"{prefix}{name}": self._as_rows(name, values) for name, values in local.items()}
        return tensors

    def from_checkpoint_tensors(self, fill: Callable[[Tensors], None], averages: Tensors) -> None:
        """`fill` writes a checkpoint's values into the tensors of `as_checkpoint_tensors`; this engine and `averages`
        take them from there. Collective."""
        tensors = self.as_checkpoint_tensors(averages)
        fill(tensors)
        for prefix, local in self._local_ranges(averages):
            for name, values in local.items():
                rows = tensors[f"{prefix}{name}"]
                assert isinstance(rows, DTensor)
                values.copy_(rows.full_tensor().flatten()[self._fragments[name].start :][: values.numel()])
        with self._gathered([*self._frozen.values()], modifier_rank=0):
            for name, parameter in self._frozen.items():
                parameter.data.copy_(tensors[f"model.{name}"])
        self._ranges.publish()

    def bytes_on_this_rank(self) -> dict[str, int]:
        """Bytes kept between steps, by what they are for; `master` is ZeRO's second copy of the weights."""
        moments = [self._adam.state[flat][moment] for flat in self._ranges.flats for moment in MOMENTS]
        working_copies = [getattr(p, "ds_tensor", p) for p in self.module.parameters()]  # of stage 3 this rank's part
        return {
            "parameters": total_bytes(working_copies),
            "optimizer": total_bytes(moments),
            "master": total_bytes(self._ranges.flats),
        }

    def _local_ranges(self, averages: Tensors) -> Iterator[tuple[str, Tensors]]:
        """(prefix of the names in a checkpoint, this rank's ranges) of weights, either moment, and averages."""
        yield "model.", self.local_weights()
        for moment in MOMENTS:
            yield f"optimizer.{moment}.", {name: getattr(f, moment) for name, f in self._fragments.items()}
        yield "ema.", averages

    def _as_rows(self, name: str, local: Tensor) -> DTensor:
        """The tensor of all ranks' ranges, sharded by rows."""
        whole = torch.zeros(self._shapes[name].numel(), dtype=local.dtype, device=local.device)
        start = self._fragments[name].start
        whole[start : start + local.numel()] = local
        whole = self._topology.all_reduce_(whole).view(self._shapes[name])
        rows = whole.chunk(self._topology.world_size)
        mine = rows[self._topology.rank] if self._topology.rank < len(rows) else whole[:0]
        return DTensor.from_local(mine.clone(), self._mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())


class _Stage12:
    """How DeepSpeed's stages 1 and 2 store a rank's ranges: one flat tensor per parameter group."""

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self.flats: list[Tensor] = list(optimizer.single_partition_of_fp32_groups)

    def fragment(self, parameter: Any) -> Fragment:
        mapping = parameter._hp_mapping
        if mapping is None:  # other ranks have all of it
            return Fragment(0, *(self.flats[0].detach()[:0] for _ in range(3)))
        where, flat = mapping.hp_fragment_address, self.flats[mapping.param_group_index]
        return _fragment(self._optimizer, flat, mapping.lp_fragment_address.start, where.start, where.numel)

    def publish(self) -> None:
        self._optimizer.update_lp_params()


class _Stage3:
    """How stage 3 stores them: parameter after parameter, each split into equal padded parts, in one flat tensor per
    sub-group."""

    def __init__(self, optimizer: Any, topology: Topology):
        self._optimizer, self._rank = optimizer, topology.rank
        self.flats: list[Tensor] = list(optimizer.fp32_partitioned_groups_flat)

    def fragment(self, parameter: Any) -> Fragment:
        group, offset, padded = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        start = min(self._rank * padded, parameter.ds_numel)
        count = min(padded, parameter.ds_numel - start)
        return _fragment(self._optimizer, self.flats[group], start, offset, count)

    def publish(self) -> None:
        self._optimizer._partition_all_parameters()  # a forward without a backward leaves them gathered, and stale
        for group in range(len(self.flats)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)


def _fragment(optimizer: Any, flat: Tensor, start: int, offset: int, count: int) -> Fragment:
    state = optimizer.optimizer.state[flat]
    parts = (t.detach().narrow(0, offset, count) for t in (flat, *(state[moment] for moment in MOMENTS)))
    return Fragment(start, *parts)


def _config(stage: int, precision: str, accumulation: int, max_norm: float) -> dict[str, Any]:
    """DeepSpeed's config from ours."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own timers read it
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_norm,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},  # small tensors are sharded too
        "zero_allow_untested_optimizer": True,  # torch's own AdamW
        "zero_force_ds_cpu_optimizer": False,
        # As under the other strategies: fp32 weights and gradients, bf16 arithmetic.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 1 << 30,
    }


def _import_deepspeed(topology: Topology) -> Any:
    """The library, set up on the process group that exists. Raises ValueError where it is not installed."""
    if topology.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("LOCAL_RANK", str(topology.local_rank))  # required even without a launcher
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops
    except ImportError as error:
        raise ValueError(
            f"strategy={topology.strategy} needs DeepSpeed, which cannot be imported here ({error}): "
            "pip install deepspeed (Linux), or choose strategy=single, ddp, fsdp or hsdp"
        ) from error
    if topology.device.type == "cpu":  # it would compile this op on import, for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=False
    )
    return deepspeed
