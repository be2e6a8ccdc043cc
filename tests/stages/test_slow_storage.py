"""Training on storage that takes 20 ms for every read does not wait for data."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from support.stages import run_stage

from vqscale.engine.parallel import TorchEngine


@pytest.mark.slow
def test_reads_of_20_ms_are_hidden_behind_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_stage("pack", "pack", f"run_dir={tmp_path / 'pack'}") == 0
    pread, reads = os.pread, tmp_path / "reads"

    def slow(*arguments: int) -> bytes:  # inherited by the loader's worker, which is forked
        time.sleep(0.02)
        with reads.open("a") as file:
            file.write(".")
        return pread(*arguments)

    step = TorchEngine.step

    def long(*arguments: Any) -> Any:  # whatever the processor: 32 reads of 20 ms would take four times as long
        time.sleep(0.15)
        return step(*arguments)

    monkeypatch.setattr(os, "pread", slow)
    monkeypatch.setattr(TorchEngine, "step", long)
    sizes = ("total_images=640", "log_every=320", "evaluate_every=0", "save_every=0")
    data, run = f"data={tmp_path / 'pack'}", tmp_path / "train"
    assert run_stage("train_vqvae", "train_vqvae", f"run_dir={run}", data, "init_images=32", *sizes) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["images_seen"] == 640 and lines[-1]["data_wait_fraction"] < 0.05, lines
    seconds = 320 / lines[-1]["images_per_second"]
    assert reads.stat().st_size >= 640 and 320 * 0.02 > seconds, "read one at a time, images would have been waited for"
