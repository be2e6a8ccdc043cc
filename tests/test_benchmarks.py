"""Every benchmark runs at its small size and writes finite numbers."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHORT = {
    "sampling": ["--minutes", "0.3", "--levels", "top", "bottom", "transformer_top", "transformer_bottom"],
    "codes": ["--rounds", "2"],
    "paper_step": ["--ranks", "2"],
    "priors": ["--images", "128"],
    "train_step": ["--rounds", "2"],
    "checkpoint": ["--rounds", "1"],
    "scale": ["--rounds", "1", "--steps", "2", "--worlds", "1", "2", "--strategies", "fsdp"],
}


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in _numbers(item)]
    return [] if value is None else [float(value)]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "measure"))
def test_a_benchmark_runs_and_writes_its_numbers(name: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--json", str(out), *SHORT[name]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    numbers = _numbers(json.loads(out.read_text()))
    assert numbers and all(math.isfinite(number) for number in numbers)
