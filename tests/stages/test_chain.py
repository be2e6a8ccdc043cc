"""pack -> train -> extract -> priors -> sample -> evaluate: what is on disk, what a rerun does, what a stop leaves."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.distributed import run_ranks
from support.stages import CHAIN, run_stage
from support.ties import agree_until_a_tie

from vqscale.data.images import ImageReader, to_float
from vqscale.data.sequential import sequential_batches
from vqscale.data.shards import Manifest
from vqscale.engine.checkpoint import find_latest
from vqscale.models.vqvae import VQVAE
from vqscale.sources import load_model

Files = Callable[[Path], dict[str, bytes]]


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    latest = find_latest(run_dir / "checkpoints")
    assert latest is not None
    return latest.read("")


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_every_stage_is_done_and_says_what_ran(whole_chain: Path) -> None:
    for _, name in CHAIN:
        status = json.loads((whole_chain / name / "status.json").read_text())
        command = json.loads((whole_chain / name / "command.json").read_text())
        assert status["state"] == "done", name
        assert (command["strategy"], command["engine"], command["world_size"]) == ("single", "torch", 1)
    command = json.loads((whole_chain / "train_vqvae" / "command.json").read_text())
    checkpoint = tensors(whole_chain / "train_vqvae")
    trained = [t for name, t in checkpoint.items() if name.startswith("optimizer.exp_avg.")]
    assert command["bytes_per_rank"]["parameters"] == [sum(t.numel() * 4 for t in trained)]
    assert command["bytes_per_rank"]["optimizer"] == [2 * sum(t.numel() * 4 for t in trained)]
    assert (command["precision"], command["resumed_from"], command["restarts"]) == ("fp32", 0, 0)


def test_metrics_rise_with_images_and_hold_what_is_promised(whole_chain: Path) -> None:
    for name, own in (("train_vqvae", "reconstruction_mse"), ("train_prior_bottom", "nll/bottom")):
        found = lines(whole_chain / name)
        seen = [line["images_seen"] for line in found]
        assert seen == sorted(seen)
        for key in ("loss", own, "images_per_second", "data_wait_fraction", "gradient_norm", "learning_rate"):
            assert any(key in line for line in found), (name, key)
        flops = json.loads((whole_chain / name / "command.json").read_text())["flops_per_image"]
        for line in (line for line in found if "loss" in line):
            assert line["tflops_per_second"] == pytest.approx(line["images_per_second"] * flops / 1e12), name
            assert "mfu" not in line, "the peak of a CPU is not known"
        losses = [line["loss"] for line in found if "loss" in line]
        assert losses[-1] < 0.9 * losses[0], name
    assert any("perplexity/top" in line for line in lines(whole_chain / "train_vqvae"))
    assert any("held_out/nll/top" in line for line in lines(whole_chain / "train_prior_top"))
    assert list((whole_chain / "train_vqvae" / "tensorboard").glob("events*"))
    assert list((whole_chain / "train_vqvae" / "samples").glob("*.png"))


def test_the_top_s_error_is_that_of_what_its_codes_decode_to(whole_chain: Path) -> None:
    model = load_model(whole_chain / "train_vqvae").model
    assert isinstance(model, VQVAE)
    (batch,) = sequential_batches(whole_chain / "pack" / "holdout", read=ImageReader(32), batch=64, limit=64)
    image = to_float(batch["image"])[batch["weight"] > 0]  # the end is padded
    with torch.no_grad():
        codes = model.encode(image)
        errors = {
            key: float((decoded.clamp(-1, 1) - image).square().mean())
            for key, decoded in (("", model.decode(codes)), ("/top", model.decode_upper(codes[:1])))
        }
    last = [line for line in lines(whole_chain / "train_vqvae") if "held_out/psnr" in line][-1]
    for key, error in errors.items():
        assert last[f"held_out/reconstruction_mse{key}"] == pytest.approx(error, rel=1e-4)
    assert errors["/top"] > errors[""] > 0


def test_priors_learn_less_than_a_uniform_code(whole_chain: Path) -> None:
    for level in ("top", "bottom"):
        nll = [v for line in lines(whole_chain / f"train_prior_{level}") for k, v in line.items() if "held_out" in k]
        assert nll[-1] < math.log(32) - 0.2, level


def test_code_shards_mirror_the_images(whole_chain: Path) -> None:
    for split in ("train", "holdout"):
        images, codes = (
            Manifest.load(whole_chain / "pack" / split),
            Manifest.load(whole_chain / "extract_codes" / split),
        )
        assert [s.name for s in images.shards] == [s.name for s in codes.shards]
        assert [s.num_samples for s in images.shards] == [s.num_samples for s in codes.shards]
        for number in range(len(images.shards)):
            source, made = (
                images.index(whole_chain / "pack" / split, number),
                codes.index(whole_chain / "extract_codes" / split, number),
            )
            assert [source.key(i) for i in range(len(source))] == [made.key(i) for i in range(len(made))]
            assert source.labels.tolist() == made.labels.tolist()
        assert codes.extra["source"] == images.fingerprint
        cells = {"top": 16, "bottom": 64}
        assert {n: sum(u) for n, u in codes.extra["usage"].items()} == {
            n: c * images.num_samples for n, c in cells.items()
        }


def test_the_preparation_of_the_images_stays_with_all_that_is_made_of_them(whole_chain: Path) -> None:
    for split in ("train", "holdout"):
        images, codes = (Manifest.load(whole_chain / name / split) for name in ("pack", "extract_codes"))
        assert codes.transform == images.transform and "resize" in images.transform
    trained_on = Manifest.load(whole_chain / "pack" / "train").transform
    assert Manifest.load(whole_chain / "sample").extra["training_transform"] == trained_on
    for name in ("train_vqvae", "train_prior_top", "train_prior_bottom"):
        assert load_model(whole_chain / name).description["transform"] == trained_on


def test_running_again_changes_nothing(chain: Path, files: Files) -> None:
    before = files(chain)
    for stage, name in CHAIN:
        assert run_stage(stage, name) == 0, name
        assert json.loads((chain / name / "status.json").read_text())["state"] == "done"
    assert files(chain) == before


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("train_vqvae", "train_vqvae"),
        ("train_prior", "train_prior_bottom"),
        ("train_classifier", "train_classifier_real"),
    ],
)
def test_stopping_twice_ends_at_the_same_bits(chain: Path, stage: str, name: str) -> None:
    run_dir = chain.parent / "again"
    for _ in range(2):
        run_dir.mkdir(exist_ok=True)
        (run_dir / "STOP").touch()
        assert run_stage(stage, name, f"run_dir={run_dir}") == 75
        status = json.loads((run_dir / "status.json").read_text())
        assert status["state"] == "stopped" and 0 < status["images_seen"] < 1280
        assert not (run_dir / "STOP").exists()
    assert run_stage(stage, name, f"run_dir={run_dir}") == 0
    assert_same_tensors(tensors(run_dir), tensors(chain / name))
    seen = [line["images_seen"] for line in lines(run_dir)]
    assert seen == sorted(seen)


def test_a_transformer_takes_the_place_of_a_pixelcnn(chain: Path) -> None:
    """Trained, sampled with guidance, a temperature that falls and in bf16, and scored, by the same stages."""
    name = "train_prior_bottom_transformer"
    assert run_stage("train_prior", name) == 0
    losses = [line["loss"] for line in lines(chain / name) if "loss" in line]
    assert losses[-1] < 0.95 * losses[0]
    prior, run_dir = f"prior_bottom={chain / name}", chain.parent / "again"
    options = ["guidance.bottom=1.0", "temperature_end.bottom=0.5", "precision=bf16", "samples_per_class=1"]
    assert run_stage("sample", "sample", prior, f"run_dir={run_dir}", *options) == 0
    told = Manifest.load(run_dir).extra
    assert (told["temperature_end"], told["precision"]) == ({"bottom": 0.5}, "bf16")
    scored = chain.parent / "scored"
    words = [prior, f"samples={run_dir}", "classifier_samples=none", f"run_dir={scored}", "metrics=[nll]"]
    assert run_stage("evaluate", "evaluate", *words) == 0
    assert json.loads((scored / "scores.json").read_text())["nll/bottom"]["value"] < math.log(32)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["temperature.botom=0.7"], "temperature.botom: the levels of vqvae=runs/debug/train_vqvae are top, bottom"),
        (["guidance.top=2.0"], "guidance.top=2.0: prior_top=runs/debug/train_prior_top was trained with model.class_d"),
        (["precision=fp16"], "precision=fp16: choose from fp32, bf16"),
    ],
)
def test_sampling_options_that_do_not_fit(
    chain: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stage("sample", "sample", "run_dir=runs/again", *words) == 1
    assert line in capsys.readouterr().err


def test_a_dry_run_tells_the_memory_of_a_batch(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("sample", "sample", "--dry-run") == 0
    memory = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory of a batch of 8"))
    assert re.search(r"top \d+\.\d MiB, bottom \d+\.\d MiB", memory)


def test_more_images_may_be_asked_for_later(chain: Path) -> None:
    assert run_stage("train_prior", "train_prior_top", "total_images=1600") == 0
    assert json.loads((chain / "train_prior_top" / "status.json").read_text())["images_seen"] == 1600
    assert json.loads((chain / "train_prior_top" / "command.json").read_text())["resumed_from"] == 1280


def test_a_shard_that_is_missing_is_made_again_alike(chain: Path, files: Files) -> None:
    before = files(chain)
    (chain / "extract_codes" / "train" / "000003.tar").unlink()
    (chain / "sample" / "000001.tar").unlink()
    for stage in ("extract_codes", "sample"):
        status = json.loads((chain / stage / "status.json").read_text())
        (chain / stage / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
        assert run_stage(stage, stage) == 0
    assert files(chain) == before


@pytest.mark.parametrize("stage", ["extract_codes", "sample"])
def test_a_stop_in_the_middle_leaves_only_whole_shards(chain: Path, files: Files, stage: str) -> None:
    run_dir = chain.parent / "again"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    assert run_stage(stage, stage, f"run_dir={run_dir}") == 75
    assert not list(run_dir.rglob("*.tmp"))
    assert run_stage(stage, stage, f"run_dir={run_dir}") == 0
    mine, theirs = files(run_dir), files(chain / stage)
    assert mine == theirs


def rank_of_stage(stage: str, overrides: list[str]) -> int:
    return run_stage(stage, stage, *overrides)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("stage", ["extract_codes", "sample"])
def test_bytes_do_not_depend_on_the_number_of_ranks(chain: Path, files: Files, stage: str, world: int) -> None:
    run_dir = chain.parent / "many"
    workers = ["workers=0"] if stage == "extract_codes" else []  # the ranks of tests may not have children
    assert run_ranks(rank_of_stage, world, stage, [f"run_dir={run_dir}", *workers]) == [0] * world
    assert files(run_dir) == files(chain / stage)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-9), ("fp32", 1e-5)])
def test_two_ddp_ranks_train_as_one(chain: Path, precision: str, tolerance: float) -> None:
    """20 steps; codebooks are asserted to be bit-identical on both ranks at every evaluation, and at the end."""
    common = [
        f"precision={precision}",
        "workers=0",
        "total_images=640",
        "log_every=32",
        "evaluate_every=320",
        "evaluate_images=50",  # by two ranks in batches of 50: one has nothing but padding
        "save_every=640",
    ]
    steps, held_out = {}, {}
    for world, micro in ((1, 0), (2, 8)):
        run_dir = chain.parent / f"ddp{world}"
        overrides = [*common, f"run_dir={run_dir}", f"micro_batch={micro}"]
        assert run_ranks(rank_of_stage, world, "train_vqvae", overrides) == [0] * world
        steps[world] = [line for line in lines(run_dir) if "loss" in line]
        figures = [line for line in lines(run_dir) if "loss" not in line]
        held_out[world] = [value for line in figures for name, value in sorted(line.items()) if "held_out" in name]
        command = json.loads((run_dir / "command.json").read_text())
        assert (command["world_size"], command["strategy"]) == (world, "single" if world == 1 else "ddp")
    assert len(steps[1]) == 20
    same_codes = agree_until_a_tie(steps[2], steps[1], tolerance)
    assert same_codes or precision == "fp32"
    assert len(held_out[1]) == 2 * 7
    if same_codes:
        assert held_out[2] == pytest.approx(held_out[1], rel=tolerance, abs=0)
