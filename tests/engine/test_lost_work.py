"""What must not cost a run its work: weights that are not finite, checkpoints that are gone, rare saves."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.training import MemoryLoader, TinyConfig, assert_bit_identical, config, metrics, saved, train

from vqscale import runtime
from vqscale.engine import loop
from vqscale.engine.checkpoint import find_latest
from vqscale.engine.tensors import first_not_finite
from vqscale.files import read_json
from vqscale.topology import Topology


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    run_ranks(train, 1, config(run_dir))
    return run_dir


def names(run_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").glob("0*"))


def _error_of(settings: TinyConfig, **options: Any) -> str:
    try:
        train(settings, **options)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("tensors", "first"),
    [
        ({"a": torch.zeros(0), "n": torch.tensor([2])}, ""),
        ({"a": torch.tensor(3e38), "b": torch.full((2,), -3e38)}, ""),
        ({"a": torch.ones(3), "b": torch.tensor([1.0, math.nan, 2.0]), "c": torch.tensor(math.inf)}, "b"),
        ({"a": torch.tensor([math.inf, -math.inf]), "b": torch.tensor(math.nan)}, "a"),
        ({"a": torch.tensor([1.0, -math.inf], dtype=torch.bfloat16)}, "a"),
        ({}, ""),
    ],
)
def test_the_first_tensor_that_is_not_finite(tensors: dict[str, torch.Tensor], first: str, topology: Topology) -> None:
    assert first_not_finite(tensors, topology) == first


def _train_at_an_infinite_rate(settings: TinyConfig) -> str:
    """From 40 images on, each step's learning rate is infinite."""
    real = loop._learning_rate
    loop._learning_rate = lambda config, seen: math.inf if seen >= 40 else real(config, seen)
    try:
        return _error_of(settings)
    finally:
        loop._learning_rate = real


@pytest.mark.parametrize(
    ("strategy", "world", "save_every"), [("single", 1, 8), ("fsdp", 2, 16), ("ddp", 2, 8), ("zero2", 2, 8)]
)
def test_weights_that_are_not_finite_are_never_saved(
    uninterrupted: Path, tmp_path: Path, strategy: str, world: int, save_every: int
) -> None:
    settings = config(tmp_path, strategy=strategy, save_every=save_every, evaluate_every=16)
    for told in run_ranks(_train_at_an_infinite_rate, world, settings):
        assert told.startswith("model.")
        assert "is not finite after the step to 48 images, whose learning rate was inf" in told
    assert names(tmp_path)[-2:] == ([16, 32] if save_every == 16 else [32, 40])
    status = read_json(tmp_path / "status.json")
    assert status["state"] == "failed" and "is not finite" in status["reason"]
    assert all(tensor.isfinite().all() for tensor in saved(tmp_path).values())
    run_ranks(train, world, settings)
    assert names(tmp_path) == ([144, 160] if save_every == 16 else [152, 160])
    if world == 1:
        assert_bit_identical(saved(tmp_path), saved(uninterrupted))


def _spoil_an_average(settings: TinyConfig) -> str:
    """On the last rank the weight EMA becomes infinite at 24 images, which no loss shows."""
    update = loop.WeightEMA.update

    def spoiled(self: Any, images_seen: int, batch: int) -> None:
        update(self, images_seen, batch)
        if images_seen == 24 and os.environ["RANK"] == "1":
            self.averages["blocks.0.weight"].view(-1)[-1:].fill_(math.inf)

    loop.WeightEMA.update = spoiled  # type: ignore[method-assign]
    return _error_of(settings)


def test_an_average_that_is_not_finite_on_one_rank_ends_all_at_the_save(tmp_path: Path) -> None:
    settings = config(tmp_path, strategy="fsdp")
    for told in run_ranks(_spoil_an_average, 2, settings):
        assert told.startswith("ema.blocks.0.weight is not finite after the step to 32 images")
    assert names(tmp_path) == [16]


def _train_with_nan(settings: TinyConfig, positions: tuple[int, ...]) -> str:
    return _error_of(settings, nan_at=positions)


