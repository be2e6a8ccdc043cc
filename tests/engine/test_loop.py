import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import Ranks, run_ranks, started
from support.training import TinyConfig, TinyModel, assert_bit_identical, config, losses, metrics, saved, train

from vqscale import rundir, runtime
from vqscale.engine.checkpoint import find_latest
from vqscale.files import read_json


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run that nothing happened to, on one process."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    run_ranks(train, 1, config(run_dir))
    return run_dir


def test_a_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    status = rundir.read_status(uninterrupted)
    assert (status["state"], status["images_seen"]) == ("done", 160)
    lines = metrics(uninterrupted)
    assert [line["images_seen"] for line in lines] == list(range(8, 168, 8))
    keys = {"images_seen", "loss", "largest", "average", "gradient_norm", "learning_rate"}
    assert keys | {"images_per_second", "data_wait_fraction"} == lines[0].keys()
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert [line["learning_rate"] for line in lines][:3] == pytest.approx([1e-2 / 17, 9e-2 / 17, 1e-2])
    assert [p.name for p in sorted((uninterrupted / "checkpoints").iterdir())] == ["000000000144", "000000000160"]
    names = saved(uninterrupted).keys()
    assert {"model.head.bias", "model.average", "optimizer.exp_avg.head.bias", "ema.head.bias"} <= names
    command = read_json(uninterrupted / "command.json")
    assert (command["resumed_from"], command["precision"]) == (0, "fp32")
    held = sum(p.numel() for p in TinyModel().parameters()) * 4
    assert command["bytes_per_rank"] == {"parameters": [held], "optimizer": [2 * held]}


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    (result,) = run_ranks(train, 1, config(run_dir))
    assert result["consumed"] == []
    assert metrics(run_dir) == metrics(uninterrupted)
    assert_bit_identical(saved(run_dir), saved(uninterrupted))
    assert "nothing left to do: already trained on 160" in (run_dir / "log" / "0.log").read_text()


def test_a_run_goes_on_to_a_larger_total(uninterrupted: Path, tmp_path: Path) -> None:
    first = run_ranks(train, 1, config(tmp_path, total_images=64))[0]
    second = run_ranks(train, 1, config(tmp_path))[0]
    assert first["consumed"] + second["consumed"] == list(range(160))
    assert_bit_identical(saved(tmp_path), saved(uninterrupted))
    assert losses(tmp_path) == losses(uninterrupted)
    assert read_json(tmp_path / "command.json")["resumed_from"] == 64


def run_until_done(settings: TinyConfig, world: int, kill: Any, most: int = 60) -> int:
    """Start, let `kill` do its worst, start again …; returns how many starts ended by a kill.

    Ranks that outlive a killed one are killed too, as a launcher would.
    """
    kills = 0
    for _ in range(most):
        with started(train, world, settings) as ranks:
            codes = ranks.wait(5 if kill(ranks, kills) else 120)
            if codes == [0] * world:
                return kills
            assert -signal.SIGKILL in codes, ranks.output()
            kills += 1
    raise AssertionError(f"not done after {most} starts")


def kill_at_random(run_dir: Path, chance: random.Random, most: int, victims: list[int] | None = None) -> Any:
    def kill(ranks: Ranks, kills: int) -> bool:
        if kills >= most:
            return False  # the last one may finish
        until = time.monotonic() + 60
        while read_json(run_dir / "status.json").get("pid") != ranks.pids[0] and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.8))
        ranks.signal(signal.SIGKILL, victims)
        return True

    return kill


@pytest.mark.slow
def test_killed_at_random_places_a_run_ends_bit_identical(uninterrupted: Path, tmp_path: Path) -> None:
    settings = config(tmp_path, step_seconds=0.15)
    kills = run_until_done(settings, 1, kill_at_random(tmp_path, random.Random(2), 12))
    assert kills >= 3
    assert_bit_identical(saved(tmp_path), saved(uninterrupted))
    assert losses(tmp_path) == losses(uninterrupted)
    assert read_json(tmp_path / "command.json")["restarts"] == kills


def _train_and_die_at(settings: TinyConfig, at: int) -> None:
    train(settings, on_step=lambda run, seen: os.kill(os.getpid(), signal.SIGKILL) if seen == at else None)


