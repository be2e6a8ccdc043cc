"""A finished run of a VQ-VAE to load, and what loading it makes each rank hash and read."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
from support.exports import CLASSES
from support.vqvaes import vqvae
from torch import Tensor

from vqscale.config import StageConfig, as_dict
from vqscale.engine import checkpoint as checkpoints
from vqscale.engine.checkpoint import Checkpointer, CheckpointState
from vqscale.sources import Source, load_model
from vqscale.topology import ALONE, Topology, bring_up, take_down

SEEN = 640


def ranks_here() -> Topology:
    return bring_up(StageConfig(device="cpu", threads=1))


def save_run(run_dir: str, hidden: int = 16) -> None:
    """On each of several ranks: a run that is done, with weights, moments and weight EMA; each rank writes one file."""
    topology, model = ranks_here(), vqvae(resolution=16, hidden=hidden)
    description = {"kind": "vqvae", "config": as_dict(model.config), "resolution": 16, "classes": CLASSES, "data": ""}
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, value in model.named_parameters():
        tensors[f"ema.{name}"] = value.detach() * 0.5
        tensors |= {f"optimizer.{moment}.{name}": value.detach() for moment in ("exp_avg", "exp_avg_sq")}
    keeper = Checkpointer(Path(run_dir) / "checkpoints", topology, keep=1)
    keeper.save(tensors, CheckpointState(SEEN, data={}, model=description))
    keeper.wait()
    topology.on_main(lambda: (Path(run_dir) / "status.json").write_text(json.dumps({"state": "done"})))
    take_down(orderly=True)


def load_on_ranks(path: str, shared: bool, options: dict[str, Any]) -> dict[str, Any]:
    """On each of several ranks: `counted_load`, and the model's fingerprint and tensors. shared: the work is."""
    topology = ranks_here()
    source, counts = counted_load(path, topology if shared else ALONE, **options)
    take_down(orderly=True)
    return counts | {"fingerprint": source.fingerprint, "tensors": source.model.state_dict()}


def counted_load(path: str | Path, topology: Topology, **options: Any) -> tuple[Source, dict[str, Any]]:
    """The model, and of this rank: `files` (names of those that it hashed), `hashed` and `read` (bytes)."""
    files: list[Path] = []
    read: list[int] = []
    hash_file, safe_open = checkpoints.sha256_of, safetensors.safe_open

    def noted_hash(file: Path) -> str:
        files.append(file)
        return hash_file(file)

    def noted_open(*arguments: Any, **settings: Any) -> Any:
        return _Noted(safe_open(*arguments, **settings), read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "sha256_of", noted_hash)
        patch.setattr(safetensors, "safe_open", noted_open)
        patch.setattr(safetensors.torch, "safe_open", noted_open)
        source = load_model(path, "vqvae", topology=topology, **options)
    hashed = sum(file.stat().st_size for file in files)
    return source, {"files": [file.name for file in files], "hashed": hashed, "read": sum(read)}


class _Noted:
    """A safetensors file that notes the bytes of the tensors which are taken from it."""

    def __init__(self, file: Any, read: list[int]):
        self._file, self._read = file, read

    def __enter__(self) -> "_Noted":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> Tensor:
        return self._note(self._file.get_tensor(name))

    def get_tensors(self) -> dict[str, Tensor]:
        return {name: self._note(tensor) for name, tensor in self._file.get_tensors().items()}

    def get_slice(self, name: str) -> Any:
        return _NotedSlice(self._file.get_slice(name), self._note)

    def _note(self, tensor: Tensor) -> Tensor:
        self._read.append(math.prod(tensor.shape) * tensor.element_size())
        return tensor


class _NotedSlice:
    def __init__(self, entry: Any, note: Any):
        self._entry, self._note = entry, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)

    def __getitem__(self, where: Any) -> Tensor:
        return self._note(self._entry[where])
