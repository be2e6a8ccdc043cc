"""Bad input: exit code 1, one clear line, nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
from support.stages import CONFIGS, run_stage

from vqscale import cli
from vqscale.data.shards import Manifest
from vqscale.files import SEAL, sealed, write_json


def error_of(capsys: pytest.CaptureFixture[str], stage: str, name: str, *overrides: str) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert run_stage(stage, name, *overrides) == 1
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vqscale: error:")]
    assert len(found) == 1
    assert "Traceback" not in found[0]
    return found[0]


def test_a_misspelt_key_names_the_nearest(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "train_vqvae", "train_vqvae", "lerning_rate=1")
    assert "lerning_rate" in line and "did you mean learning_rate" in line
    assert "model.quantizer.num_codes" in error_of(capsys, "train_vqvae", "train_vqvae", "model.quantizer.num_code=3")


def test_a_missing_stage_is_named(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(chain / "train_vqvae")
    line = error_of(capsys, "extract_codes", "extract_codes", "run_dir=again")
    assert "train_vqvae" in line and "`vqscale train_vqvae` makes" in line
    shutil.rmtree(chain / "pack")
    assert "`vqscale pack` makes it" in error_of(capsys, "train_vqvae", "train_vqvae", "run_dir=again2")
    assert cli.main(["train_vqvae", "configs/nowhere.yaml"]) == 1


def test_codes_of_another_tokenizer_are_refused(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["total_images=64", "seed=9", "run_dir=other", "evaluate_every=0"]
    assert run_stage("train_vqvae", "train_vqvae", *other) == 0
    line = error_of(capsys, "sample", "sample", "vqvae=other", "run_dir=again")
    assert line.count("sha256:") == 2 and "prior_top" in line
    assert not list(Path("again").glob("*.tar"))
    line = error_of(capsys, "extract_codes", "extract_codes", "vqvae=other")
    assert "vqvae was sha256:" in line and "fresh=true" in line


def test_an_unfinished_run_is_not_consumed_unless_asked(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("short").mkdir()
    Path("short/STOP").touch()
    assert run_stage("train_vqvae", "train_vqvae", "run_dir=short") == 75
    line = error_of(capsys, "extract_codes", "extract_codes", "vqvae=short", "run_dir=again")
    assert "stopped at" in line and "checkpoint=" in line
    seen = json.loads(Path("short/status.json").read_text())["images_seen"]
    assert run_stage("extract_codes", "extract_codes", "vqvae=short", f"checkpoint={seen}", "run_dir=again2") == 0


def test_a_changed_config_is_refused_with_both_values(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "train_vqvae", "train_vqvae", "seed=5", "model.hidden=24", "learning_rate=0.5")
    assert "seed: was 0, now 5" in line and "model.hidden: was 16, now 24" in line and "learning_rate" not in line


def test_a_change_of_what_is_learned_is_told_and_done(chain: Path) -> None:
    changed = ["learning_rate=0.0005", "total_images=1984", "evaluate_every=0"]
    assert run_stage("train_vqvae", "train_vqvae", *changed) == 0
    log = (chain / "train_vqvae" / "log" / "0.log").read_text()
    for level, change in (
        ("WARNING", "learning_rate: was 0.001, now 0.0005"),
        ("INFO", "total_images: was 1920, now 1984"),
    ):
        line = f"the config has changed since the last start: {change}"
        assert f"{level} {line}" in log
    metrics = [json.loads(line) for line in (chain / "train_vqvae" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["learning_rate"] == 0.0005


def test_a_global_batch_that_does_not_fit(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "global_batch=0" in error_of(capsys, "train_vqvae", "train_vqvae", "run_dir=again", "global_batch=0")
    assert "global_batch=30 is not divisible by 4 ranks; 28 or 32" in _refusal_of_batching()


def _refusal_of_batching() -> str:
    from vqscale.config import local_batching

    with pytest.raises(ValueError) as caught:
        local_batching(30, 4, 8)
    return str(caught.value)


def test_unknown_classes_levels_and_strategies(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'dragon'" in error_of(capsys, "sample", "sample", "run_dir=again", "classes=[dragon]")
    assert "level=middle" in error_of(capsys, "train_prior", "train_prior_top", "run_dir=b", "level=middle")
    assert "strategy=fdsp" in error_of(capsys, "train_vqvae", "train_vqvae", "run_dir=c", "strategy=fdsp")
    assert "on 1 process" in error_of(capsys, "train_vqvae", "train_vqvae", "run_dir=d", "strategy=fsdp")


def test_an_unwritable_run_directory(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert "cannot be written" in error_of(capsys, "train_vqvae", "train_vqvae", "run_dir=file/run")


def test_collapsed_codes_are_refused(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = chain / "extract_codes" / "train" / "dataset.json"
    found = json.loads(path.read_text())
    found["extra"]["perplexity"]["top"] = 1.2
    write_json(path, sealed({key: value for key, value in found.items() if key != SEAL}))
    line = error_of(capsys, "train_prior", "train_prior_top", "run_dir=again")
    assert "collapsed (perplexity 1.20 of 32)" in line


def test_codes_beyond_the_codebook_are_refused_before_step_0(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = chain / "extract_codes" / "train" / "dataset.json"
    found = json.loads(path.read_text())
    found["extra"]["num_codes"] = 16
    write_json(path, sealed({key: value for key, value in found.items() if key != SEAL}))
    line = error_of(capsys, "train_prior", "train_prior_top", "run_dir=again")
    assert "num_codes is 16, but 32 different top codes were counted" in line
    assert not list(Path("again").glob("checkpoints/*"))


def test_every_stage_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in cli.STAGES:
        assert cli.main([stage, "--help"]) == 0
        assert "run_dir=" in capsys.readouterr().out


def test_dry_run_prints_sizes_and_writes_nothing(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / "train_prior_bottom.yaml")
    assert cli.main(["train_prior", path, "--dry-run", "run_dir=never"]) == 0
    out = capsys.readouterr().out
    codes = Manifest.load(chain / "extract_codes" / "train")
    assert (
        f"{codes.num_samples} samples in {len(codes.shards)} shards" in out
        and "K = 32" in out
        and "steps: 40 of 32 images" in out
    )
    assert not Path("never").exists()
