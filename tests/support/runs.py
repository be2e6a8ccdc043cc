"""Run directories that no stage made."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from vqscale.files import write_json


def write_run(
    folder: Path,
    stage: str,
    *,
    scores: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    **config: Any,
) -> Path:
    """A run of 300 images that is done; `metrics.jsonl` has a line for each 100. config: what config.yaml has besides
    `seed` and `total_images`."""
    folder.mkdir(parents=True)
    lines = [{"images_seen": n, "loss": 100 / n, "reconstruction_mse": 50 / n} for n in (100, 200, 300)]
    lines += [{"images_seen": 300, "held_out/reconstruction_mse": 0.25, "images_per_second": 8.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"seed": 0, "total_images": 300, "run_dir": str(folder)} | config
    (folder / "config.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    command = {"stage": stage, "strategy": "single", "world_size": 1, "device": "cpu", "versions": {"torch": "2.0"}}
    write_json(folder / "command.json", command)
    here = {"host": socket.gethostname(), "pid": os.getpid()}
    write_json(folder / "status.json", {"state": "done", "images_seen": 300, "reason": "", **here})
    if scores is not None:
        write_json(folder / "scores.json", scores)
    if inputs is not None:
        write_json(folder / "inputs.json", inputs)
    return folder