def test_lines_of_steps_that_were_lost_are_lost_too(uninterrupted: Path, tmp_path: Path) -> None:
    with started(_train_and_die_at, 1, config(tmp_path), 80) as ranks:
        assert ranks.wait(60) == [-signal.SIGKILL], ranks.output()
    assert [line["images_seen"] for line in metrics(tmp_path)] == list(range(8, 80, 8))
    run_ranks(train, 1, config(tmp_path))
    assert [line["images_seen"] for line in metrics(tmp_path)] == list(range(8, 168, 8))
    assert losses(tmp_path) == losses(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_job_and_the_rerun_is_bit_identical(tmp_path: Path, strategy: str) -> None:
    for name in ("one", "other"):
        settings = config(tmp_path / name, strategy=strategy, step_seconds=0.15 if name == "other" else 0.0)
        victim = kill_at_random(tmp_path / name, random.Random(3), 6, [1])
        kills = run_until_done(settings, 2, victim if name == "other" else lambda ranks, kills: False)
    assert kills >= 2
    assert_bit_identical(saved(tmp_path / "other"), saved(tmp_path / "one"))
    assert losses(tmp_path / "other") == losses(tmp_path / "one")


def _signal_myself(settings: TinyConfig, rank: int, at: int, name: str) -> Any:
    def on_step(run: runtime.Run, seen: int) -> None:
        if run.topology.rank == rank and seen == at:
            os.kill(os.getpid(), getattr(signal, name))

    try:
        return train(settings, on_step=on_step)
    except runtime.Stopped as stopped:
        return str(stopped)


@pytest.mark.parametrize(("name", "world"), [("SIGTERM", 1), ("SIGUSR1", 1), ("SIGUSR2", 2)])
def test_asked_to_stop_it_saves_and_goes_on_later(uninterrupted: Path, tmp_path: Path, name: str, world: int) -> None:
    settings = config(tmp_path, save_every=0)
    told = run_ranks(_signal_myself, world, settings, world - 1, 40, name)
    assert told[0].startswith("asked to") and len(set(told)) == 1
    status = rundir.read_status(tmp_path)
    assert status["state"] == "stopped"
    assert 40 <= status["images_seen"] <= 48
    latest = find_latest(tmp_path / "checkpoints")
    assert latest is not None and latest.images_seen == status["images_seen"]
    results = run_ranks(train, world, settings)
    assert sorted(p for r in results for p in r["consumed"]) == list(range(latest.images_seen, 160))
    if world == 1:
        assert_bit_identical(saved(tmp_path), saved(uninterrupted))


@pytest.mark.slow
def test_strategies_and_world_sizes_resume_each_other(uninterrupted: Path, tmp_path: Path) -> None:
    legs = [("single", 1, 40), ("fsdp", 2, 80), ("ddp", 2, 120), ("fsdp", 2, 136), ("single", 1, 160)]
    for strategy, world, total in legs:
        results = run_ranks(train, world, config(tmp_path, strategy=strategy, total_images=total))
        consumed = sorted(p for result in results for p in result["consumed"])
        assert consumed == list(range(total - len(consumed), total))
    expected = losses(uninterrupted)
    ours = losses(tmp_path)
    assert ours.keys() == expected.keys()
    assert max(abs(ours[seen] - expected[seen]) for seen in expected) < 1e-5
    for name, tensor in saved(uninterrupted).items():
        torch.testing.assert_close(saved(tmp_path)[name], tensor, rtol=0, atol=1e-5, msg=name)


def _train_with_nan(settings: TinyConfig, positions: tuple[int, ...]) -> Any:
    try:
        return train(settings, nan_at=positions)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path: Path, strategy: str) -> None:
    results = run_ranks(_train_with_nan, 2, config(tmp_path, strategy=strategy), (47,))  # rank 1's part of step 6
    skipped = [step for step in range(20) if step != 5]
    for result in results:
        assert [step for step, applied in enumerate(result["applied"]) if applied] == skipped
        assert result["optimizer_steps"] == 19
        assert all(tensor.isfinite().all() for tensor in result["tensors"].values())
    assert_bit_identical(results[0]["tensors"], results[1]["tensors"])
    assert [line["images_seen"] for line in metrics(tmp_path) if line["loss"] is None] == [48]
    latest = find_latest(tmp_path / "checkpoints")
    assert latest is not None and latest.state.skipped_steps == 1
    assert all(tensor.isfinite().all() for tensor in saved(tmp_path).values())
    first, second = ((tmp_path / "log" / f"{rank}.log").read_text() for rank in (0, 1))
    assert "the step to 48 images is left out (no finite gradient); finite losses here: memory:0040, " in first
    told = "; a loss that is not finite: memory:0044, memory:0045, memory:0046, memory:0047\n"
    assert told in second and told not in first


def test_many_such_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    settings = config(tmp_path, max_skipped_steps=3)
    results = run_ranks(_train_with_nan, 2, settings, (40, 55, 56))
    told = "3 steps in a row had no finite gradient, the last at 64 images; log/<rank>.log names their samples"
    assert results == [told] * 2
    assert rundir.read_status(tmp_path)["state"] == "failed"
    latest = find_latest(tmp_path / "checkpoints")
    assert latest is not None and latest.images_seen <= 48


def _train_with_bad(settings: TinyConfig, positions: tuple[int, ...]) -> Any:
    return train(settings, bad=positions)["data"]


def test_unreadable_samples_are_counted_once_over_all_ranks(tmp_path: Path) -> None:
    for total in (64, 160):
        states = run_ranks(_train_with_bad, 2, config(tmp_path, total_images=total), (3, 7, 63, 64, 159))
    assert states == [{"consumed": 160, "counted": {"decode": 5}}] * 2


