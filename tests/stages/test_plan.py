"""`vqscale plan`: what it prints, what it refuses, and that ranks of a real run hold what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.stages import CONFIGS, run_stage

from vqscale import cli
from vqscale.config import load
from vqscale.stages import plan, train_prior, train_vqvae

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


def _rank(stage: str, name: str, overrides: list[str]) -> int:
    return run_stage(stage, name, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_vqvae", "train_prior_bottom"])
@pytest.mark.parametrize(
    ("strategy", "world"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("zero1", 2), ("zero2", 4), ("zero3", 4)]
)
def test_ranks_hold_what_the_plan_says(chain: Path, name: str, strategy: str, world: int) -> None:
    run_dir = chain.parent / "run"
    words = [f"run_dir={run_dir}", f"strategy={strategy}", "total_images=32", "evaluate_every=0", "workers=0"]
    stage = name.removesuffix("_bottom")
    assert run_ranks(_rank, world, stage, name, words, timeout=300) == [0] * world
    real = json.loads((run_dir / "command.json").read_text())["bytes_per_rank"]
    request = plan.load([str(CONFIGS / f"{name}.yaml"), f"world={world}", f"strategy={strategy}"])
    description, assumed = plan.describe(request)
    assert not assumed, "the data set is there"
    column = plan.column(request, description, plan.build(description), world)
    for what, ranks in real.items():
        assert column[f"{what}, GiB"] * (1 << 30) == pytest.approx(max(ranks), rel=0.02), what


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


PAPER_SIZE = sorted(
    path for name in ("imagenet256", "ffhq1024") for path in (ROOT / "configs" / name).glob("train_prior*")
)


@pytest.mark.parametrize("path", PAPER_SIZE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_header_tells_the_size_and_the_command(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    description, _ = plan.describe(plan.load([str(path)]))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in plan.build(description).parameters())
    assert header[-1].startswith(f"# {size / 1e6:.0f}M parameters")
    assert header[-1].endswith(f" vqscale train_prior {path.relative_to(ROOT)}")
