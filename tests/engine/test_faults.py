"""Faults inside a save and around it: what is on disk at every instant, and what the next start makes of it."""

import os
import pickle
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import faults
from support.distributed import run_ranks, started
from support.training import TinyConfig, assert_bit_identical, config, losses, saved, train, whole

from vqscale import rundir, runtime
from vqscale.engine import checkpoint as checkpoints
from vqscale.engine.checkpoint import Checkpoint, Checkpointer, CheckpointState, find_latest, verify
from vqscale.engine.parallel import make_engine
from vqscale.files import write_json
from vqscale.topology import Topology, bring_up, take_down


def train_with_a_fault(settings: TinyConfig) -> None:
    faults.install_from_environment()
    train(settings)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    run_ranks(train, 1, config(run_dir))
    return run_dir


def die_in_a_save_and_go_on(run_dir: Path, world: int, fault: str, **changes: Any) -> None:
    """The fault ends the job; a whole checkpoint is there; the next start ends the run from it."""
    settings = config(run_dir, **changes)
    with started(train_with_a_fault, world, settings, variables={"FAULT": fault}) as ranks:
        codes = ranks.wait(60)
        assert -signal.SIGKILL in codes and 0 not in codes, ranks.output()
    latest = find_latest(run_dir / "checkpoints", set_aside=False)
    assert latest is not None and 16 <= latest.images_seen <= 48
    assert all(verify(path) == "" for path in (run_dir / "checkpoints").glob("0*"))
    results = run_ranks(train, world, settings)
    assert sorted(p for r in results for p in r["consumed"]) == list(range(latest.images_seen, 160))
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert left == {"000000000144", "000000000160"}


@pytest.mark.parametrize("point", faults.POINTS)
def test_killed_inside_a_save_a_whole_checkpoint_is_always_there(
    uninterrupted: Path, tmp_path: Path, point: str
) -> None:
    die_in_a_save_and_go_on(tmp_path, 1, f"{point}@3")
    assert_bit_identical(saved(tmp_path), saved(uninterrupted))


@pytest.mark.slow
def test_one_rank_or_all_killed_inside_a_save(tmp_path: Path) -> None:
    expected = tmp_path / "uninterrupted"
    run_ranks(train, 2, config(expected, strategy="fsdp"))
    for point, rank in (("nothing written", "@1"), ("shard written", "@0"), ("shard written", "@1")):
        run_dir = tmp_path / f"{point}{rank}"
        die_in_a_save_and_go_on(run_dir, 2, f"{point}@3{rank}", strategy="fsdp")
        assert_bit_identical(saved(run_dir), saved(expected))
        assert losses(run_dir) == losses(expected)
    for point in ("nothing written", "shard written", "synced", "in retention"):  # on all ranks that pass it
        run_dir = tmp_path / point
        die_in_a_save_and_go_on(run_dir, 2, f"{point}@3", strategy="fsdp")
        assert_bit_identical(saved(run_dir), saved(expected))


def some_tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((16, 16), value), "model.steps": torch.tensor(int(value))}


