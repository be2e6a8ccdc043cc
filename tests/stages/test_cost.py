"""`vqscale plan CONFIG_FOLDER`: hours, GPU-hours and money of a chain, and which rates are assumed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.stages import CONFIGS

from vqscale import cli
from vqscale.config import save
from vqscale.files import write_json
from vqscale.stages import cost, plan
from vqscale.training import flops_per_image

ROOT = Path(__file__).parents[2]


def costs(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, dict[str, dict[str, list[float]]]]:
    """(all that was printed, measure -> stage -> one number per number of ranks)."""
    assert cli.main(["plan", *words]) == 0
    out = capsys.readouterr().out
    table: dict[str, dict[str, list[float]]] = {}
    measure = ""
    for line in out.splitlines():
        if line.startswith(("hours", "GPU-hours", "money")):
            measure = line.split()[0]
        elif line.startswith("  "):
            name, *cells = line.split()
            table.setdefault(measure, {})[name] = [float(cell.replace(",", "")) for cell in cells]
    return out, table


def test_the_cost_of_a_chain(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no data set
    out, table = costs(capsys, str(CONFIGS), "--world", "8,64", "price_per_gpu_hour=2.5", "gb_per_s=1e9")
    stages = ["train_vqvae", "extract_codes", "train_prior_top", "train_prior_bottom", "sample", "total"]
    assert [list(rows) for rows in table.values()] == [stages] * 3
    for stage in stages:
        (hours, _), gpu_hours, money = (table[measure][stage] for measure in ("hours", "GPU-hours", "money"))
        assert gpu_hours[0] == pytest.approx(8 * hours, rel=1e-2) and hours > 0
        assert money == pytest.approx([2.5 * n for n in gpu_hours], rel=1e-2)
    for rows in table.values():
        assert rows["total"] == pytest.approx([sum(rows[stage][n] for stage in stages[:-1]) for n in (0, 1)], rel=1e-2)
    assert "train_vqvae: assumed, as measured on one H100 for configs/imagenet256: 96 TFLOP/s" in out
    assert "train_prior_top: assumed, as measured on one H100 for configs/imagenet256: 500 TFLOP/s" in out
    assert "train_vqvae: on 32 of 64 ranks" in out and "not counted: evaluate, pack," in out
    assert "money" not in costs(capsys, str(CONFIGS), "world=8")[1]


def test_hours_follow_from_flops_and_rate(capsys: pytest.CaptureFixture[str]) -> None:
    path = CONFIGS / "train_prior_top.yaml"
    request = plan.load([str(path)])
    flops = flops_per_image(plan.describe(request)[0], plan._training_step(request))
    _, table = costs(capsys, str(CONFIGS), "world=2", "tflops=1e-6", "gb_per_s=1e9")
    expected = request.trainer.total_images * flops / 1e6 / 2 / 3_600
    assert table["hours"]["train_prior_top"] == pytest.approx([expected], rel=1e-2)


def test_measured_rates_take_the_place_of_the_assumed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    request = plan.load([str(CONFIGS / "train_prior_top.yaml")])
    flops = flops_per_image(plan.describe(request)[0], plan._training_step(request))
    run_dir = tmp_path / "train_prior_top"
    run_dir.mkdir()
    save(replace(request.trainer, run_dir=str(run_dir)), run_dir / "config.yaml")
    facts = {"stage": "train_prior", "device_name": "NVIDIA H200", "world_size": 2, "strategy": "ddp"}
    write_json(run_dir / "command.json", {**facts, "flops_per_image": flops})
    line = {"images_seen": 64, "images_per_second": 50.0, "tflops_per_second": 1e-6}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    words = [str(CONFIGS), "world=8", "gb_per_s=1e9"]
    out, table = costs(capsys, *words, "--from", str(tmp_path))
    assert f"train_prior_top: measured in {run_dir} on NVIDIA H200" in out
    assert "train_prior_bottom: assumed" in out
    assert table["hours"] | {"total": []} != costs(capsys, *words)[1]["hours"] | {"total": []}
    expected = request.trainer.total_images * flops / 1e6 / 8 / 3_600
    assert table["hours"]["train_prior_top"] == pytest.approx([expected], rel=1e-2)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["global_batch=64"], "is a folder, and only a trainer's config can be overridden"),
        (["world=0"], "world=0: at least 1"),
        (["price_per_gpu_hour=-1"], "price_per_gpu_hour=-1"),
        (["from=nowhere"], "from=nowhere: it has no run of train_vqvae, train_prior_top, train_prior_bottom"),
    ],
)
def test_what_cannot_be_counted(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(CONFIGS), *words]) == 1
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1


def test_a_folder_without_trainers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(tmp_path)]) == 1
    assert f"{tmp_path}: there is no train_vqvae.yaml to plan" in capsys.readouterr().err


def test_a_table_of_costs() -> None:
    rows = {"one": cost.shared(7_200, [1, 2]), "two": [cost.Spent(1, 3_600), cost.Spent(1, 3_600)]}
    lines = cost.lines([1, 2], rows, price=0)
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ")}
    assert cells == {"one": ["2", "2"], "two": ["1", "1"], "total": ["3", "3"]}, "GPU-hours, the last"
    assert [line.split() for line in lines if "total" in line][0] == ["total", "3", "2"], "hours"
    assert lines[-1].startswith("two: on 1 of 2 ranks") and "money" not in "".join(lines)


@pytest.mark.slow
def test_the_lean_recipe_costs_at_most_a_tenth_of_the_papers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its transformers, which nobody has measured, multiply at 200 TFLOP/s only."""
    monkeypatch.chdir(ROOT)
    (paper,), (lean,), (slow_lean,) = (
        costs(capsys, f"configs/{name}", "world=8", *words)[1]["GPU-hours"]["total"]
        for name, words in (("imagenet256", []), ("imagenet256_lean", []), ("imagenet256_lean", ["tflops=200"]))
    )
    assert lean <= slow_lean <= paper / 10
