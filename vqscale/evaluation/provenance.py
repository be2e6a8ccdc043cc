"""Where inputs came from: run directories and data sets -> facts for the report.

In: paths.  Out: plain mappings; what is not there is left away.
"""

import json
from pathlib import Path
from typing import Any

from vqscale.data.shards import Manifest
from vqscale.files import read_json
from vqscale.runtime import read_status

_OF_COMMAND = ("argv", "strategy", "world_size", "device", "precision", "git_commit", "versions")


def about_run(path: Path, name: str, **facts: Any) -> dict[str, Any]:
    """What a run directory, or an exported folder, says of itself, beside what is known of it already."""
    command, status = read_json(path / "command.json"), read_status(path)
    found = {"name": name, "path": str(path), **facts}
    found.update({key.replace("_", " "): command[key] for key in _OF_COMMAND if command.get(key)})
    if status:
        found["state"] = status.get("state")
    config = path / "config.yaml"
    if config.is_file():
        found["config"] = config.read_text(errors="replace")
    return found


def about_data(folder: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    """What a data set says of itself; long parts of its description are left to dataset.json."""
    found: dict[str, Any] = {
        "name": name,
        "fingerprint": manifest.fingerprint,
        "kind": manifest.kind,
        "samples": manifest.num_samples,
        "shards": len(manifest.shards),
        "classes": len(manifest.classes),
        "transform": manifest.transform,
    }
    found.update({key: value for key, value in manifest.extra.items() if len(str(value)) < 400})
    return found


def metrics_of_run(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a torn line is passed over, and an exported model has none."""
    lines = []
    try:
        text = (path / "metrics.jsonl").read_text()
    except OSError:
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "images_seen" in value:
            lines.append(value)
    return lines
