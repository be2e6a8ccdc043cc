import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import faults
from support.distributed import run_ranks
from torch import Tensor

from vqscale.config import StageConfig
from vqscale.engine import checkpoint as checkpoints
from vqscale.engine.checkpoint import Checkpointer, CheckpointState, find_latest, verify
from vqscale.topology import Topology, bring_up, take_down


def state_at(images_seen: int) -> CheckpointState:
    return CheckpointState(images_seen, data={"consumed_samples": 8}, optimizer_steps=images_seen)


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(7, 5, generator=generator),
        "model.steps": torch.tensor(seed + 3),
        "model.half": torch.randn(4, generator=generator).to(torch.bfloat16),
        "ema.weight": torch.randn(7, 5, generator=generator, dtype=torch.float64),
    }


def zeros_like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.fixture
def folder(tmp_path: Path, topology: Topology) -> Path:
    """Three checkpoints, of the tensors of seeds 8, 16 and 24."""
    keeper = Checkpointer(tmp_path / "checkpoints", topology, keep=5)
    for seen in (8, 16, 24):
        keeper.save(some_tensors(seen), state_at(seen))
    keeper.wait()
    return keeper.folder


def loaded_seed(folder: Path) -> int:
    """Which of the three saves the latest is, by its state and bit for bit by its tensors."""
    latest = find_latest(folder)
    assert latest is not None
    seed = latest.state.optimizer_steps
    tensors = zeros_like(some_tensors())
    latest.load_into(tensors)
    assert_same(tensors, some_tensors(seed))
    assert latest.images_seen == seed
    return seed


def test_what_is_saved_is_loaded(folder: Path) -> None:
    assert loaded_seed(folder) == 24
    latest = find_latest(folder)
    assert latest is not None and latest.state.data == {"consumed_samples": 8}
    assert_same(latest.read("ema."), {"weight": some_tensors(24)["ema.weight"]})
    assert latest.read("nothing.") == {}


def test_anyone_can_open_a_checkpoint(folder: Path) -> None:
    files = {path.name for path in (folder / "000000000024").iterdir()}
    (shard,) = [name for name in files if name.endswith(".safetensors")]
    assert files - {shard} == {"state.json", "manifest.json"}
    assert_same(load_file(folder / "000000000024" / shard), some_tensors(24))


def test_nothing_there_is_no_checkpoint(tmp_path: Path, topology: Topology) -> None:
    assert find_latest(tmp_path / "nowhere") is None
    assert Checkpointer(tmp_path / "new", topology, keep=1).latest() is None


def test_changes_after_save_do_not_reach_the_file(tmp_path: Path, topology: Topology) -> None:
    keeper = Checkpointer(tmp_path, topology, keep=2)
    tensors = {f"model.{i}": torch.full((256, 1024), float(i)) for i in range(8)}
    data = {"consumed_samples": 1}
    keeper.save(tensors, CheckpointState(8, data=data))
    for tensor in tensors.values():
        tensor.fill_(-1.0)
    data["consumed_samples"] = 2
    keeper.wait()
    latest = keeper.latest()
    assert latest is not None and latest.state.data == {"consumed_samples": 1}
    read = latest.read("model.")
    assert all((read[str(i)] == float(i)).all() for i in range(8))


def test_only_the_newest_are_kept(tmp_path: Path, topology: Topology) -> None:
    keeper = Checkpointer(tmp_path, topology, keep=2)
    for seen in (8, 16, 24, 32):
        keeper.save(some_tensors(seen), state_at(seen))
        keeper.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000024", "000000000032"]


