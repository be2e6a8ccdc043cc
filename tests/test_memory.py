"""Memory that runs out: one line that names the batch, and a run that goes on from its last checkpoint."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from support.training import assert_bit_identical, config, saved, train

from vqscale import cli, runtime
from vqscale.config import StageConfig

OF_TORCH = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 79.10 GiB in all.")


@dataclass(frozen=True)
class DrawsConfig(StageConfig):
    batch_key: ClassVar[str] = "batch"

    device: str = "cpu"
    threads: int = 1
    batch: int = 48


def failure(settings: StageConfig, stage: str, error: BaseException) -> str:
    """What a run says that ends with this error; its status.json says the same."""
    with pytest.raises(ValueError) as caught, runtime.run(settings, stage):
        raise error
    assert caught.value.__cause__ is error  # for --debug and the log
    line = str(caught.value)
    status = json.loads((Path(settings.run_dir) / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", f"ValueError: {line}")
    return line


def test_a_batch_that_does_not_fit_is_named_with_the_plan_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train_prior", "my configs/train_prior_top.yaml", "strategy=single", "model.layers=9", "--debug"]
    monkeypatch.setattr(sys, "argv", ["vqscale", *words])
    asked = "out of memory on cpu (tried to allocate 2.50 GiB): micro_batch="
    remedy = "does not fit; a smaller one trains the same"
    plan = "vqscale plan 'my configs/train_prior_top.yaml' model.layers=9 world=1 strategy=single"
    settings = config(tmp_path / "run", global_batch=64, micro_batch=24)
    assert failure(settings, "train_prior", OF_TORCH) == (
        f"{asked}24 (16 images at a time) {remedy}; `{plan}` says what fits"
    )
    settings = config(tmp_path / "other", global_batch=64)
    assert failure(settings, "train_classifier", OF_TORCH) == f"{asked}0 (64 images at a time) {remedy}"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    ],
)
def test_every_kind_of_lack_is_told_alike(tmp_path: Path, error: Exception) -> None:
    line = failure(DrawsConfig(run_dir=str(tmp_path)), "sample", error)
    assert line.startswith("out of memory on cpu") and line.endswith(": batch=48 does not fit, choose a smaller one")
    assert "free memory" in failure(StageConfig(run_dir=str(tmp_path / "run"), device="cpu"), "pack", error)


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"), runtime.run(config(tmp_path), "train_vqvae"):
        raise RuntimeError("shapes do not match")


def test_every_stage_that_computes_names_its_batch() -> None:
    keys = {stage: cli.stage_module(stage).Config.batch_key for stage in cli.STAGES}
    trainers = dict.fromkeys(("train_vqvae", "train_prior", "train_classifier"), "micro_batch")
    others = {"pack": "", "index": "", "extract_codes": "block", "sample": "batch", "evaluate": "batch"}
    others["tune_sampling"] = "batch"
    assert keys == trainers | others


def test_the_last_checkpoint_is_safe(tmp_path: Path) -> None:
    def lack_memory(run: runtime.Run, images_seen: int) -> None:
        if images_seen == 72:
            raise OF_TORCH

    settings = config(tmp_path / "run")
    with pytest.raises(ValueError, match=r"micro_batch=0 \(8 images at a time\)"):
        train(settings, on_step=lack_memory)
    seen = {int(folder.name) for folder in (tmp_path / "run" / "checkpoints").glob("0*")}
    assert max(seen) == 64
    train(settings)
    train(config(tmp_path / "whole"))
    assert_bit_identical(saved(tmp_path / "run"), saved(tmp_path / "whole"))
