"""Who runs: launcher variables -> ranks, strategy, device and the process group, asserted rather than assumed.

In: a stage's config and the environment that `accelerate launch` or `torchrun` set.  Out: one `Topology` per process.
"""

import contextlib
import ctypes
import datetime
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vqscale.config import DEVICES, STRATEGIES, StageConfig

# A process group of gloo that is garbage waits for its threads when it is collected, and a forked child does not have
# them: there the collector is to leave what the parent made.
os.register_at_fork(after_in_child=gc.freeze)

T = TypeVar("T")
GROUP_TIMEOUT = datetime.timedelta(minutes=30)
BACKGROUND = "background"  # what torch calls the group of collectives that run beside training's
SLOW_SECONDS = 20.0  # after which a rank says that it waits for the others
PARENT = "VQSCALE_PARENT"  # environment variable: the pid of the program with which a stage stops
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_GPU_DRIVER = Path("/dev/nvidiactl")
_AMPERE = (8, 0)  # compute capability from which GPUs multiply in bf16 and TF32
_START_WITH = "start with torchrun or accelerate launch, which set them all"
# Settings of `accelerate launch` that change what is computed: variable, values that change nothing, what to use here.
_LAUNCHER_SETTINGS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "1 auto none",
        "it follows from global_batch, micro_batch and the ranks",
    ),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "use compile=true"),
    "ACCELERATE_CPU_AFFINITY": ("0 false", "bind the ranks with numactl or Slurm"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "it is not supported"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "use one of launch/*.yaml"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none", "DeepSpeed is configured by the stage's own keys"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none", "offloading is not supported"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none", "offloading is not supported"),
    "FSDP_OFFLOAD_PARAMS": ("false", "offloading is not supported"),
    "FSDP_SHARDING_STRATEGY": ("full_shard 1 hybrid_shard 4", "use one of launch/*.yaml"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true full_shard hybrid_shard", "parameters are always resharded"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "use the model's own checkpointing key"),
}


def env_int(name: str, default: int) -> int:
    """Raises ValueError for a variable that is no whole number."""
    value = os.environ.get(name, "") or str(default)
    if not value.strip().lstrip("-").isdecimal():
        raise ValueError(f"{name}={value} in the environment is not a whole number: {_START_WITH}")
    return int(value)


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def under_launcher() -> bool:
    """Whether accelerate or torchrun started this process (they treat any exit code but 0 as a crash)."""
    return not {"TORCHELASTIC_RUN_ID", "RANK", "ACCELERATE_MIXED_PRECISION"}.isdisjoint(os.environ)


def launched_ranks() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size) that the launcher set.

    Raises ValueError for half an environment: ranks that would wait for others that were never started.
    """
    rank, world = env_int("RANK", 0), env_int("WORLD_SIZE", 1)
    local_rank, local_world = env_int("LOCAL_RANK", 0), env_int("LOCAL_WORLD_SIZE", world)
    if world == 1 and "RANK" not in os.environ:
        return rank, world, local_rank, local_world
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    if missing := [name for name, value in given.items() if not value]:
        there = ", ".join(f"{name}={value}" for name, value in given.items() if value)
        raise ValueError(f"{there} in the environment, but no {', '.join(missing)}: {_START_WITH}")
    for name, value, of, count in (
        ("RANK", rank, "WORLD_SIZE", world),
        ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world),
    ):
        if not 0 <= value < count:
            raise ValueError(f"{name}={value} does not lie in 0 … {count - 1} ({of}={count}): {_START_WITH}")
    return rank, world, local_rank, local_world


def check_launcher(config: StageConfig, environment: Mapping[str, str]) -> None:
    """Raises ValueError for a setting of `accelerate launch` that would not be obeyed, naming it and what to use."""
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return
    asked, precision = environment["ACCELERATE_MIXED_PRECISION"].lower(), getattr(config, "precision", "fp32")
    if asked not in ("no", precision):
        raise ValueError(
            f"precision={precision}, but the launcher says mixed_precision={asked}: give both the same value, "
            "or leave it out of the launcher"
        )
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "none").lower()
    if clipping not in ("none", "auto") and float(clipping) != getattr(config, "max_norm", None):
        raise ValueError(
            f"max_norm={getattr(config, 'max_norm', 'none')}, but the launcher says gradient_clipping={clipping}: "
            "leave it out of the launcher"
        )
    for name, (harmless, instead) in _LAUNCHER_SETTINGS.items():
        value = environment.get(name, "")
        compiles = name == "ACCELERATE_DYNAMO_BACKEND" and getattr(config, "compile", False)
        if value and value.lower() not in harmless.split() and not (compiles and value.lower() == "inductor"):
            raise ValueError(f"the launcher says {name}={value}, which is not obeyed here: leave it out; {instead}")


def launcher_strategy(environment: Mapping[str, str]) -> str:
    """The strategy that `accelerate launch` put into the environment, or "" where it says nothing.

    accelerate always sets ACCELERATE_MIXED_PRECISION; torchrun sets none of its variables.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return f"zero{environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '')}"
    if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        hybrid = environment.get("FSDP_SHARDING_STRATEGY", "").upper() in ("HYBRID_SHARD", "4")
        return "hsdp" if hybrid else "fsdp"
    if "ACCELERATE_MIXED_PRECISION" in environment:
        return "ddp" if int(environment.get("WORLD_SIZE", 1)) > 1 else "single"
    return ""


