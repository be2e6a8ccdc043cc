"""`vqscale plan`: what it prints, what it refuses, and that ranks of a real run hold what it says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.plans import assert_memory_as_planned
from support.stages import run_stage
from torch._subclasses.fake_tensor import FakeTensorMode

from vqscale import cli
from vqscale.config import load, save
from vqscale.engine.footprint import save_interval
from vqscale.files import write_json
from vqscale.stages import plan, train_prior, train_vqvae
from vqscale.training import flops_per_image

ROOT = Path(__file__).parents[2]
IMAGENET = ROOT / "configs" / "imagenet256"


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, dict[str, list[str]]]:
    """(all that was printed, the table: row -> one cell per number of ranks)."""
    assert cli.main(["plan", *words]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if len(line) > 40 and line[:28].strip() and line[26:28] == "  "]
    return out, {line[:28].strip(): line[28:].replace(" x ", "x").split() for line in rows}


def test_a_table_without_data_and_without_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    out, table = planned(capsys, str(IMAGENET / "train_vqvae.yaml"), "--world", "8,64,512", "--strategy", "ddp")
    assert "train_vqvae under ddp" in out and "assumed" in out and "256 px" in out
    assert "2,207,444 steps of 128 images" in out
    assert table["ranks"] == ["8", "64"] and table["micro-batch x accumulation"] == ["16x1", "2x1"]
    assert "512 ranks: global_batch=128 is not divisible by 512 ranks; 512 would fit" in out
    kept, recomputed = (float(table[row][0]) for row in ("activations, GiB", "the same, checkpointed"))
    assert 0 < recomputed < kept


def test_a_prior_is_planned_from_the_experiments_other_configs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["world=8", "micro_batch=1", "classes=10", "model.layers=2", "model.conditioning_layers=1"]
    out, table = planned(capsys, str(IMAGENET / "train_prior_bottom.yaml"), *words)
    assert "64x64 under 32x32 codes, K = 512" in out and "10 classes" in out
    assert table["micro-batch x accumulation"] == ["1x64"]


def test_the_recommended_save_every_follows_from_bytes_rates_and_failures(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(IMAGENET / "train_vqvae.yaml"), "--world", "8,64", "--strategy", "ddp"]

    def recommended(*more: str) -> list[int]:
        out, table = planned(capsys, *words, *more)
        assert "1 GB/s a node" in out or more
        return [int(cell.replace(",", "")) for cell in table["save_every, recommended"]]

    out, table = planned(capsys, *words)
    numel = int(next(line for line in out.splitlines() if " parameters; " in line).split()[0].replace(",", ""))
    expected = save_interval(16 * numel / 1e9, 1_900 * 86_400 / 8) / float(table["seconds computing"][0])
    (first, second) = recommended()
    assert first == pytest.approx(128 * expected, rel=1e-2) and first % 128 == second % 128 == 0
    assert recommended("failure_days=100")[0] < first < recommended("write_gb_per_s=0.1")[0]
    assert recommended("total_images=1280") == [1280, 1280]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["sample.yaml"], "plan takes a trainer's config"),
        (["train_vqvae.yaml", "strategy=dpp"], "strategy=dpp: choose from single, ddp, fsdp"),
        (["train_vqvae.yaml", "world=0"], "world=0: at least 1"),
        (["train_vqvae.yaml", "world=many"], "world=many: a number of ranks"),
        (["train_vqvae.yaml", "world=512"], "512 ranks: global_batch=128 is not divisible by 512 ranks"),
        (["train_vqvae.yaml", "world=1"], "1 ranks: strategy=fsdp needs at least 2"),
        (["train_vqvae.yaml", "modle.hidden=3"], "unknown key modle; did you mean model?"),
        (["train_prior_top.yaml", "level=middle"], "level=middle: the model of"),
    ],
)
def test_what_cannot_be_planned(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(IMAGENET / words[0]), *words[1:]]) == 1
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1


BOTTOM = IMAGENET / "train_prior_bottom.yaml"
SMALL = ["model.layers=1", "model.conditioning_layers=1", "model.hidden=16", "model.residual=16", "classes=10"]


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """What is left of a run of the bottom prior, made small, on two cards."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    request = plan.load([str(BOTTOM), *SMALL])
    save(replace(request.trainer, compile=True, run_dir=str(run_dir)), run_dir / "config.yaml")
    flops = flops_per_image(plan.describe(request)[0], train_prior.training_step(request.trainer))
    facts = {"stage": "train_prior", "device_name": "NVIDIA H200", "world_size": 2, "strategy": "ddp"}
    write_json(run_dir / "command.json", {**facts, "flops_per_image": flops})
    rates = [(1, 2.0), (40, 80.0), (50, 100.0), (60, 120.0)]
    lines = [
        {"images_seen": 64, "images_per_second": i, "tflops_per_second": t, "peak_gpu_bytes": 2**31} for i, t in rates
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def test_a_measured_rate_takes_the_place_of_the_guess(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(BOTTOM), *SMALL, "world=8"]
    assert "500 TFLOP/s" in planned(capsys, *words)[0], "as measured on one H100"
    guessed, table = planned(capsys, *words, "tflops=200")
    assert "measured" not in guessed and "200 TFLOP/s" in guessed
    out, faster = planned(capsys, *words, "--from", str(measured))
    assert f"measured in {measured} on NVIDIA H200, 2 ranks under ddp: 50 images/s, 100 TFLOP/s a rank" in out
    assert "peak 2.0 GiB; that run differs in compile: was True, now False" in out
    (before,), (after,) = table["seconds computing"], faster["seconds computing"]
    assert float(after) == pytest.approx(2 * float(before), rel=1e-3)
    assert planned(capsys, *words, f"from={measured}")[1] == faster


def test_recomputed_flops_do_not_count() -> None:
    counts = set()
    for checkpointing in ("true", "false"):
        request = plan.load([str(BOTTOM), *SMALL, f"model.activation_checkpointing={checkpointing}"])
        counts.add(flops_per_image(plan.describe(request)[0], train_prior.training_step(request.trainer)))
    assert len(counts) == 1 and min(counts) > 10**8


@pytest.mark.parametrize(
    ("path", "words", "line"),
    [
        (BOTTOM, ["model.layers=2"], "a run of another network: model.layers: was 1, now 2"),
        (BOTTOM, ["resolution=128"], "its data have another shape"),
        (IMAGENET / "train_prior_top.yaml", [], "a run of another network: level: was 'bottom', now 'top'"),
        (IMAGENET / "train_vqvae.yaml", [], "a run of train_prior, not of train_vqvae"),
    ],
)
def test_a_rate_of_another_network_is_refused(
    measured: Path, path: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = SMALL if "prior" in path.stem else []
    assert cli.main(["plan", str(path), *small, *words, f"from={measured}"]) == 1
    printed = capsys.readouterr().err
    assert f"from={measured}: " in printed and line in printed and printed.count("\n") == 1


def test_a_run_without_rates_is_refused(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (measured / "metrics.jsonl").unlink()
    assert cli.main(["plan", str(BOTTOM), *SMALL, f"from={measured}"]) == 1
    assert "metrics.jsonl has no tflops_per_second yet" in capsys.readouterr().err
    assert cli.main(["plan", str(BOTTOM), *SMALL, f"from={measured.parent}"]) == 1
    assert "there is no run" in capsys.readouterr().err


def _rank(stage: str, name: str, overrides: list[str]) -> int:
    return run_stage(stage, name, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_vqvae", "train_prior_bottom"])
@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_four_ranks_hold_what_the_plan_says(chain: Path, name: str, strategy: str) -> None:
    """The other numbers of ranks, and strategies: test_matrix.py."""
    run_dir = chain.parent / "run"
    words = [f"run_dir={run_dir}", f"strategy={strategy}", "total_images=32", "evaluate_every=0", "workers=0"]
    stage = name.removesuffix("_bottom")
    assert run_ranks(_rank, 4, stage, name, words, timeout=300) == [0] * 4
    assert_memory_as_planned(run_dir, name, strategy, 4)


PAPER: dict[str, dict[str, Any]] = {
    "train_vqvae": {
        "global_batch": 128,
        "total_images": 128 * 2_207_444,
        "model.hidden": 128,
        "model.residual_hidden": 64,
        "model.residual_layers": 2,
        "model.downsample": [4, 2],
        "model.quantizer.num_codes": 512,
        "model.quantizer.code_dim": 64,
        "model.quantizer.commitment": 0.25,
        "model.quantizer.decay": 0.99,
    },
    "train_prior_top": {
        "global_batch": 1024,
        "total_images": 1024 * 1_600_000,
        "model.hidden": 512,
        "model.residual": 2048,
        "model.layers": 20,
        "model.attention_every": 5,
        "model.heads": 8,
        "model.filter": 5,
        "model.dropout": 0.1,
        "model.output_layers": 20,
    },
    "train_prior_bottom": {
        "global_batch": 512,
        "total_images": 512 * 754_000,
        "model.hidden": 512,
        "model.residual": 1024,
        "model.layers": 20,
        "model.attention_every": 0,
        "model.filter": 5,
        "model.dropout": 0.1,
        "model.conditioning_layers": 20,
    },
}


@pytest.mark.parametrize("name", list(PAPER))
def test_imagenet256_is_the_papers(name: str) -> None:
    """Razavi et al. 2019, appendix; the bottom prior's batch and filter size are unconfirmed."""
    module = train_vqvae if name == "train_vqvae" else train_prior
    config: Any = load(module.Config, IMAGENET / f"{name}.yaml")
    for key, value in PAPER[name].items():
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PAPER))
def test_imagenet256_fits_one_card_of_80_gb_without_checkpointing(name: str) -> None:
    """A tenth is left to the allocator and the libraries."""
    request = plan.load([str(IMAGENET / f"{name}.yaml"), "strategy=single", "world=1"])
    assert not request.trainer.model.activation_checkpointing
    description, _ = plan.describe(request)
    with FakeTensorMode():
        model = plan.build_model(description)
    assert plan.column(request, description, model, 1, flops=1)["total, GiB"] * 2**30 < 0.9 * 80e9


PAPER_SIZE = sorted(
    path
    for name in ("imagenet256", "imagenet256_lean", "ffhq1024")
    for path in (ROOT / "configs" / name).glob("train_prior*")
)


@pytest.mark.parametrize("path", PAPER_SIZE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_header_tells_the_size_and_the_command(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    description, _ = plan.describe(plan.load([str(path)]))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in plan.build_model(description).parameters())
    assert header[-1].startswith(f"# {size / 1e6:.0f}M parameters")
    assert header[-1].endswith(f" vqscale train_prior {path.relative_to(ROOT)}")