@pytest.mark.parametrize("nan_at", [(), (47,)])
def test_the_weight_average_takes_in_every_applied_step(tmp_path: Path, nan_at: tuple[int, ...]) -> None:
    (result,) = run_ranks(_train_with_nan, 1, config(tmp_path), nan_at)
    average = TinyModel().head.bias.detach()
    for step, (bias, applied) in enumerate(zip(result["biases"], result["applied"], strict=True), 1):
        if applied:
            average = average.lerp(bias, 1 - 0.5 ** (8 / min(32, 0.05 * 8 * step)))
    torch.testing.assert_close(saved(tmp_path)["ema.head.bias"], average, rtol=0, atol=1e-6)


def held_out(model: torch.nn.Module, images_seen: int) -> Any:
    """An evaluation that looks at which weights it was given."""
    assert not model.training and not torch.is_grad_enabled()
    yield "held_out", float(model.head.weight.detach().abs().sum())


def _train_and_evaluate(settings: TinyConfig, every: int) -> Any:
    return train(replace(settings, evaluate_every=every), evaluate=held_out)


def test_evaluations_run_at_their_cadence_on_the_averaged_weights(uninterrupted: Path, tmp_path: Path) -> None:
    run_ranks(_train_and_evaluate, 1, config(tmp_path), 48)
    figures = {line["images_seen"]: line["held_out"] for line in metrics(tmp_path) if "held_out" in line}
    assert sorted(figures) == [48, 96, 144, 160]
    tensors = saved(tmp_path)
    assert figures[160] == pytest.approx(tensors["ema.head.weight"].abs().sum().item(), rel=1e-6)
    assert figures[160] != pytest.approx(tensors["model.head.weight"].abs().sum().item(), rel=1e-6)
    assert_bit_identical(tensors, saved(uninterrupted))


class Interrupted:
    """An evaluation of three batches, asked to stop before the second one on one rank."""

    live: Any = None

    def __call__(self, model: torch.nn.Module, images_seen: int) -> Any:
        for batch in range(3):
            if batch == 1 and self.live.topology.rank == self.live.topology.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            self.live.poll_together()
        yield from held_out(model, images_seen)


def _train_and_stop_in_evaluation(settings: TinyConfig, every: int) -> str:
    evaluate, settings = Interrupted(), replace(settings, evaluate_every=every)
    try:
        train(settings, evaluate=evaluate, on_step=lambda run, seen: setattr(evaluate, "live", run))
    except runtime.Stopped as stopped:
        return str(stopped)
    return ""


@pytest.mark.parametrize(("world", "every"), [(2, 48), pytest.param(1, 48, marks=pytest.mark.slow), (1, 160)])
def test_a_stop_in_an_evaluation_is_honoured_there_and_the_figures_come_later(
    uninterrupted: Path, tmp_path: Path, world: int, every: int
) -> None:
    told = run_ranks(_train_and_stop_in_evaluation, world, config(tmp_path), every)
    assert len(set(told)) == 1 and f"at {every} of 160" in told[0]
    assert not any("held_out" in line for line in metrics(tmp_path))
    assert rundir.read_status(tmp_path)["state"] == "stopped"
    for _ in range(2):  # the second start finds a finished run
        run_ranks(_train_and_evaluate, world, config(tmp_path), every)
        seen = [line["images_seen"] for line in metrics(tmp_path) if "held_out" in line]
        assert seen == [*range(every, 160, every), 160]
    if world == 1:
        assert_bit_identical(saved(tmp_path), saved(uninterrupted))


def _train_another_model(settings: TinyConfig, averaged: bool) -> str:
    try:
        train(replace(settings, ema_halflife=32 if averaged else 0))
    except ValueError as error:
        return str(error)
    return ""


def test_a_checkpoint_that_does_not_fit_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    (refused,) = run_ranks(_train_another_model, 1, config(tmp_path), False)
    assert "only the checkpoint has the tensor ema." in refused


def _train_and_fail(settings: TinyConfig) -> str:
    def on_step(run: runtime.Run, seen: int) -> None:
        if seen == 24:
            raise OSError("the disk is gone")

    try:
        train(settings, on_step=on_step)
    except OSError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world", [1, 2])
def test_an_error_right_after_a_save_does_not_lose_it(tmp_path: Path, world: int) -> None:
    assert run_ranks(_train_and_fail, world, config(tmp_path)) == ["the disk is gone"] * world
    latest = find_latest(tmp_path / "checkpoints")
    assert latest is not None and latest.images_seen == 16
    assert rundir.read_status(tmp_path)["state"] == "failed"


def _generator_states(settings: TinyConfig) -> bool:
    states = []
    train(settings, on_step=lambda run, seen: states.append(torch.get_rng_state()))
    return len(states) == 20 and all(torch.equal(state, states[0]) for state in [*states, torch.get_rng_state()])


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    assert run_ranks(_generator_states, 1, config(tmp_path)) == [True]