def test_after_a_skipped_step_nothing_is_saved_until_one_is_applied(tmp_path: Path) -> None:
    told = run_ranks(_train_with_nan, 1, config(tmp_path, save_every=8, keep_checkpoints=100), (47, 55, 90))
    assert told == [""]
    assert names(tmp_path) == [n for n in range(8, 168, 8) if n not in (48, 56, 96)]


def test_a_streak_of_skipped_steps_pushes_no_checkpoint_out(tmp_path: Path) -> None:
    positions = tuple(range(48, 160, 8))
    settings = config(tmp_path, save_every=8, max_skipped_steps=5)
    told = run_ranks(_train_with_nan, 2, settings, positions)
    assert len(set(told)) == 1 and told[0].startswith("5 steps in a row had no finite gradient, the last at 88 images")
    assert names(tmp_path) == [32, 40]  # 48 is not of those that training went on from
    assert "to 48 images, had a learning rate of 0.01" in (tmp_path / "log" / "0.log").read_text()


@pytest.mark.parametrize("rate", [1e38, 1e12])
def test_weights_that_are_finite_but_wrecked_replace_no_good_checkpoint(
    uninterrupted: Path, tmp_path: Path, rate: float
) -> None:
    settings = config(tmp_path, save_every=8, keep_checkpoints=1)
    run_ranks(_train_at_rate, 1, settings, rate)
    assert names(tmp_path) == [40]
    run_ranks(train, 1, settings)
    assert_bit_identical(saved(tmp_path), saved(uninterrupted))


def _train_at_rate(settings: TinyConfig, rate: float) -> str:
    """One step at that rate, after which every step is skipped, as with a deeper model."""
    real, width = loop._learning_rate, settings.global_batch
    loop._learning_rate = lambda config, seen: rate if seen == 40 else real(config, seen)
    return _error_of(settings, nan_at=tuple(range(48, 48 + 12 * width)))


def _stop_at_48(settings: TinyConfig, positions: tuple[int, ...]) -> str:
    def on_step(run: runtime.Run, seen: int) -> None:
        if seen == 48:
            (run.run_dir / "STOP").touch()
            run._stop_file_checked = 0.0

    try:
        return _error_of(settings, nan_at=positions, on_step=on_step)
    except runtime.Stopped as stopped:
        return str(stopped)


def test_a_stop_among_skipped_steps_waits_for_one_that_is_applied(tmp_path: Path) -> None:
    (told,) = run_ranks(_stop_at_48, 1, config(tmp_path, save_every=0), (48, 56, 64))
    assert told.startswith("asked to") and names(tmp_path) == [80]


def test_a_checkpoint_that_holds_nan_is_refused_by_name(tmp_path: Path) -> None:
    run_ranks(train, 1, config(tmp_path, total_images=32))
    (told,) = run_ranks(_load_nan, 1, config(tmp_path))
    assert "checkpoints/000000000032: model.head.bias is not finite; remove this folder to go on" in told


def _load_nan(settings: TinyConfig) -> str:
    real = loop.Checkpoint.load_into

    def load_into(self: Any, tensors: dict[str, torch.Tensor], *topology: Any) -> None:
        real(self, tensors, *topology)
        tensors["model.head.bias"][0] = math.nan

    loop.Checkpoint.load_into = load_into  # type: ignore[method-assign]
    return _error_of(settings)


# --- checkpoints that are gone ----------------------------------------------------------------------------------------


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path)


def _lose_status_too(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder.parent / "status.json").unlink()