def resolve_strategy(asked: str, environment: Mapping[str, str]) -> str:
    """The strategy to run. Raises ValueError when it is unknown, disagrees with the launcher or has too few ranks."""
    world = int(environment.get("WORLD_SIZE", 1))
    launched = launcher_strategy(environment)
    if asked and asked not in STRATEGIES:
        raise ValueError(f"strategy={asked}: there is no such strategy; choose from {', '.join(STRATEGIES)}")
    if asked and launched and asked != launched:
        raise ValueError(f"strategy={asked}, but the launcher says {launched}: leave one of them out")
    strategy = asked or launched or ("ddp" if world > 1 else "single")
    if strategy not in STRATEGIES:
        raise ValueError(f"the launcher asks for {strategy}; the strategies are {', '.join(STRATEGIES)}")
    # ZeRO runs on one process too, but only where that was said: a launcher may have failed to bring the others.
    one_will_do = strategy == "single" or (strategy.startswith("zero") and bool(asked))
    least = 4 if strategy == "hsdp" else 2
    if (world < least and not one_will_do) or (world > 1 and strategy == "single"):
        raise ValueError(f"strategy={strategy} on {world} process{'es' * (world > 1)}: {_needs(strategy)}")
    return strategy


def _needs(strategy: str) -> str:
    least = {"single": "it takes exactly 1", "hsdp": "it needs at least 4"}
    two = "it needs at least 2 (accelerate launch --num_processes N, or torchrun --nproc-per-node N)"
    if strategy.startswith("zero"):
        two += f"; if 1 is meant, say strategy={strategy}"
    return least.get(strategy, two)


