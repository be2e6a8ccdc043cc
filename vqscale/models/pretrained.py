"""Models on disk for sharing: a folder with `model.safetensors` and `config.json`; the one door to disk of models/.

In: a model and JSON.  Out: a folder; and back, or from a file of torch.save.  The bytes of `model.safetensors` depend
on the tensors only; everything else (kind, config, provenance, fingerprint) is in the JSON.  Nothing that is read can
run code.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vqscale.files import check_seal, replacing, sealed, write_atomically

WEIGHTS, CONFIG = "model.safetensors", "config.json"

# Buffers of a codebook's learning: saved, but no part of what the model computes, so not of its fingerprint
_LEARNING_STATE = {"cluster_size", "embedding_sum", "adam_mean", "adam_square", "updates"}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """ "sha256:…" over the sorted (name, dtype, shape, bytes) of a model's whole (gathered) parameters and codebooks.

    `tensors` may be the model's state_dict: the codebooks' moving averages and optimizer state are left out.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.rpartition(".")[2] in _LEARNING_STATE:
            continue
        tensor = _plain(tensors[name])
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _plain(tensor: Tensor) -> Tensor:
    """Dense bytes in row-major order on the CPU."""
    return tensor.detach().to("cpu").contiguous(memory_format=torch.contiguous_format)


def write_folder(folder: str | Path, tensors: Mapping[str, Tensor], config_json: Mapping[str, Any]) -> None:
    """Write both files, each whole or not at all, the JSON last. Raises OSError if the folder can't be written."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(sealed(config_json), indent=2, ensure_ascii=False) + "\n"
    plain = _unshared({name: _plain(tensors[name]) for name in sorted(tensors)})
    with replacing(folder / WEIGHTS) as temporary:
        safetensors.torch.save_file(plain, temporary)
    write_atomically(folder / CONFIG, text)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors makes files that no one else may read


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied tensors get memory of their own: the format has no aliases."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return out


def read_folder(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, config.json) of a folder.

    Raises FileNotFoundError for a missing file, ValueError for one that can't be read, or tensors that are not those
    whose fingerprint the JSON states.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; `vqscale export` writes such a folder")
    config_json = check_seal(folder / CONFIG, _read_json(folder / CONFIG))
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: not a whole safetensors file: {error}") from None
    stated = config_json.get("fingerprint")
    if stated is not None and stated != (actual := fingerprint(tensors)):
        raise ValueError(f"{folder / WEIGHTS}: its fingerprint is {actual}, but {CONFIG} states {stated}")
    return tensors, config_json


def read_torch(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file that torch.save wrote, on the CPU; also one under the key `model` or `state_dict`.

    Nothing in the file is run: torch's restricted unpickler refuses everything but tensors and plain values. Raises
    FileNotFoundError, and ValueError for a file of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, … depending on how it is broken
        raise ValueError(f"{path}: not a file of tensors alone: {str(error).strip().splitlines()[0]}") from None
    for key in ("model", "state_dict"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    if not isinstance(value, Mapping) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise ValueError(f"{path}: expected names and tensors, found something else")
    return dict(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, found a {type(value).__name__}")
    return value


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy tensors into a model's parameters and persistent buffers: exactly its names, shapes and kinds of numbers.

    Raises ValueError naming `where`, the key and both shapes.
    """
    own = model.state_dict()
    if missing := sorted(own.keys() - tensors.keys()):
        raise ValueError(f"{where}: {missing[0]} is missing ({len(missing)} of the model's {len(own)} tensors are)")
    if unknown := sorted(tensors.keys() - own.keys()):
        raise ValueError(
            f"{where}: {unknown[0]} is not in the model ({len(unknown)} of {len(tensors)} tensors are not)"
        )
    for name, tensor in own.items():
        given = tensors[name]
        if given.shape != tensor.shape:
            raise ValueError(f"{where}: {name} has shape {list(given.shape)}, the model needs {list(tensor.shape)}")
        if given.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{where}: {name} is {given.dtype}, the model needs {tensor.dtype}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def save_pretrained(
    folder: str | Path,
    model: nn.Module,
    *,
    kind: str,
    config: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Write a plain (unwrapped) model; `config` and `extra` are JSON. Returns the fingerprint, also in the JSON."""
    tensors = model.state_dict()
    stated = fingerprint(tensors)
    write_folder(folder, tensors, {"kind": kind, "config": dict(config), "fingerprint": stated, **(extra or {})})
    return stated
