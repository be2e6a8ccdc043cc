import contextlib
import datetime
import os
import resource
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed import free_port, run_ranks, started

from vqscale.config import StageConfig
from vqscale.topology import (
    Topology,
    bring_up,
    check_launcher,
    cores,
    keep_freed_memory,
    record_flight,
    resolve_strategy,
    set_arithmetic,
    slower_than_asked,
    take_down,
)

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
FSDP = ACCELERATE | {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}
HSDP = FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}
ZERO2 = ACCELERATE | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
CPU = StageConfig(device="cpu", threads=1)


@pytest.mark.parametrize(
    ("asked", "launcher", "world", "strategy"),
    [
        ("", {}, 1, "single"),
        ("single", {}, 1, "single"),
        ("", ACCELERATE, 1, "single"),
        ("", {}, 2, "ddp"),
        ("", ACCELERATE, 2, "ddp"),
        ("ddp", ACCELERATE, 2, "ddp"),
        ("fsdp", {}, 2, "fsdp"),
        ("", FSDP, 2, "fsdp"),
        ("", HSDP, 4, "hsdp"),
        ("", FSDP | {"FSDP_SHARDING_STRATEGY": "4"}, 4, "hsdp"),
        ("", ZERO2, 2, "zero2"),
        ("zero3", {}, 1, "zero3"),
    ],
)
def test_strategy(asked: str, launcher: dict[str, str], world: int, strategy: str) -> None:
    assert resolve_strategy(asked, launcher | {"WORLD_SIZE": str(world)}) == strategy


@pytest.mark.parametrize(
    ("asked", "launcher", "world", "words"),
    [
        ("dpp", {}, 2, "strategy=dpp: there is no such strategy"),
        ("fsdp", ACCELERATE, 2, "strategy=fsdp, but the launcher says ddp"),
        ("ddp", HSDP, 4, "strategy=ddp, but the launcher says hsdp"),
        ("single", {}, 2, "strategy=single on 2 processes: it takes exactly 1"),
        ("ddp", {}, 1, "strategy=ddp on 1 process: it needs at least 2"),
        ("", FSDP, 1, "strategy=fsdp on 1 process: it needs at least 2"),
        ("", HSDP, 2, "strategy=hsdp on 2 processes: it needs at least 4"),
        ("", ZERO2, 1, "strategy=zero2 on 1 process: it needs at least 2 .*; if 1 is meant, say strategy=zero2"),
        ("", ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, 2, "the launcher asks for zero0"),
    ],
)
def test_what_was_asked_for_is_never_silently_less(
    asked: str, launcher: dict[str, str], world: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        resolve_strategy(asked, launcher | {"WORLD_SIZE": str(world)})


def test_one_process_is_a_group_of_one(topology: Topology) -> None:
    assert (topology.rank, topology.world_size, topology.nodes, topology.strategy) == (0, 1, 1, "single")
    assert topology.is_main and topology.engine == "torch" and dist.is_initialized()
    assert topology.all_reduce_(torch.tensor(3)) == 3 and topology.gather("x") == ["x"]


def _talk(shift: int) -> dict[str, object]:
    topology = bring_up(CPU)
    try:
        return {
            "ranks": (
                topology.rank,
                topology.world_size,
                topology.local_rank,
                topology.local_world_size,
                topology.nodes,
                topology.strategy,
            ),
            "sum": topology.all_reduce_(torch.tensor([topology.rank + shift])).tolist(),
            "from 1": topology.broadcast_(torch.tensor([topology.rank * 10]), 1).tolist(),
            "gathered": topology.gather(f"rank {topology.rank}"),
            "main": topology.is_main,
        }
    finally:
        take_down(orderly=True)


def test_two_ranks_talk() -> None:
    answers = run_ranks(_talk, 2, 100)
    assert [a["ranks"] for a in answers] == [(0, 2, 0, 2, 1, "ddp"), (1, 2, 1, 2, 1, "ddp")]
    assert [a["main"] for a in answers] == [True, False]
    for answer in answers:
        assert (answer["sum"], answer["from 1"]) == ([201], [10])
        assert answer["gathered"] == ["rank 0", "rank 1"]


RANK_1_OF_2 = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 in the environment, but no RANK, MASTER_ADDR, MASTER_PORT: start with torchrun",
        ),
        ({"RANK": "0"}, "RANK=0 in the environment, but no WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (RANK_1_OF_2 | {"MASTER_ADDR": ""}, "but no MASTER_ADDR: start with torchrun"),
        (RANK_1_OF_2 | {"RANK": "2"}, r"RANK=2 does not lie in 0 … 1 \(WORLD_SIZE=2\)"),
        (RANK_1_OF_2 | {"RANK": "-1"}, "RANK=-1 does not lie in"),
        (RANK_1_OF_2 | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, r"LOCAL_RANK=2 .* \(LOCAL_WORLD_SIZE=2\)"),
        (RANK_1_OF_2 | {"RANK": "one"}, "RANK=one in the environment is not a whole number: start with torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is not a whole number"),
    ],
)
def test_half_an_environment_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        bring_up(CPU)
    assert not dist.is_initialized()


