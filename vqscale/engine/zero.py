"""DeepSpeed's ZeRO stages 1, 2 and 3 behind the same interface as the torch engine, and their state in and out.

Under ZeRO a rank holds, of every parameter, a contiguous flat range of the fp32 master copy and of Adam's two moments:
a `Fragment`. Everything here goes through those ranges: the weight EMA averages them where they lie, and a checkpoint
gets each tensor whole, one at a time, cut into rows as FSDP2 would cut it. So a checkpoint knows no ZeRO, and every
strategy reads every other's. Source: Rajbhandari et al. 2020, "ZeRO".
"""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from vqscale.engine.optim import MOMENTS, adamw_groups, fresh_state, set_learning_rate
from vqscale.topology import Topology


@dataclass(frozen=True)
class Fragment:
    """This rank's range of one parameter: flat elements `start` … of the fp32 master copy and of the two moments."""

    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class ZeroEngine:
    """zero1: optimizer state is spread over ranks; zero2: gradients too; zero3: parameters too."""

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
        self._topology, self._precision = topology, precision
        self.module = module
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self._parameters = dict(module.named_parameters())
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
        self._ranges = _Stage3(self._optimizer, topology) if stage == 3 else _Stage12(self._optimizer)
        self._adam: Any = self._optimizer.optimizer
        for flat in self._ranges.flats:
            self._adam.state[flat] = fresh_state(flat)
        self._fragments = {name: self._ranges.fragment(p) for name, p in self._parameters.items()}
        self._mesh = init_device_mesh(topology.device.type, (topology.world_size,), mesh_dim_names=("shard",))
        self._last = True

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 arithmetic over fp32 parameters, or nothing."""
        return torch.autocast(self._topology.device.type, torch.bfloat16, enabled=self._precision == "bf16")

    def begin(self, last: bool) -> None:
        """Before each micro-batch's forward. DeepSpeed counts micro-batches by itself."""
        self._last = last

    def backward(self, loss: Tensor) -> None:
        """`loss`: the mean over this micro-batch, undivided."""
        self.model.backward(loss)
        if not self._last:
            self.model.step()  # no update: it counts the micro-batch

    def step(self, learning_rate: float, max_norm: float) -> tuple[bool, Tensor]:
        """Clip, check and apply. Returns (applied, global gradient norm before clipping); see TorchEngine.step.

        `max_norm` is DeepSpeed's since the beginning of the run.
        """
        set_learning_rate(self._adam, learning_rate)
        self.model.step()
        applied = not self._optimizer.overflow
        norm = self.model.get_global_grad_norm() if applied else math.inf
        return applied, torch.as_tensor(norm, dtype=torch.float32, device=self._topology.device)

    def local_weights(self) -> dict[str, Tensor]:
        """This rank's range of every trained parameter's fp32 master copy, by name, flat; views, not copies."""
        return {name: fragment.master for name, fragment in self._fragments.items()}

    def weights_changed(self) -> None:
        """The working copies from the master copies, after somebody wrote to `local_weights`."""
        self._ranges.publish()

    def like_weights(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Local parts laid out as `local_weights`, as tensors that a checkpoint can reshard: copies. Collective."""
        return {name: self._whole(name, local[name]) for name in self._fragments}

    def unlike_weights(self, tensors: dict[str, Tensor], local: dict[str, Tensor]) -> None:
        """Back into `local` what `like_weights(local)` returned and a load has filled. Collective."""
        for name, fragment in self._fragments.items():
            sharded = tensors[name]
            assert isinstance(sharded, DTensor)
            local[name].copy_(sharded.full_tensor().flatten()[fragment.start :][: local[name].numel()])

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, persistent buffers and optimizer moments under the model's own names: parameters and moments are
        copies, which `load_tensors` takes back. Collective."""
        named = {f"model.{name}": buffer for name, buffer in self._buffers()}
        for prefix, local in self._spread():
            named |= {f"{prefix}{name}": tensor for name, tensor in self.like_weights(local).items()}
        return named

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Back into the engine what `tensors()` returned and a load has filled. Collective."""
        for prefix, local in self._spread():
            self.unlike_weights({name: tensors[f"{prefix}{name}"] for name in local}, local)
        self.weights_changed()

    def counters(self) -> dict[str, Any]:
        """Adam's step count, the same for every parameter."""
        return {"optimizer_steps": int(self._adam.state[self._ranges.flats[0]]["step"])}

    def load_counters(self, counters: dict[str, Any]) -> None:
        for flat in self._ranges.flats:
            self._adam.state[flat]["step"].fill_(counters["optimizer_steps"])

    def bytes_here(self) -> dict[str, int]:
        """Bytes this rank holds between steps; `master` is ZeRO's second copy of the weights."""
        moments = [self._adam.state[flat][moment] for flat in self._ranges.flats for moment in MOMENTS]
        held = {"parameters": self._ranges.working_copies(self._parameters.values()), "optimizer": moments}
        held["master"] = self._ranges.flats
        return {what: sum(t.numel() * t.element_size() for t in tensors) for what, tensors in held.items()}

    def _spread(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(prefix of the names in a checkpoint, this rank's ranges) of the weights and of either moment."""
        yield "model.", self.local_weights()
        for moment in MOMENTS:
            yield f"optimizer.{moment}.", {name: getattr(f, moment) for name, f in self._fragments.items()}

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in self.module.state_dict().items() if name not in self._parameters)

    def _whole(self, name: str, local: Tensor) -> Tensor:
        """The whole tensor out of all ranks' ranges; this rank keeps its rows of it."""
        whole = torch.zeros(self._shapes[name].numel(), dtype=local.dtype, device=local.device)
        start = self._fragments[name].start
        whole[start : start + local.numel()] = local
        whole = self._topology.all_reduce_(whole).view(self._shapes[name])
        rows = whole.chunk(self._topology.world_size)
        mine = rows[self._topology.rank] if self._topology.rank < len(rows) else whole[:0]
        return DTensor.from_local(mine.clone(), self._mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())


class _Stage12:
    """Where DeepSpeed's stages 1 and 2 keep a rank's ranges: one flat tensor per parameter group."""

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self.flats: list[Tensor] = list(optimizer.single_partition_of_fp32_groups)

    def fragment(self, parameter: Any) -> Fragment:
        mapping = parameter._hp_mapping
        if mapping is None:  # all of it is on other ranks
            return Fragment(0, *(self.flats[0].detach()[:0] for _ in range(3)))
        where, flat = mapping.hp_fragment_address, self.flats[mapping.param_group_index]
        return _fragment(self._optimizer, flat, mapping.lp_fragment_address.start, where.start, where.numel)

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def working_copies(self, parameters: Any) -> list[Tensor]:
        return list(parameters)


class _Stage3:
    """Where stage 3 keeps them: parameter after parameter, each cut into equal padded parts, in one flat tensor per
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
        self._optimizer._partition_all_parameters()  # what a forward without a backward left gathered is stale
        for group in range(len(self.flats)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def working_copies(self, parameters: Any) -> list[Tensor]:
        return [parameter.ds_tensor for parameter in parameters]


def _fragment(optimizer: Any, flat: Tensor, start: int, offset: int, count: int) -> Fragment:
    state = optimizer.optimizer.state[flat]
    parts = (t.detach().narrow(0, offset, count) for t in (flat, *(state[moment] for moment in MOMENTS)))
    return Fragment(start, *parts)


def _config(stage: int, precision: str, accumulation: int, max_norm: float) -> dict[str, Any]:
    """DeepSpeed's config out of ours."""
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,  # what a rank holds is its share, small tensors included
    }
    return {
        "train_micro_batch_size_per_gpu": 1,  # read by DeepSpeed's own timers only
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's own AdamW
        "zero_force_ds_cpu_optimizer": False,
        # As under the other strategies: fp32 weights and gradients, bf16 arithmetic.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 1 << 30,
    }


def _import_deepspeed(topology: Topology) -> Any:
    """The library, told to use the process group that is there. Raises ValueError where it is not installed."""
    if topology.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("LOCAL_RANK", str(topology.local_rank))  # it insists, even without a launcher
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops
    except ImportError as error:
        raise ValueError(
            f"strategy={topology.strategy} needs DeepSpeed, which cannot be imported here ({error}): "
            "pip install deepspeed"
        ) from error
    if topology.device.type == "cpu":  # an op that it would compile on import, for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=False
    )
    return deepspeed
