"""How fast the devices compute, and where a step's time goes.

In: FLOPs of a training step per image, images per second.  Out: `tflops_per_second` of each device and `mfu` (model
FLOPs utilisation, Chowdhery et al. 2022, appendix B: recomputed FLOPs do not count); a profiler's trace of a few steps.
"""

import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from vqscale.files import write_atomically
from vqscale.topology import Topology

log = logging.getLogger("vqscale")

# TFLOP/s without sparsity, from NVIDIA's data sheets (tensor cores accumulate in fp32; "fp32" is without tensor cores):
# H100, H200, GH200, A100, L40S, V100, and the white papers of the Ada (RTX 4090) and Ampere GA102 (RTX 3090) GPUs.
# Whole names, so that a MIG slice or a laptop's GPU is not taken for the card.
_PEAKS: dict[str, dict[str, float]] = {
    r"NVIDIA (H100 \d+GB HBM3|H200|GH200 .*)": {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9},
    r"NVIDIA H100 PCIe": {"bf16": 756.0, "tf32": 378.0, "fp32": 51.0},
    r"NVIDIA (H100|H200) NVL": {"bf16": 835.5, "tf32": 417.5, "fp32": 60.0},
    r"NVIDIA A100(-| ).*": {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5},
    r"NVIDIA L40S": {"bf16": 362.0, "tf32": 183.0, "fp32": 91.6},
    r"Tesla V100-SXM2-\d+GB": {"fp32": 15.7},
    r"NVIDIA GeForce RTX 4090": {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6},
    r"NVIDIA GeForce RTX 3090": {"bf16": 71.0, "tf32": 35.6, "fp32": 35.6},
}
_WAIT, _WARMUP, _ACTIVE = 1, 1, 3  # steps: not traced, traced for the profiler's own start-up, kept


def device_name(device: torch.device) -> str:
    """The card's name as its driver has it; `cpu` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def known_peak(name: str, precision: str) -> float:
    """Dense peak in TFLOP/s of the device with this name; 0 where it is not known."""
    if "MIG" in name:
        return 0.0
    return next((peaks.get(precision, 0.0) for pattern, peaks in _PEAKS.items() if re.fullmatch(pattern, name)), 0.0)


class ComputeRate:
    """Turns images per second into FLOPs per second of one device."""

    def __init__(self, flops_per_image: int, topology: Topology, precision: str, peak_tflops: float):
        """flops_per_image: of forward and backward; 0 = unknown. peak_tflops: of a device; 0 = from the table."""
        name = device_name(topology.device)
        self._tflop_per_image = flops_per_image / topology.world_size / 1e12
        self._peak = peak_tflops or known_peak(name, precision)
        if topology.device.type == "cuda" and not self._peak:
            log.info("mfu is left out: the peak of %s in %s is not known; peak_tflops= tells it", name, precision)

    def extend(self, figures: Mapping[str, float]) -> dict[str, float]:
        """`figures`, which have `images_per_second` over all ranks, with `tflops_per_second` and `mfu`."""
        if not self._tflop_per_image:
            return dict(figures)
        rate = figures["images_per_second"] * self._tflop_per_image
        return {**figures, "tflops_per_second": rate} | ({"mfu": rate / self._peak} if self._peak else {})


class StepTrace:
    """A trace of a few steps of rank 0, once in a run, as <folder>/<images seen>-rank0.json.gz for Perfetto.

    The step that begins at `at` images, or the first one after, is followed by a warm-up step and those that are kept.
    A run that begins beyond `at` writes none.
    """

    def __init__(self, folder: Path, topology: Topology, at: int, images_seen: int):
        """`at`: images seen; 0 = no trace."""
        self._folder, self._at = folder, at
        self._waits = topology.is_main and at > 0 and images_seen <= at
        self._activities = [ProfilerActivity.CPU]
        if topology.device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profiler: Any = None
        self._images_seen = 0

    def before_step(self, images_seen: int) -> None:
        """Called before each step, with the images seen so far."""
        if self._profiler is not None:
            self._profiler.step()
        elif self._waits and images_seen >= self._at:
            self._waits, self._images_seen = False, images_seen
            plan = schedule(wait=_WAIT, warmup=_WARMUP, active=_ACTIVE, repeat=1)
            self._profiler = profile(activities=self._activities, schedule=plan, on_trace_ready=self._write)
            self._profiler.start()

    def close(self) -> None:
        """A run that ends during a trace writes the steps that it has."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: Any) -> None:
        path = self._folder / f"{self._images_seen:012d}-rank0.json.gz"
        try:
            with tempfile.TemporaryDirectory() as scratch:
                exported = Path(scratch) / path.name
                profiler.export_chrome_trace(str(exported))
                self._folder.mkdir(exist_ok=True)
                write_atomically(path, exported.read_bytes())
            log.info("a trace of %d steps: %s", _ACTIVE, path)
        except OSError as error:  # a full disk does not stop the run for a trace
            log.warning("%s: a trace is lost: %s", path, error.strerror)