def test_the_same_place_is_not_saved_twice(tmp_path: Path, topology: Topology) -> None:
    keeper = Checkpointer(tmp_path, topology, keep=2)
    keeper.save(some_tensors(1), state_at(8))
    keeper.wait()
    keeper.save(some_tensors(2), state_at(8))
    keeper.wait()
    latest = keeper.latest()
    assert latest is not None
    assert_same(latest.read("model."), {k[6:]: v for k, v in some_tensors(1).items() if k.startswith("model.")})


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "bit flip": lambda f: _flip_a_bit(next(f.glob("*.safetensors"))),
    "bit flip in state": lambda f: _flip_a_bit(f / "state.json"),
    "truncation": lambda f: os.truncate(next(f.glob("*.safetensors")), 100),
    "a file missing": lambda f: next(f.glob("*.safetensors")).unlink(),
    "a file too many": lambda f: (f / "stray").touch(),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "an empty manifest": lambda f: (f / "manifest.json").write_text(""),
    "a manifest of another kind": lambda f: (f / "manifest.json").write_text("[1]"),
    "an empty folder": lambda f: [p.unlink() for p in f.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_previous_used(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[damage](folder / "000000000024")
    assert loaded_seed(folder) == 16
    assert "000000000024 IS DAMAGED" in caplog.text
    assert len(list(folder.glob("damaged-000000000024-*"))) == 1
    assert loaded_seed(folder) == 16


def test_another_runs_checkpoints_are_not_touched(folder: Path) -> None:
    _flip_a_bit(folder / "000000000024" / "state.json")
    before = sorted(path.name for path in folder.iterdir())
    latest = find_latest(folder, set_aside=False)
    assert latest is not None and latest.images_seen == 16
    assert sorted(path.name for path in folder.iterdir()) == before


def test_when_all_are_damaged_nothing_starts_from_zero(folder: Path, topology: Topology) -> None:
    for path in folder.iterdir():
        _flip_a_bit(path / "manifest.json")
    for _ in range(2):
        with pytest.raises(ValueError, match="every checkpoint is damaged .*not starting again from zero"):
            Checkpointer(folder, topology, keep=2).latest()
    assert checkpoints.has_checkpoint(folder)


def test_half_written_and_odd_names_are_ignored(folder: Path, topology: Topology) -> None:
    shutil.copytree(folder / "000000000016", folder / ".saving-000000000032")
    (folder / ".saving-000000000032" / "manifest.json").unlink()
    for odd in ("latest", "00000000004x", "0000000000400", "000000000040.tmp"):
        (folder / odd).mkdir()
    assert loaded_seed(folder) == 24
    Checkpointer(folder, topology, keep=2)
    assert not (folder / ".saving-000000000032").exists()


def test_random_damage_is_never_loaded_silently(folder: Path) -> None:
    chance = random.Random(1)
    whole = folder / "000000000024"
    for trial in range(60):
        damaged = folder.parent / f"trial-{trial}"
        shutil.copytree(whole, damaged)
        what = faults.damage(damaged, chance)
        assert verify(damaged), f"trial {trial}: {what} was not seen"
    assert verify(whole) == ""


def test_every_byte_of_the_manifest_counts(folder: Path) -> None:
    manifest = folder / "000000000024" / "manifest.json"
    data = manifest.read_bytes()
    for place in range(len(data)):
        manifest.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert verify(manifest.parent), f"byte {place} ({data[place : place + 1]!r})"
    manifest.write_bytes(data)
    assert verify(manifest.parent) == ""


def test_another_format_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FORMAT", 99)
    with pytest.raises(ValueError, match="000000000024: checkpoint format 1, this program reads 99"):
        find_latest(folder)
    assert (folder / "000000000024").is_dir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("ema.weight"), "only the checkpoint has the tensor ema.weight"),
        (lambda t: t.update(other=torch.zeros(1)), "only this run has the tensor other"),
        (lambda t: t.update({"model.weight": torch.zeros(5, 7)}), r"model.weight is .*\[7, 5\].* and .*\[5, 7\]"),
        (lambda t: t.update({"model.steps": torch.zeros(())}), "model.steps is .*int64.* and .*float32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, change: Any, words: str) -> None:
    tensors = zeros_like(some_tensors())
    change(tensors)
    latest = find_latest(folder)
    assert latest is not None
    with pytest.raises(ValueError, match=words):
        latest.load_into(tensors)


def test_nothing_in_a_checkpoint_is_a_pickle(folder: Path) -> None:
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}


def _save_where_it_fails(folder: str, fault: str) -> list[str]:
    """Two saves, the second with a fault; returns what the run was told at each."""
    topology = bring_up(StageConfig(device="cpu", threads=1))
    keeper = Checkpointer(Path(folder), topology, keep=1)
    keeper.save(some_tensors(8), state_at(8))
    keeper.wait()
    told = []
    if topology.is_main and fault == "no space for a folder":
        (Path(folder) / ".saving-000000000016").touch()
        shutil.rmtree = lambda *a, **k: None  # what is in the way stays there
    if topology.is_main and fault == "commit":

        def no_space(path: Path) -> str:
            raise OSError(28, "No space left on device")

        checkpoints.sha256_of = no_space
    if fault == "write":
        faults.full_disk()
    if topology.is_main and fault == "too little space":
        shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(1000, 900, 100)
    try:
        keeper.save(some_tensors(16), state_at(16))
        keeper.wait()
    except OSError as error:
        told.append(str(error))
    take_down(orderly=True)
    return told


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("fault", ["no space for a folder", "commit", "write", "too little space"])
def test_a_save_that_fails_is_an_error_on_all_ranks_and_the_old_one_stays(
    tmp_path: Path, world: int, fault: str
) -> None:
    for (told,) in run_ranks(_save_where_it_fails, world, str(tmp_path), fault):
        assert "a checkpoint could not be written to" in told
        assert "\n" not in told
        if fault == "too little space":
            assert "it needs 436 bytes, 100 are free; earlier checkpoints are untouched" in told
            assert not list(tmp_path.glob(".saving-*"))
    latest = find_latest(tmp_path)
    assert latest is not None and latest.images_seen == 8


def _save_in_time(folder: str) -> list[int]:
    topology = bring_up(StageConfig(device="cpu", threads=1))
    keeper = Checkpointer(Path(folder), topology, keep=2)
    noise = torch.zeros(1000)
    for seen in range(8, 88, 8):
        keeper.save(some_tensors(seen), state_at(seen))
        for _ in range(20):  # training's own collectives, while the save's run
            topology.all_reduce_(noise)
    keeper.wait()
    take_down(orderly=True)
    return [int(p.name) for p in sorted(Path(folder).iterdir())]


def test_saves_of_two_ranks_beside_their_collectives(tmp_path: Path, topology: Topology) -> None:
    assert run_ranks(_save_in_time, 2, str(tmp_path))[0] == [72, 80]
    assert loaded_seed(tmp_path) == 80


def test_state_json_describes_the_tensors(folder: Path) -> None:
    state = json.loads((folder / "000000000024" / "state.json").read_text())
    assert state["tensors"]["model.weight"] == ["float32", [7, 5]]
    assert (state["format"], state["images_seen"]) == (checkpoints.FORMAT, 24)