@dataclass(frozen=True)
class Topology:
    """This process among all ranks. `control` is a gloo group for flags and counts, apart from training's own."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    nodes: int
    strategy: str
    device: torch.device
    control: Any = field(repr=False, default=None)
    store: Any = field(repr=False, default=None)  # where the ranks met

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def engine(self) -> str:
        """`torch` or `deepspeed`."""
        return "deepspeed" if self.strategy.startswith("zero") else "torch"

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """`source`'s values on every rank, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, source)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """One (small, picklable) value per rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def first_text(self, text: str) -> str:
        """The first rank's text that is not empty, or "", the same on all ranks. Collective."""
        return next(filter(None, self.gather(text)), "")

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` gives on rank 0, which alone calls it, on every rank; picklable. Collective.

        Its ValueError or OSError is raised on every rank, as a ValueError.
        """
        result = [_attempt(action) if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(result, 0, group=self.control)
        return _raise_first(result)[0]

    def on_each(self, action: Callable[[], T]) -> list[T]:
        """What `action` gives on each rank, in rank order, on every rank; errors as in `on_main`. Collective."""
        return _raise_first(self.gather(_attempt(action)))

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.control)


ALONE = Topology(0, 1, 0, 1, 1, "single", torch.device("cpu"))  # a process that shares its work with no other


def _attempt(action: Callable[[], Any]) -> Any:
    """What it gives, or its ValueError or OSError as a ValueError."""
    try:
        return action()
    except (ValueError, OSError) as error:
        return ValueError(str(error))


def _raise_first(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, ValueError):
            raise result
    return results


def bring_up(config: StageConfig) -> Topology:
    """Start the process group and return this rank's topology. The group has one member without a launcher.

    Raises ValueError for a strategy that cannot run here, a missing GPU, or a Slurm job of which only a part is seen.
    """
    rank, world, local_rank, local_world = launched_ranks()
    strategy = resolve_strategy(config.strategy, os.environ)
    check_launcher(config, os.environ)
    nodes = env_int("GROUP_WORLD_SIZE", -(-world // local_world))
    if world < (asked := env_int("SLURM_JOB_NUM_NODES", 1)):
        raise ValueError(f"the Slurm job has {asked} nodes, but this program sees {world} process: start it with srun")
    device = device_of("cpu" if config.device == "mps" and config.needs_float64 else config.device)
    precision = getattr(config, "precision", "")
    if device.type == "cpu" and precision == "tf32":
        raise ValueError("precision=tf32 needs a GPU; on a CPU choose fp32 or bf16")
    if device.type == "mps" and precision in ("tf32", "fp64"):
        raise ValueError(f"precision={precision} does not exist on device=mps: choose fp32 or bf16")
    set_arithmetic(precision, getattr(config, "deterministic", False))
    torch.set_num_threads(config.threads or _threads_of_user() or max(1, cores() // local_world))
    if device.type == "cpu":
        keep_freed_memory()
    if under_launcher():
        die_with_parent()
    on_gpu = device.type == "cuda"
    if on_gpu:
        record_flight(Path(config.run_dir), os.environ)
    with _said_if_slow(world, rank):
        store = _store(config.run_dir)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=GROUP_TIMEOUT,
            store=store,
            rank=rank,
            world_size=world,
            device_id=device if on_gpu else None,
        )
    # Two groups, because collectives of one group must be issued in the same order everywhere.
    control = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    return Topology(rank, world, local_rank, local_world, nodes, strategy, device, control, store)


def background_group() -> Any:
    """A gloo group for collectives that run beside training's. Collective."""
    return dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT, group_desc=BACKGROUND)


def record_flight(run_dir: Path, environment: MutableMapping[str, str]) -> None:
    """Before the process group starts: NCCL remembers its last collectives, and writes them to `log/nccl-<rank>` of the
    run when one times out (`torchfrtrace` reads them). What the user has set stays, under older names too."""
    for name, older, value in (
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"),
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{run_dir.absolute() / 'log' / 'nccl-'}"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "", "1"),
    ):
        if older not in environment:
            environment.setdefault(name, value)


def _threads_of_user() -> int:
    """OMP_NUM_THREADS, unless a launcher set it: launchers set it to 1, which is far too few here."""
    count = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(count) if count.isdecimal() and not under_launcher() else 0


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(asked: str) -> torch.device:
    """`auto` is cuda where there is one, else the CPU. Raises ValueError for a device that cannot be used here."""
    if asked not in DEVICES:
        raise ValueError(f"device={asked}: choose from {', '.join(DEVICES)}")
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device=cuda, but torch {torch.__version__} sees no GPU here")
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        if asked in ("cuda", "mps"):
            raise ValueError(f"device={asked}, but the launcher says use_cpu: leave one of them out")
        asked = "cpu"
    if asked == "mps":
        return _apple_gpu()
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number, cards = env_int("LOCAL_RANK", 0), torch.cuda.device_count()
    if number >= cards:
        raise ValueError(f"LOCAL_RANK={number}, but the GPUs that torch sees here are {cards}: start fewer processes")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _apple_gpu() -> torch.device:
    if not torch.backends.mps.is_available():
        raise ValueError(f"device=mps, but torch {torch.__version__} sees no Apple GPU here")
    if (world := env_int("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"device=mps is for one process, not {world}: start without a launcher, or use device=cpu")
    return torch.device("mps")


def slower_than_asked(config: StageConfig, device: torch.device) -> list[str]:
    """Warnings: what this machine does more slowly than the config lets one expect."""
    precision, lines = getattr(config, "precision", ""), list[str]()
    if config.device == "mps" and device.type == "cpu":
        lines.append("device=mps lacks float64, in which this stage computes: it runs on the CPU")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    if config.device == "auto" and _GPU_DRIVER.exists() and not hidden and not torch.cuda.is_available():
        lines.append(f"device=auto is the CPU: this machine has a GPU, but torch {torch.__version__} cannot use it")
    if device.type == "cuda" and precision in ("bf16", "tf32") and torch.cuda.get_device_capability(device) < _AMPERE:
        name = torch.cuda.get_device_name(device)
        lines.append(f"precision={precision} is no faster than fp32 on {name}, which does not compute in it")
    return lines


def set_arithmetic(precision: str, deterministic: bool) -> None:
    """For the whole program. precision=tf32: TF32 for fp32 products and convolutions on a GPU, which is off otherwise,
    also where libraries have it on by default. deterministic: the same bits again, from slower kernels on a GPU."""
    backends: Any = torch.backends  # their stubs know half of it
    for backend in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)


def keep_freed_memory() -> None:
    """Let tensors reuse this process's memory: glibc gives that of large ones back at once, and the kernel clears every
    page anew for the next (`benchmarks/allocator.py`). Nothing happens where the C library is another."""
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def _said_if_slow(world: int, rank: int) -> Iterator[None]:
    """While the ranks look for each other, nothing can be logged yet."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    line = f"vqscale: rank {rank} waits for the other ranks (WORLD_SIZE={world}) at {where}: were all of them started?"
    timer = threading.Timer(SLOW_SECONDS, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _store(run_dir: str) -> dist.Store:
    """Where the ranks find each other. torchrun keeps one store over its restarts, in which the addresses of ranks that
    died would be found again: each attempt gets a part of its own, and so does each run, should two meet on one port.

    Raises OSError when the port is taken.
    """
    if "RANK" not in os.environ:
        return dist.HashStore()
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=GROUP_TIMEOUT))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise OSError(f"port {port} of this machine is in use, by another job perhaps: choose another port") from None
    attempt = env_int("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"{run_dir}-attempt-{attempt}", store)


def die_with_parent(parent: int = 0, number: signal.Signals = signal.SIGKILL) -> None:
    """A rank ends with its launcher (torchrun gives ranks sessions of their own, so they would train on as orphans), a
    loader's worker with its rank, whose pid it is given. Raises OSError if the parent has already ended.

    number: what this process gets when its parent ends.
    """
    was = parent or os.getppid()
    with contextlib.suppress(AttributeError):  # Linux alone has it
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != was or (not parent and was == 1 and not _is_python(1)):
        raise OSError("the process that started this one has ended")


def _is_python(pid: int) -> bool:
    """In a container the launcher may well be process 1, to which orphans go elsewhere."""
    try:
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def take_down(orderly: bool) -> None:
    """Leave the process group; ranks wait for each other only when all of them ended well."""
    if dist.is_initialized():
        if orderly and dist.get_world_size() > 1:
            dist.barrier()
        dist.destroy_process_group()
