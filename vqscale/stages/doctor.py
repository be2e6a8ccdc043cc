"""This machine -> one page of plain text for an issue: versions, devices, limits, storage, Slurm, environment.

Every line is looked up on its own: what cannot be found out says why, and nothing waits longer than some seconds. What
looks wrong stands at the end, with what to do. No secret is printed: only variables of a fixed list of prefixes are.
"""

import fcntl
import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vqscale.config import Request, read_request
from vqscale.fields import PathText, PositiveFloat, PositiveInt
from vqscale.text import HIDDEN, one_line
from vqscale.topology import cores, launched_ranks
from vqscale.versions import LIBRARIES, versions

USAGE = "[path=DIR] [key=value ...]"
_GIB, _MIB = 1 << 30, 1 << 20
_SLURM = ("sbatch", "srun", "squeue", "sacct", "scontrol", "scancel")
_VARIABLES = re.compile(
    r"(NCCL|GLOO|OMP|GOMP|MKL|KMP|CUDA|TORCH|PYTORCH|TORCHELASTIC|MASTER|ACCELERATE|FSDP|UCX|FI)_\w+|(LOCAL_)?(RANK|WORLD_SIZE)"
    r"|TMPDIR|SLURM_(JOB_ID|NNODES|NTASKS|PROCID|CPUS_PER_TASK|GPUS_ON_NODE)"
)
_SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_SLOW = {"NCCL_P2P_DISABLE": "GPUs of a node", "NCCL_SHM_DISABLE": "GPUs of a node", "NCCL_IB_DISABLE": "nodes"}


@dataclass(frozen=True)
class DoctorConfig:
    """Where storage is tried, and for how long."""

    path: PathText = "."  # a folder on the storage that data or runs are on
    megabytes: PositiveInt = 64  # MiB of the file that is written there, read, and removed
    seconds: PositiveFloat = 20.0  # that each section may take


Config = DoctorConfig


@dataclass(frozen=True)
class Finding:
    """A line of the page; `advice`: what to do, where it looks wrong."""

    name: str
    value: object
    advice: str = ""


def load(words: Sequence[str]) -> Request[DoctorConfig]:
    """From `[path=DIR] key=value …`; see `read_request`."""
    return read_request(DoctorConfig, words, f"doctor {USAGE}", paths=0)


def main(request: Request[DoctorConfig]) -> None:
    """Print the page."""
    print("\n".join(page(request.config)))


def page(config: DoctorConfig) -> list[str]:
    """Lines of the page: a section for each probe, then what looks wrong."""
    lines, advice = list[str](), list[str]()
    for probe in PROBES:
        findings = look(probe, config)
        lines += [probe.__name__.strip("_"), *(f"  {one.name:<18} {one_line(one.value)}" for one in findings), ""]
        advice += [f"  {one.name} ({one_line(one.value)}): {one.advice}" for one in findings if one.advice]
    return [*lines, "to look at", *(advice or ["  nothing looks wrong"])]


def look(probe: Callable[[DoctorConfig], Iterator[Finding]], config: DoctorConfig) -> list[Finding]:
    """What the probe finds until it fails or its time is over; then the last line says so."""
    findings, title = list[Finding](), probe.__name__.strip("_")

    def collect() -> None:
        try:
            for one in probe(config):
                findings.append(one)
        except Exception as error:
            findings.append(Finding(title, f"{type(error).__name__}: {error}", "this could not be found out"))

    thread = threading.Thread(target=collect, name=title, daemon=True)  # storage that is gone never answers
    thread.start()
    thread.join(config.seconds)
    if thread.is_alive():
        return [*findings, Finding(title, f"no answer within {config.seconds:g} s", "it hangs, and may do so in a run")]
    return findings


def _versions(_config: DoctorConfig) -> Iterator[Finding]:
    yield Finding("system", platform.platform())
    installed = versions()
    yield from (Finding(name, installed.get(name, "not installed")) for name in ("python", *LIBRARIES))
    yield Finding("CUDA of torch", torch.version.cuda or "none")
    yield Finding("cuDNN", torch.backends.cudnn.version() or "none")
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    yield Finding("NCCL", ".".join(map(str, nccl)) or "none")


def _devices(_config: DoctorConfig) -> Iterator[Finding]:
    driver = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(number):
        gpu = torch.cuda.get_device_properties(index)
        old = "no bf16 here: precision=fp32" if gpu.major < 8 else ""
        yield Finding(f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / _GIB:.1f} GiB, {gpu.major}.{gpu.minor}", old)
    if torch.backends.mps.is_available():
        yield Finding("mps", "Apple's GPU: device=mps")
    elif not number:
        blind = "torch cannot use it: a torch built for its driver's CUDA, and CUDA_VISIBLE_DEVICES not empty"
        yield Finding("GPU", "torch sees none", blind if driver[:1].isdigit() else "")
    yield Finding("driver", ", ".join(sorted(set(driver.splitlines()))))