@pytest.mark.parametrize("lose", [shutil.rmtree, _empty, _lose_status_too])
def test_a_run_whose_checkpoints_are_gone_does_not_start_from_zero(
    uninterrupted: Path, tmp_path: Path, lose: Any
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    lose(run_dir / "checkpoints")
    for _ in range(3):
        (told,) = run_ranks(_error_of, 1, config(run_dir))
        assert "checkpoints: the checkpoints of this run are gone, which has seen 160 images" in told
        assert "fresh=true" in told and "another run_dir" in told
    assert metrics(run_dir) == metrics(uninterrupted)
    run_ranks(train, 1, config(run_dir, fresh=True))
    assert_bit_identical(saved(run_dir), saved(uninterrupted))


def test_on_two_ranks_both_refuse(uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    told = run_ranks(_error_of, 2, config(run_dir))
    assert told[0] == told[1] and "has seen 160 images" in told[0]


def _fail_at_24(settings: TinyConfig) -> str:
    def on_step(run: runtime.Run, seen: int) -> None:
        if seen == 24:
            raise ValueError("on purpose")

    return _error_of(settings, on_step=on_step)


def test_a_run_that_ended_before_its_first_save_starts_again_and_says_so(uninterrupted: Path, tmp_path: Path) -> None:
    assert run_ranks(_fail_at_24, 1, config(tmp_path, save_every=64)) == ["on purpose"]
    run_ranks(train, 1, config(tmp_path))
    assert "starting from zero: the 16 images seen before were never saved" in (tmp_path / "log/0.log").read_text()
    assert_bit_identical(saved(tmp_path), saved(uninterrupted))


# --- saves by time ----------------------------------------------------------------------------------------------------


class _Ticks:
    """A clock of a rank, which goes on by so many seconds per step."""

    def __init__(self, per_step: float):
        self.now, self.per_step = 0.0, per_step

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now + 1.0


def _train_by_time(settings: TinyConfig) -> list[int]:
    """Images seen at which checkpoints were begun."""
    rank = int(os.environ.get("RANK", "0"))
    ticks, begun = _Ticks(15.0 if rank == 0 else 1.0), []
    real = loop.Checkpointer.save

    def save(self: Any, tensors: Any, state: Any) -> None:
        begun.append(state.images_seen)
        real(self, tensors, state)

    def on_step(run: runtime.Run, seen: int) -> None:
        ticks.now += ticks.per_step

    loop.time, loop.Checkpointer.save = ticks, save  # type: ignore[assignment, method-assign]
    train(settings, on_step=on_step)
    return begun


@pytest.mark.parametrize("world", [1, 2])
def test_checkpoints_by_time_are_agreed_by_all_ranks(uninterrupted: Path, tmp_path: Path, world: int) -> None:
    settings = config(tmp_path, save_every=0, save_minutes=1.0, log_every=0)
    begun = run_ranks(_train_by_time, world, settings)
    assert begun == [[40, 80, 120, 160]] * world  # four steps to a minute, and one until all know
    if world == 1:
        assert_bit_identical(saved(tmp_path), saved(uninterrupted))


def test_save_minutes_may_change_on_resume(tmp_path: Path) -> None:
    run_ranks(train, 1, config(tmp_path, total_images=32))
    run_ranks(train, 1, config(tmp_path, save_minutes=5.0))
    assert find_latest(tmp_path / "checkpoints").images_seen == 160  # type: ignore[union-attr]


# --- schedules that are not meant so ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ({}, {"warmup_images": 160}, "warmup_images=160: the run ends before, at total_images=160"),
        (
            {"schedule": "cosine", "total_images": 80},
            {"schedule": "cosine"},
            "schedule=cosine now ends at 160 images instead of 80: the learning rate goes on at 0.0",
        ),
        ({"total_images": 80}, {}, ""),
    ],
)
def test_odd_schedules_are_warned_of(tmp_path: Path, first: Any, then: Any, words: str) -> None:
    run_ranks(train, 1, config(tmp_path, total_images=first.pop("total_images", 16), **first))
    run_ranks(train, 1, config(tmp_path, **then))
    log = (tmp_path / "log" / "0.log").read_text()
    assert words in log and (words or "schedule=" not in log)


def test_the_memory_loader_counts_bad_samples_and_saves_apart(tmp_path: Path) -> None:
    """What rank 0 says of a save by time is no kind of bad sample."""
    (result,) = run_ranks(train, 1, config(tmp_path, save_minutes=1e-6, total_images=32))
    assert set(result["data"]["counted"]) <= set(MemoryLoader.bad_kinds)
