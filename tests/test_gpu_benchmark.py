"""`make gpu` in its quick form on a CPU: every part runs by the code that a card runs, and what fails is one row."""

import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not a package
gpu, gpu_rows = importlib.import_module("gpu"), importlib.import_module("gpu_rows")
NEEDS_A_CARD = {"tests/passed", *(f"{model}/host synchronisations" for model in ("vqvae", "top", "bottom"))}
PORT = '''
from torch import nn

class VQVAE(nn.Module):
    """Stands in for the usual port: its interface alone."""

    def __init__(self, in_channel=3, channel=128, n_res_block=2, n_res_channel=32, embed_dim=64, n_embed=512):
        super().__init__()
        self.layer = nn.Conv2d(in_channel, in_channel, 1)

    def forward(self, img):
        return self.layer(img), self.layer.weight.square().mean()[None]
'''


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_and_only_a_card_s_rows_have_no_value(tmp_path: Path) -> None:
    (tmp_path / "vqvae.py").write_text(PORT)
    out = tmp_path / "rows.json"
    done = run("--device", "cpu", "--quick", "--json", str(out), "--port", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    assert list(rows) == [name for part in gpu_rows.ROWS.values() for name in part]
    missing = {name: row["reason"] for name, row in rows.items() if row["value"] is None}
    assert missing == dict.fromkeys(NEEDS_A_CARD, "it needs a GPU"), out.with_suffix(".log").read_text()[-3000:]
    assert all(math.isfinite(row["value"]) for name, row in rows.items() if name not in missing)
    for model in ("pixelcnn", "transformer", "vqvae"):
        assert rows[f"graphs/{model}"]["value"] == rows[f"graphs/{model}"]["limit"] > 0
    assert rows["chain/resumed after TERM"]["value"] == 1
    assert all({"goal", "limit"} <= row.keys() and name in done.stdout for name, row in rows.items())


def part_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, seconds: float) -> dict[str, Any]:
    """The rows of `sampling`, whose program is this one."""
    plain = gpu.wait
    monkeypatch.setattr(gpu, "wait", lambda _command, limit, log: plain([sys.executable, "-c", program], limit, log))
    args = gpu.parser().parse_args(["--device", "cpu"])
    with open(tmp_path / "log", "w") as log:
        rows: dict[str, Any] = gpu.run_part("sampling", args, seconds, {}, log)
    assert rows.keys() == gpu_rows.ROWS["sampling"].keys()
    return rows


def test_a_part_that_crashes_leaves_its_rows_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = part_that_fails(monkeypatch, tmp_path, "raise SystemExit(3)", 60)
    assert all(row["value"] is None and row["reason"].startswith("ended with exit code 3") for row in rows.values())


def test_a_part_that_hangs_is_ended_with_its_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = tmp_path / "late"
    inner = f"import time; time.sleep(2.5); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    rows = part_that_fails(monkeypatch, tmp_path, program, 1)
    assert all(row["value"] is None and row["reason"] == "not reached within 1 s" for row in rows.values())
    time.sleep(2)
    assert not mark.exists()


def test_a_row_keeps_the_value_that_it_had_before_its_part_failed(tmp_path: Path) -> None:
    rows = gpu_rows.Rows("vqvae", tmp_path / "rows.json", judged=True)
    with rows.attempt("vqvae/images per second", "vqvae/compiled over eager"):
        rows.put("vqvae/images per second", 7.0, batch=2)
        raise RuntimeError("two\nlines")
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["vqvae/images per second"] == {
        "value": 7.0,
        "goal": 8000,
        "limit": None,
        "better": "higher",
        "batch": 2,
    }
    assert written["vqvae/compiled over eager"]["reason"] == "RuntimeError: two lines"
    assert written["vqvae/over the port"]["reason"] == gpu_rows.NOT_REACHED


def test_outcomes_are_read_from_pytest_while_it_runs() -> None:
    stages = importlib.import_module("gpu_stages")
    lines = [
        "collecting ... collected 9 items / 5 deselected / 4 selected\n",
        "tests/gpu/test_models.py::test_a[cuda] PASSED          [ 25%]\n",
        "tests/gpu/test_models.py::test_b[x-cuda] FAILED        [ 50%]\n",
        "tests/gpu/test_training.py::test_c[cuda-y] ERROR       [ 75%]\n",
    ]
    assert stages.outcomes(lines) == (4, 1, ["test_b[x-cuda] FAILED", "test_c[cuda-y] ERROR"])
    assert stages.outcomes(["collected 2 items\n"]) == (2, 0, [])


def test_nine_minutes_are_enough_for_all_parts() -> None:
    groups = gpu.side_by_side(list(gpu_rows.ROWS))
    assert ["tests", "chain"] in groups and len(groups) == len(gpu_rows.ROWS) - 1
    assert sum(max(gpu.SECONDS[part] for part in parts) for parts in groups) <= 540


def test_without_a_card_one_line_says_so() -> None:
    if gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run("--device", "cuda")
    assert done.returncode == 2 and done.stderr.startswith("--device cuda: torch sees no GPU here")