@dataclass(frozen=True)
class Trains(StageConfig):
    precision: str = "fp32"
    max_norm: float = 1.0
    compile: bool = False


@pytest.mark.parametrize(
    ("changes", "variables", "words"),
    [
        ({}, {}, ""),
        ({}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "precision=fp32, but the launcher says mixed_precision=bf16"),
        ({"precision": "bf16"}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, ""),
        ({"precision": "bf16"}, {"ACCELERATE_MIXED_PRECISION": "no"}, ""),
        (
            {},
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "GRADIENT_ACCUMULATION_STEPS=4.*follows from global_batch",
        ),
        ({}, {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "max_norm=1.0, but the launcher says gradient_clipping=0.5"),
        ({}, {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, ""),
        ({}, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR.*use compile=true"),
        ({"compile": True}, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ""),
        ({}, {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "True"}, ""),
        ({}, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "ACCELERATE_DEEPSPEED_CONFIG_FILE=ds.json"),
        ({}, {"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=true.*offloading is not supported"),
        ({}, {"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, "FSDP_SHARDING_STRATEGY=SHARD_GRAD_OP"),
        ({}, HSDP, ""),
    ],
)
def test_settings_of_the_launcher_are_obeyed_or_refused(
    changes: dict[str, Any], variables: dict[str, str], words: str
) -> None:
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        check_launcher(replace(Trains(), **changes), ACCELERATE | variables)


def test_a_launcher_that_says_cpu_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="device=cuda, but the launcher says use_cpu"):
        bring_up(StageConfig(device="cuda"))
    topology = bring_up(StageConfig(threads=1))
    take_down(orderly=True)
    assert topology.device.type == "cpu"


def _fail_without_words() -> None:
    raise OSError


def test_an_error_of_rank_0_is_raised_even_without_words() -> None:
    topology = bring_up(CPU)
    try:
        assert topology.on_main(lambda: "") == "" and topology.on_main(lambda: None) is None
        with pytest.raises(ValueError):
            topology.on_main(_fail_without_words)
    finally:
        take_down(orderly=True)


def test_tf32_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="precision=tf32 needs a GPU"):
        bring_up(Trains(device="cpu", precision="tf32"))


@pytest.mark.parametrize(
    "config", [Trains(device="cpu"), StageConfig(device="cpu"), Trains(device="cpu", precision="bf16")]
)
def test_fp32_products_are_true_ones_unless_a_config_asks_for_tf32(config: StageConfig) -> None:
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
    bring_up(config)
    take_down(orderly=True)
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_asks_every_library_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_arithmetic("fp32", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        set_arithmetic("fp32", deterministic=False)


@pytest.mark.parametrize(("launched", "threads"), [(False, 3), (True, cores())])
def test_threads_that_the_user_exports_count_and_those_of_a_launcher_do_not(
    monkeypatch: pytest.MonkeyPatch, launched: bool, threads: int
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("vqscale.topology.die_with_parent", lambda: None)
    try:
        bring_up(StageConfig(device="cpu"))
        assert torch.get_num_threads() == threads
    finally:
        take_down(orderly=True)
        torch.set_num_threads(before)


def test_a_rank_that_waits_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("vqscale.topology.SLOW_SECONDS", 0.05)
    monkeypatch.setattr("vqscale.topology.GROUP_TIMEOUT", datetime.timedelta(seconds=2))
    for name, value in (RANK_1_OF_2 | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("vqscale.topology.die_with_parent", lambda: None)
    with pytest.raises(Exception, match="."):
        bring_up(CPU)
    assert "rank 1 waits for the other ranks (WORLD_SIZE=2) at 127.0.0.1:" in capsys.readouterr().err


def test_a_slurm_job_seen_in_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    with pytest.raises(ValueError, match="the Slurm job has 2 nodes, but this program sees 1 process"):
        bring_up(CPU)


@pytest.mark.parametrize(
    ("device", "local_rank", "gpus", "words"),
    [
        ("tpu", "0", 0, "device=tpu: choose from auto, cpu, cuda, mps"),
        ("cuda:7", "0", 1, "device=cuda:7: choose from auto, cpu, cuda, mps"),
        ("cuda", "0", 0, f"device=cuda, but torch {torch.__version__} sees no GPU here".replace("+", r"\+")),
        ("auto", "3", 2, "LOCAL_RANK=3, but the GPUs that torch sees here are 2: start fewer processes"),
    ],
)
def test_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, device: str, local_rank: str, gpus: int, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in (RANK_1_OF_2 | {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        bring_up(StageConfig(device=device))
    assert not dist.is_initialized()


def test_what_is_slower_than_asked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("vqscale.topology._GPU_DRIVER", Path("/dev/null"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (line,) = slower_than_asked(StageConfig(), cpu)
    assert line.startswith("device=auto is the CPU: this machine has a GPU, but torch")
    assert slower_than_asked(CPU, cpu) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slower_than_asked(StageConfig(), cpu) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    for capability, precision, lines in (((7, 5), "bf16", 1), ((7, 5), "fp32", 0), ((8, 0), "tf32", 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert len(slower_than_asked(Trains(precision=precision), gpu)) == lines, (capability, precision)


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        bring_up(StageConfig(device="cpu", threads=3))
        assert torch.get_num_threads() == 3
    finally:
        take_down(orderly=True)
        torch.set_num_threads(before)


def _faults_of_reuse() -> tuple[int, int]:
    """Page faults of ten large tensors, one after the other, before and after freed memory is kept."""

    def faults() -> int:
        for _ in range(2):  # the heap grows for the first, 64 MiB, and may once more to align the second
            torch.ones(1 << 24)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(1 << 24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    first = faults()
    keep_freed_memory()
    return first, faults()


def test_freed_memory_is_kept() -> None:
    ((before, after),) = run_ranks(_faults_of_reuse, 1)
    assert after < before / 10


def _outlive_the_launcher(pid_file: str, port: str) -> None:
    """A launcher that starts one rank and is killed."""
    child = os.fork()
    if child == 0:
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        bring_up(CPU)
        with open(pid_file, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    time.sleep(600)


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with started(_outlive_the_launcher, 1, str(pid_file), str(free_port())) as launcher:
        until = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        rank = int(pid_file.read_text())
        os.kill(rank, 0)
        launcher.signal(signal.SIGKILL)
        until = time.monotonic() + 10
        while time.monotonic() < until and _runs(rank):
            time.sleep(0.02)
        assert not _runs(rank)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_port_in_use_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        job = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in job.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(OSError, match=f"port {port} of this machine is in use, .*: choose another port"):
            bring_up(CPU)
    assert not dist.is_initialized()


def _meet(run_dir: str) -> list[int]:
    topology = bring_up(StageConfig(device="cpu", threads=1, run_dir=run_dir))
    pids = topology.gather(os.getpid())
    take_down(orderly=True)
    return pids


def test_two_jobs_that_meet_on_one_port_do_not_mix() -> None:
    """Both jobs' ranks use one store, as where a second job is sent to the port of a first one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with started(_meet, 2, "one", variables=shared) as one, started(_meet, 2, "other", variables=shared) as other:
        assert one.results() == [one.pids] * 2
        assert other.results() == [other.pids] * 2


def test_nccl_remembers_its_last_collectives_unless_the_user_said_otherwise(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    record_flight(tmp_path, environment)
    assert environment == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/log/nccl-",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    mine = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_FR_DUMP_TEMP_FILE": "/x", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    asked = dict(mine)
    record_flight(tmp_path, asked)
    assert asked == mine