def _machine(_config: DoctorConfig) -> Iterator[Finding]:
    usable, load_average = cores(), os.getloadavg()[0]
    few = "ranks and loaders share it: ask for more (--cpus-per-task)" if usable == 1 else ""
    yield Finding("cores", f"{usable} usable of {os.cpu_count()}", few)
    busy = "other programs compute here: give each its own cores, or fewer threads=" if load_average > usable else ""
    yield Finding("load", f"{load_average:.1f}", busy)
    page_size = os.sysconf("SC_PAGE_SIZE") / _GIB
    yield Finding("memory", f"{os.sysconf('SC_PHYS_PAGES') * page_size:.1f} GiB")
    if "SC_AVPHYS_PAGES" in os.sysconf_names:  # not on macOS
        yield Finding("free memory", f"{os.sysconf('SC_AVPHYS_PAGES') * page_size:.1f} GiB, not counting caches")
    limit = Path("/sys/fs/cgroup/memory.max")
    yield Finding("limit of cgroup", limit.read_text().strip() if limit.is_file() else "none found")


def _limits(_config: DoctorConfig) -> Iterator[Finding]:
    files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    few = "loaders and caches keep shards open: ulimit -n 65536" if 0 <= files < 4_096 else ""
    yield Finding("open files", _limit(files), few)
    pinned = Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY
    yield Finding("locked memory", _limit(locked), "InfiniBand needs it: ulimit -l unlimited" if pinned else "")
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm")
        few = "loaders pass batches through it: docker run --shm-size=16g, or workers=0" if shared.total < _GIB else ""
        yield Finding("/dev/shm", f"{shared.free / _GIB:.2f} of {shared.total / _GIB:.2f} GiB free", few)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _storage(config: DoctorConfig) -> Iterator[Finding]:
    folder = Path(config.path)
    yield Finding("folder", folder.resolve())
    free = shutil.disk_usage(folder).free / _GIB
    full = "the next checkpoint may not fit: keep_checkpoints=1, or other storage" if free < 10 else ""
    yield Finding("free", f"{free:.1f} GiB", full)
    data = os.urandom(_MIB)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".vqscale-doctor-", buffering=0) as file:
        written = _rate(config, lambda: file.write(data), lambda: os.fsync(file.fileno()))
        slow = "saves and reads wait for it: faster storage, or cache_dir= on this node" if written < 50 else ""
        yield Finding("write", f"{written:,.0f} MiB/s with fsync, {config.megabytes} MiB", slow)
        file.seek(0)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read = _rate(config, lambda: file.read(_MIB))
        yield Finding("read", f"{read:,.0f} MiB/s, from memory where the system keeps it")
        yield _lock(file.name)


def _rate(config: DoctorConfig, move: Callable[[], object], end: Callable[[], object] = lambda: None) -> float:
    """MiB/s of moving the file, a MiB with each call."""
    start = time.perf_counter()
    for _ in range(config.megabytes):
        move()
    end()
    return config.megabytes / (time.perf_counter() - start)


def _lock(path: str) -> Finding:
    advice = "a run directory here is guarded by heartbeats alone, and cache_dir= must be elsewhere: mount with locks"
    granted = 0
    with open(path, "r+b") as one, open(path, "r+b") as other:  # NFS locks only what is open for writing
        try:
            for file in (one, other):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                granted += 1
        except OSError as error:
            return Finding("file locks", "work") if granted else Finding("file locks", f"refused: {error}", advice)
    return Finding("file locks", "granted twice", advice)


def _slurm(_config: DoctorConfig) -> Iterator[Finding]:
    commands = [name for name in _SLURM if shutil.which(name)]
    missing = [name for name in _SLURM if name not in commands]
    some = f"slurm/*.sh and status use {', '.join(missing)} too: look at PATH" if commands and missing else ""
    yield Finding("commands", ", ".join(commands) or "none", some)
    if commands:
        version = _answer(commands[0], "--version")
        yield Finding("version", version, "" if version.startswith("slurm") else "Slurm is not configured here")
    yield Finding("inside a job", os.environ.get("SLURM_JOB_ID", "no"))


def _environment(_config: DoctorConfig) -> Iterator[Finding]:
    for name, value in sorted(os.environ.items()):
        if _VARIABLES.fullmatch(name):
            between = _SLOW.get(name) if value not in ("", "0") else None
            advice = f"traffic between {between} takes a slower path: unset it, unless it is needed" if between else ""
            yield Finding(name, HIDDEN if _SECRET.search(name) else value, advice)
    try:
        rank, world, *_ = launched_ranks()
        yield Finding("ranks", f"{rank} of {world}")
    except ValueError as error:
        yield Finding("ranks", error, "no stage starts like this")


def _answer(*command: str) -> str:
    """What a program prints, or why it does not: the last line of its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]} gives no answer: {error}"
    if done.returncode == 0:
        return done.stdout.strip()
    *_, reason = ["no message", *(done.stderr or done.stdout).strip().splitlines()]
    return f"{command[0]} failed: {reason.removeprefix(f'{command[0]}: ')}"


PROBES = (_versions, _devices, _machine, _limits, _storage, _slurm, _environment)
