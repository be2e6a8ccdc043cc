"""Ranks that use a trained model share what verifying and reading it takes, and agree on a damaged one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.exports import export_vqvae
from support.loads import SEEN, counted_load, load_on_ranks, ranks_here, save_run

from vqscale.engine.checkpoint import Checkpointer, CheckpointState
from vqscale.sources import load_model
from vqscale.topology import ALONE, take_down

WORLD = 4


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_ranks(save_run, WORLD, str(folder))
    return folder


@pytest.mark.parametrize("options", [{}, {"checkpoint": SEEN, "weights_kind": "raw"}])
def test_each_rank_hashes_and_reads_a_share_and_has_the_whole_model(run_dir: Path, options: dict[str, Any]) -> None:
    alone, whole = counted_load(run_dir, ALONE, **options)
    loads = run_ranks(load_on_ranks, WORLD, str(run_dir), True, options)
    manifest = json.loads((run_dir / "checkpoints" / f"{SEEN:012d}" / "manifest.json").read_text())["files"]
    assert sorted(name for load in loads for name in load["files"]) == sorted(whole["files"]) == sorted(manifest)
    for load in loads:
        assert load["fingerprint"] == alone.fingerprint
        tensors = alone.model.state_dict()
        assert [name for name, tensor in tensors.items() if not torch.equal(load["tensors"][name], tensor)] == []
        assert load["hashed"] < 0.4 * whole["hashed"]
        assert load["read"] < 0.35 * whole["read"]
    assert sum(load["read"] for load in loads) == whole["read"]


def test_no_weights_are_read_that_the_model_does_not_get(run_dir: Path) -> None:
    source, counts = counted_load(run_dir, ALONE)
    assert counts["read"] == sum(t.numel() * t.element_size() for t in source.model.state_dict().values())


def test_an_exported_model_is_read_in_shares_too(tmp_path: Path) -> None:
    fingerprint = export_vqvae(tmp_path)
    _, whole = counted_load(tmp_path, ALONE)
    loads = run_ranks(load_on_ranks, WORLD, str(tmp_path), True, {})
    assert [load["fingerprint"] for load in loads] == [fingerprint] * WORLD
    assert all(load["read"] < 0.35 * whole["read"] for load in loads)


def _refuse(path: str, options: dict[str, Any]) -> str:
    topology = ranks_here()
    with pytest.raises(ValueError) as refusal:
        load_model(path, "vqvae", topology=topology, **options)
    take_down(orderly=True)
    return str(refusal.value)


@pytest.mark.parametrize("options", [{}, {"checkpoint": SEEN}])
def test_damage_that_one_rank_sees_is_refused_by_all_in_the_same_words(
    run_dir: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / f"{SEEN:012d}"
    damaged = sorted(folder.glob("*.safetensors"))[2]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    first, *others = run_ranks(_refuse, WORLD, str(tmp_path / "run"), options)
    assert others == [first] * (WORLD - 1)
    assert "\n" not in first and folder.name in first
    assert damaged.is_file(), "only a run itself sets its checkpoints aside"


def _read_one_tensor(folder: str) -> list[float]:
    topology = ranks_here()
    keeper = Checkpointer(Path(folder), topology, keep=1)
    keeper.save({"model.one": torch.full((2,), 7.0)}, CheckpointState(8, data={}))
    keeper.wait()
    latest = keeper.latest()
    assert latest is not None
    values = latest.read("model.", topology)["one"].tolist()
    take_down(orderly=True)
    return values


def test_more_ranks_than_tensors(tmp_path: Path) -> None:
    assert run_ranks(_read_one_tensor, 3, str(tmp_path)) == [[7.0, 7.0]] * 3
