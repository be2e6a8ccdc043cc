"""Every benchmark runs at its small size and writes finite rows; together they make one table."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not a package
measure, runner = importlib.import_module("measure"), importlib.import_module("run")
KINDS = ["top", "bottom", "transformer_top", "transformer_bottom"]
FEW_RANKS = ["--shards", "3000", "--ranks", "8", "--workers", "0"]
SHORT = {
    "scale": ["--steps", "1", "--worlds", "2", "--strategies", "fsdp", *FEW_RANKS],
    "sampling": ["--levels", *KINDS],
    "neighbour": ["--work", "prior"],
}
# No rows: not of the table.
EXPERIMENTS = {"paper_step": ["--ranks", "2"], "priors": ["--images", "128"], "simulate": []}


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [
            number for item in (value.values() if isinstance(value, dict) else value) for number in numbers_in(item)
        ]
    return [float(value)] if isinstance(value, int | float) else []


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows_in(path: Path) -> dict[str, dict[str, Any]]:
    """The leaves of a result, each a finite value with a goal and a limit."""
    rows = dict(measure.rows_of(json.loads(path.read_text())))
    assert rows and all(math.isfinite(row["value"]) for row in rows.values())
    assert all({"goal", "limit"} <= row.keys() and row["better"] in ("higher", "lower") for row in rows.values())
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(runner.MINUTES))
def test_a_benchmark_runs_and_writes_its_rows(name: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--quick", "--minutes", "0.05", "--json", str(out), *SHORT.get(name, [])]
    printed = run(str(BENCHMARKS / f"{name}.py"), *options)
    assert all(row in printed for row in rows_in(out))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_and_writes_its_numbers(name: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    run(str(BENCHMARKS / f"{name}.py"), "--quick", "--json", str(out), *EXPERIMENTS[name])
    numbers = numbers_in(json.loads(out.read_text()))
    assert numbers and all(math.isfinite(number) for number in numbers)


@pytest.mark.slow
def test_the_runner_makes_one_table_one_file_and_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    options = ["--quick", "--only", "checkpoint", "train_step", "--results", str(tmp_path), "--page", str(page)]
    printed = run(str(BENCHMARKS / "run.py"), *options)
    (out,) = tmp_path.glob("????-??-??.json")
    rows = rows_in(out)
    assert {"checkpoint/blocked", "train_step/vqvae/share of product rate"} <= rows.keys()
    text = page.read_text()
    assert all(row in printed and f"| {row} |" in text for row in rows)
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text


def test_every_script_has_a_share_of_the_time() -> None:
    shared = {"measure", "photos", "run", "shared_saves"}
    on_data_sets = {"quality", "patches"}  # tests/test_quality.py
    scripts = {path.stem for path in BENCHMARKS.glob("*.py") if not path.stem.startswith("gpu")}
    assert set(runner.MINUTES) == scripts - shared - on_data_sets - set(EXPERIMENTS)
    assert sum(runner.MINUTES.values()) < 38  # of 40, with two for starting the programs


def test_every_benchmark_takes_a_device_and_refuses_one_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = [BENCHMARKS / f"{name}.py" for name in (*runner.MINUTES, *EXPERIMENTS)]
    assert all("arguments(" in script.read_text() for script in scripts)
    assert measure.arguments("").parse_args([]).device == "cpu"
    if not measure.torch.cuda.is_available():
        with pytest.raises(SystemExit):
            measure.arguments("").parse_args(["--device", "cuda"])
        assert "argument --device: cuda: torch sees no GPU here" in capsys.readouterr().err


def test_a_row_is_judged_by_its_goal() -> None:
    assert measure.reached(measure.at_least(1.2, 1.3)) and not measure.reached(measure.at_least(1.2, 1.1))
    assert measure.reached(measure.at_most(0.2, 0.1)) and not measure.reached(measure.at_most(0.2, 0.3))
    assert measure.reached(measure.at_least(None, 0.1))
    assert measure.reached(measure.exactly(3, 3)) and not measure.reached(measure.exactly(3, 2))
    assert not measure.reached(measure.at_least(None, None))
    assert measure.table({"a": measure.at_least(1, None, reason="no card")}).endswith("≥ 1            no card")
    assert "missed" in measure.table({"loader": {"256": measure.at_least(1.2, 1.1)}})


def test_the_page_has_the_sections_that_the_runner_writes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(runner.PAGE.read_text())
    for section in ("table", "growth"):
        measure.write_section(page, section, f"new {section}")
        assert f"new {section}" in page.read_text()
    with pytest.raises(ValueError, match="page.md: has no section"):
        measure.write_section(page, "nothing", "")
