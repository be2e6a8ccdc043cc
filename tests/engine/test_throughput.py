"""TFLOP/s and MFU of a device, and the trace of a few steps."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.training import config, metrics, train

from vqscale.engine.throughput import ComputeRate, known_peak
from vqscale.topology import Topology


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H200", "tf32", 494.7),
        ("NVIDIA H100 PCIe", "fp32", 51.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "bf16", 312.0),
        ("NVIDIA H100 80GB HBM3", "fp64", 0.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", 0.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", 0.0),
        ("Tesla V100-SXM2-32GB", "bf16", 0.0),
        ("cpu", "fp32", 0.0),
    ],
)
def test_peaks_are_those_of_whole_cards(name: str, precision: str, peak: float) -> None:
    assert known_peak(name, precision) == peak


def test_a_rate_is_per_device_and_mfu_needs_a_peak() -> None:
    topology = Topology(0, 4, 0, 4, 1, "ddp", torch.device("cpu"))
    figures = {"images_per_second": 200.0, "data_wait_fraction": 0.0}
    with_rate = figures | {"tflops_per_second": 100.0}
    assert ComputeRate(2 * 10**12, topology, "bf16", 0.0).extend(figures) == with_rate
    assert ComputeRate(2 * 10**12, topology, "bf16", 400.0).extend(figures) == with_rate | {"mfu": 0.25}
    assert ComputeRate(0, topology, "bf16", 400.0).extend(figures) == figures


def traced(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The events of each trace by file name."""
    files = sorted((run_dir / "profile").glob("*"))
    return {path.name: json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] for path in files}


def test_a_trace_has_the_operations_of_a_few_steps(tmp_path: Path) -> None:
    run_ranks(train, 2, config(tmp_path, profile_at=20))  # steps of 8 images
    ((name, events),) = traced(tmp_path).items()
    assert name == "000000000024-rank0.json.gz"
    names = [str(event.get("name")) for event in events]
    assert {name for name in names if name.startswith("ProfilerStep")} == {f"ProfilerStep#{n}" for n in (2, 3, 4)}
    products = [event for event in events if event.get("name") == "aten::addmm"]
    assert len(products) == 3 * 3, "three linear layers in each of three steps"
    assert any("AddmmBackward" in name for name in names) and any("adamw" in name.lower() for name in names)
    assert len(metrics(tmp_path)) == 20


@pytest.mark.parametrize(("first", "kept"), [(16, ["000000000032-rank0.json.gz"]), (64, []), (48, [])])
def test_a_resumed_run_traces_only_what_lies_ahead(tmp_path: Path, first: int, kept: list[str]) -> None:
    run_ranks(train, 1, config(tmp_path, total_images=first))
    run_ranks(train, 1, config(tmp_path, profile_at=32))
    assert list(traced(tmp_path)) == kept


def test_a_run_that_ends_first_keeps_the_steps_that_it_has(tmp_path: Path) -> None:
    run_ranks(train, 1, config(tmp_path, total_images=64, profile_at=32))
    ((_, events),) = traced(tmp_path).items()
    assert len([event for event in events if event.get("name") == "aten::addmm"]) == 2 * 3
