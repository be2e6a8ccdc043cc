"""Buffers into which a save's tensors are copied on a GPU: kept from save to save. Here they are not pinned."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import staging
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from vqscale.engine.checkpoint import Checkpointer, CheckpointState
from vqscale.engine.tensors import local_part
from vqscale.topology import Topology


@pytest.fixture
def tensors(topology: Topology) -> dict[str, Tensor]:
    """Plain, of no dimension, a view, and sharded, as a rank's state has them."""
    whole = torch.zeros(8, 6)
    sharded = distribute_tensor(torch.zeros(8, 6), init_device_mesh("cpu", (1,)), [Shard(0)])
    return {"plain": torch.zeros(3, 4), "step": torch.tensor(0.0), "view": whole[2:4].t(), "sharded": sharded}


@pytest.fixture
def keeper(tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch) -> Checkpointer:
    """As on a GPU, but without pinned memory, which needs one."""
    create = staging._create_cpu_state_dict
    monkeypatch.setattr(staging, "_create_cpu_state_dict", lambda tensors, pin_memory: create(tensors))
    keeper = Checkpointer(tmp_path, topology, keep=2)
    on_a_gpu = replace(topology, device=torch.device("cuda"))
    keeper._stager = Checkpointer(tmp_path, on_a_gpu, keep=2)._stager
    return keeper


def fill(tensors: dict[str, Tensor], value: float) -> None:
    for tensor in tensors.values():
        local_part(tensor).fill_(value)


def pointers(staged: dict[str, Tensor]) -> dict[str, int]:
    return {name: local_part(tensor).data_ptr() for name, tensor in staged.items()}


def test_the_buffers_of_two_saves_are_the_same_and_not_the_tensors(
    keeper: Checkpointer, tensors: dict[str, Tensor]
) -> None:
    stager = keeper._stager
    assert stager is not None
    fill(tensors, 1.0)
    first = stager.stage(tensors)
    before = pointers(first)  # type: ignore[arg-type]
    fill(tensors, 2.0)
    second = stager.stage(tensors)
    assert isinstance(second, dict) and isinstance(second["sharded"], DTensor)
    assert pointers(second) == before
    assert not set(before.values()) & set(pointers(tensors).values())
    fill(tensors, 3.0)  # what was staged stays
    assert all((local_part(tensor) == 2.0).all() for tensor in second.values())
    assert second["view"].shape == (6, 2)


def test_saves_through_kept_buffers_are_what_was_given(keeper: Checkpointer, tensors: dict[str, Tensor]) -> None:
    for value in (1.0, 2.0):
        fill(tensors, value)
        keeper.save(dict(tensors), CheckpointState(int(value), data={}))
        fill(tensors, -1.0)
    keeper.wait()
    latest = keeper.latest()
    assert latest is not None and latest.images_seen == 2
    latest.load_into(tensors)
    assert all((local_part(tensor) == 2.0).all() for tensor in tensors.values())


def test_on_a_cpu_nothing_is_kept(tmp_path: Path, topology: Topology) -> None:
    assert Checkpointer(tmp_path, topology, keep=2)._stager is None
