"""`vqscale doctor`: the page, what it advises, and that no probe can stop it."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vqscale import cli
from vqscale.stages import doctor
from vqscale.stages.doctor import DoctorConfig, Finding

SECTIONS = ["versions", "devices", "machine", "limits", "storage", "slurm", "environment", "to look at"]


def page(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["doctor", "megabytes=1", *words]) == 0
    return capsys.readouterr().out


def only(probe: Callable[[DoctorConfig], Iterator[Finding]], **config: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.look(probe, DoctorConfig(megabytes=1, **config))}


def test_one_page_of_plain_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = page(capsys, f"path={tmp_path}")
    assert [line for line in text.splitlines() if line and not line.startswith(" ")] == SECTIONS
    names = {line.split("  ")[1] for line in text.splitlines() if line.startswith("  ")}
    assert {"vqscale", "python", "torch", "deepspeed", "accelerate", "webdataset", "CUDA of torch", "cuDNN"} <= names
    assert {"NCCL", "driver", "cores", "memory", "/dev/shm", "open files", "locked memory"} <= names
    assert {"write", "read", "file locks", "commands", "inside a job", "ranks"} <= names
    assert text.isprintable() or text.replace("\n", "").isprintable()
    assert list(tmp_path.iterdir()) == [], "the file that was written is gone"


def test_no_secret_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "NCCL_TOKEN", "ACCELERATE_SECRET", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "swordfish")
    monkeypatch.setenv("NCCL_PROXY", "https://me:swordfish@proxy/?token=swordfish")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    text = page(capsys)
    assert "swordfish" not in text and "WANDB" not in text
    assert "  OMP_NUM_THREADS    3\n" in text and "  NCCL_TOKEN         ***\n" in text


def test_what_looks_wrong_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda kind: (256, 256))
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name == "sbatch" else None)
    usage = SimpleNamespace(total=64 << 20, free=1 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    advice = page(capsys).split("to look at\n")[1]
    for line in (
        "NCCL_P2P_DISABLE (1): traffic between GPUs of a node",
        "ranks (RANK=0, WORLD_SIZE=2 in the environment, but no MASTER_ADDR",
        "open files (256): loaders and caches keep shards open: ulimit -n 65536",
        "/dev/shm (0.00 of 0.06 GiB free): loaders pass batches through it",
        "load (99.0): other programs compute here",
        "commands (sbatch): slurm/*.sh and status use srun, squeue",
        "free (0.0 GiB): the next checkpoint may not fit",
    ):
        assert f"  {line}" in advice


def test_a_probe_that_fails_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = page(capsys, f"path={tmp_path / 'gone'}")
    assert "  storage            FileNotFoundError: " in text and "  slurm" not in text.split("storage")[0]
    assert "this could not be found out" in text.split("to look at\n")[1]
    assert "commands" in text, "the sections behind it are there"


def test_a_probe_that_hangs_is_left() -> None:
    def hangs(config: DoctorConfig) -> Iterator[Finding]:
        yield Finding("before", 1)
        time.sleep(60)

    findings = only(hangs, seconds=0.2)
    assert findings["before"].value == 1 and findings["hangs"].value == "no answer within 0.2 s"


@pytest.mark.parametrize(
    ("flock", "value"), [(lambda file, how: None, "granted twice"), (None, "refused: [Errno 37] No locks available")]
)
def test_storage_without_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flock: Any, value: str) -> None:
    def refuse(file: Any, how: int) -> None:
        raise OSError(37, "No locks available")

    assert only(doctor._storage, path=str(tmp_path))["file locks"] == Finding("file locks", "work")
    monkeypatch.setattr(fcntl, "flock", flock or refuse)
    lock = only(doctor._storage, path=str(tmp_path))["file locks"]
    assert lock.value == value and "cache_dir= must be elsewhere" in lock.advice


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    findings = only(doctor._devices)
    assert findings["driver"].value == "580.1" and "torch cannot use it" in findings["GPU"].advice


def test_slurm_that_is_not_configured_is_one_short_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: error: Unknown host\nsbatch: fatal: No configuration' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    assert only(doctor._slurm)["version"] == Finding(
        "version", "sbatch failed: fatal: No configuration", "Slurm is not configured here"
    )


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="Tesla T4", total_memory=16 << 30, major=7, minor=5)
    for name, value in {"is_available": True, "device_count": 1, "get_device_properties": gpu}.items():
        monkeypatch.setattr(doctor.torch.cuda, name, lambda *_, value=value: value)
    assert only(doctor._devices)["cuda:0"] == Finding(
        "cuda:0", "Tesla T4, 16.0 GiB, 7.5", "no bf16 here: precision=fp32"
    )