def test_until_a_save_is_durable_the_one_before_it_stays(
    tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Checkpointer(tmp_path, topology, keep=1)
    keeper.save(some_tensors(8), CheckpointState(8, data={}))
    keeper.wait()
    may_write, synced = threading.Event(), checkpoints.fsync

    def blocked(path: Path) -> None:
        assert may_write.wait(30)
        synced(path)

    monkeypatch.setattr(checkpoints, "fsync", blocked)
    keeper.save(some_tensors(16), CheckpointState(16, data={}))
    for _ in range(20):
        latest = find_latest(tmp_path, set_aside=False)
        assert latest is not None and latest.images_seen == 8
        time.sleep(0.01)
    may_write.set()
    keeper.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["000000000016"]


FORMATS = Path(__file__).parent / "formats"


@pytest.mark.parametrize("number", range(1, checkpoints.FORMAT + 1))
def test_checkpoints_of_every_format_load(number: int, topology: Topology) -> None:
    """Committed files, written when the format was new."""
    latest = find_latest(FORMATS / str(number), set_aside=False)
    assert latest is not None and latest.images_seen == 24
    expected = {
        "model.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3) / 8,
        "model.codebook": torch.arange(4, dtype=torch.float64) - 1.5,
        "ema.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3) / 16,
        "optimizer.half": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
        "model.updates": torch.tensor(3),
    }
    assert_bit_identical(latest.read(""), expected)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    latest.load_into(tensors)
    assert_bit_identical(tensors, expected)
    assert latest.state == CheckpointState(24, data={"consumed_samples": 24}, optimizer_steps=3)


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


def test_nothing_in_a_checkpoint_can_run_code(tmp_path: Path, topology: Topology) -> None:
    """Whoever writes the files writes the manifest too: it must not take a verified pickle for data."""
    sentinel = tmp_path / "sentinel"
    keeper = Checkpointer(tmp_path / "checkpoints", topology, keep=1)
    keeper.save(some_tensors(8), CheckpointState(8, data={}))
    keeper.wait()
    folder = keeper.folder / "000000000008"
    attack = pickle.dumps(Malicious(sentinel))
    (shard,) = folder.glob("*.safetensors")
    good = shard.read_bytes()
    for victim, content in (
        (folder / ".metadata", attack),
        (folder / "optimizer.pt", attack),
        (shard, attack),
        (folder / "state.json", attack),
        (shard, good[:8] + attack),
    ):
        shutil.rmtree(folder)
        keeper.save(some_tensors(8), CheckpointState(8, data={}))
        keeper.wait()
        victim.write_bytes(content)
        files = [path for path in folder.iterdir() if path.name != "manifest.json"]
        entries = {p.name: {"sha256": checkpoints.sha256_of(p), "bytes": p.stat().st_size} for p in files}
        write_json(folder / "manifest.json", {"files": entries})
        assert verify(folder) == ""
        if victim.suffix in (".safetensors", ".json"):
            with pytest.raises(ValueError):
                Checkpoint(folder).read("")
            with pytest.raises(ValueError):
                Checkpoint(folder).load_into(some_tensors(0))
        else:
            assert_bit_identical(Checkpoint(folder).read(""), some_tensors(8))
        assert not sentinel.exists()
    pickle.loads(attack)
    assert sentinel.exists()  # the attack itself would have worked


class Wide(torch.nn.Linear):
    """Large enough that each of four ranks holds a part of it."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def wrap_units(self) -> list[torch.nn.Module]:
        return []


def _carry(settings: TinyConfig, folder: str, first: bool, number: int) -> list[float]:
    """Load what the ranks before left (or, first, mark this rank's part of every tensor), save it again; what this rank
    holds of it."""
    topology = bring_up(settings)
    engine = make_engine(Wide(), topology, settings, 1)
    keeper = Checkpointer(Path(folder), topology, keep=1)
    if first:
        marks = {name: torch.full_like(part, 1000.0 + topology.rank) for name, part in engine.local_weights().items()}
        engine.exchange_weights(marks)
    else:
        latest = keeper.latest()
        assert latest is not None
        engine.from_checkpoint_tensors(latest.load_into, {})
    keeper.save(engine.as_checkpoint_tensors({}), CheckpointState(number, data={}))
    keeper.wait()
    values = [
        whole(t).flatten() for name, t in sorted(engine.as_checkpoint_tensors({}).items()) if name.startswith("model.")
    ]
    take_down(orderly=True)
    return torch.cat(values).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_no_ranks_state_is_dropped_when_ranks_shrink_and_grow(tmp_path: Path, strategy: str) -> None:
    settings = config(tmp_path, strategy=strategy)
    marked = run_ranks(_carry, 4, settings, str(tmp_path), True, 1)[0]
    assert {1000.0, 1001.0, 1002.0, 1003.0} <= set(marked)
    for number, world in enumerate((2, 4), 2):
        for carried in run_ranks(_carry, world, settings, str(tmp_path), False, number):
            assert carried == marked


def _train_with_bad(settings: TinyConfig, positions: tuple[int, ...]) -> Any:
    return train(settings, bad=positions)["data"]


@pytest.mark.slow
def test_what_only_one_rank_saw_is_known_to_all_at_any_world_size(tmp_path: Path) -> None:
    """A bad sample in the last rank's part of each leg."""
    for total, world in ((48, 4), (96, 2), (160, 4)):
        settings = config(tmp_path, total_images=total, strategy="fsdp")
        states = run_ranks(_train_with_bad, world, settings, (47, 95, 159))
    assert states == [{"consumed": 160, "counted": {"decode": 3}}] * 4


def _train_on_a_full_log_disk(settings: TinyConfig) -> None:
    run_dir = Path(settings.run_dir)
    run_dir.mkdir(exist_ok=True)
    (run_dir / "tensorboard").touch()  # where a folder should be

    def on_step(run: runtime.Run, seen: int) -> None:
        if seen == 8:
            (run_dir / "metrics.jsonl").symlink_to("/dev/full")
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, run._handlers[0].stream.fileno())

    train(settings, on_step=on_step)


def test_logs_and_trackers_that_fail_change_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    run_ranks(_train_on_a_full_log_disk, 1, replace(config(tmp_path), trackers=["tensorboard"]))
    assert rundir.read_status(tmp_path)["state"] == "done"
    assert_bit_identical(saved(tmp_path), saved(uninterrupted))


def _train_on_a_full_disk(settings: TinyConfig) -> str:
    def on_step(run: runtime.Run, seen: int) -> None:
        if seen == 40:
            faults.full_disk()

    try:
        train(settings, on_step=on_step)
    except OSError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_fills_up_ends_the_run_by_name_and_leaves_what_was_saved(
    uninterrupted: Path, tmp_path: Path, world: int
) -> None:
    settings = config(tmp_path)
    for told in run_ranks(_train_on_a_full_disk, world, settings):
        assert f"a checkpoint could not be written to {tmp_path / 'checkpoints'}" in told
    left = sorted((tmp_path / "checkpoints").glob("0*"))
    assert [path.name for path in left] in (["000000000016"], ["000000000016", "000000000032"])  # as far as it came
    assert all(verify(path) == "" for path in left)
    run_ranks(train, world, settings)
    assert not list((tmp_path / "checkpoints").glob(".saving-*"))
    if world == 1:
        assert_bit_identical(saved(tmp_path), saved(uninterrupted))
