"""Models on disk for sharing: a folder with `model.safetensors` and `config.json`; the one door to disk of models/.

In: a model and JSON.  Out: a folder; and back, or from a file of torch.save.  The bytes of `model.safetensors` depend
on the tensors only; everything else (kind, config, provenance, fingerprint) is in the JSON.  Nothing that is read can
run code.
"""

import contextlib
import hashlib
import json
import resource
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vqscale.files import check_seal, read_json, replacing, sealed, write_atomically

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_MOST_JSON = 1 << 26  # bytes of a config.json: the names of 22,000 classes take 1 MB
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}

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


def read_folder(
    folder: str | Path,
    check: Callable[[Mapping[str, Any], Mapping[str, Tensor]], object] = lambda *_: None,
    read: Callable[[Path, Mapping[str, Tensor]], dict[str, Tensor]] = lambda path, _: safetensors.torch.load_file(path),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, config.json) of a folder.

    `check(config.json, tensors on the meta device)` is called first, and may refuse them before memory is taken.
    `read(file, tensors on the meta device)` gives the tensors.
    Raises FileNotFoundError for a missing file, ValueError for one that can't be read, or tensors that are not those
    whose fingerprint the JSON states.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; `vqscale export` writes such a folder")
    config_json = check_seal(folder / CONFIG, _read_json(folder / CONFIG))
    try:
        header = _read_header(folder / WEIGHTS)
        check(config_json, header)
        tensors = read(folder / WEIGHTS, header)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: not a whole safetensors file: {error}") from None
    stated = config_json.get("fingerprint")
    if stated is not None and stated != (actual := fingerprint(tensors)):
        raise ValueError(f"{folder / WEIGHTS}: its fingerprint is {actual}, but {CONFIG} states {stated}")
    return tensors, config_json


def _read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device: names, shapes and types."""
    header = {}
    with safetensors.safe_open(path, "pt") as file:
        for name in file.keys():
            entry = file.get_slice(name)
            if entry.get_dtype() not in _DTYPES:
                raise ValueError(f"{path}: {name} is of type {entry.get_dtype()}, which no model here has")
            header[name] = torch.empty(entry.get_shape(), dtype=_DTYPES[entry.get_dtype()], device="meta")
    return header


def read_torch(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file that torch.save wrote, on the CPU; also one under the key `model` or `state_dict`.

    Nothing in the file is run: torch's restricted unpickler refuses everything but tensors and plain values. Memory is
    bounded by the file's size. Raises FileNotFoundError, and ValueError for a file of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    _refuse_compressed(path)
    try:
        with _memory_limit(4 * path.stat().st_size + _SPARE_MEMORY):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, MemoryError, … depending on how it is broken
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a file of tensors alone: {reason}") from None
    for key in ("model", "state_dict"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    if not isinstance(value, Mapping) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise ValueError(f"{path}: expected names and tensors, not something else")
    tensors = {str(name): tensor.detach() for name, tensor in value.items()}
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise ValueError(f"{path}: {name} is no plain tensor with numbers of its own")
    return tensors


_SPARE_MEMORY = 1 << 30  # bytes that reading a file may take besides those of its content


def _refuse_compressed(path: Path) -> None:
    """torch.save stores tensors as they are: a file whose content is larger than the file was made to fill memory."""
    size, unpacked = path.stat().st_size, 0
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > size:
        raise ValueError(f"{path}: {size:,} bytes that unpack to {unpacked:,}; torch.save does not compress")


@contextlib.contextmanager
def _memory_limit(more: int) -> Iterator[None]:
    """This process may take `more` bytes of memory and no further; without effect where the system has no /proc."""
    statm = Path("/proc/self/statm")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if not statm.is_file():
        yield
        return
    most = int(statm.read_text().split()[0]) * resource.getpagesize() + more
    limits = [limit for limit in (most, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _is_plain(tensor: Tensor) -> bool:
    """Dense numbers in memory, none of them standing for several elements."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _read_json(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > _MOST_JSON:
        raise ValueError(f"{path}: {size:,} bytes, where a model's have at most {_MOST_JSON:,}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, found a {type(value).__name__}")
    return value


def check_fits(
    model: nn.Module, tensors: Mapping[str, Tensor], where: str | Path, ignore: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Tensors must be exactly a model's parameters and persistent buffers: names, shapes and kinds of numbers. Those
    whose names begin as one of `ignore` does are left out. Returns the others.

    Raises ValueError naming `where`, the tensor and both shapes.
    """
    ignored = tuple(ignore)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(ignored)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(ignored)}
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
    return tensors


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy tensors into a model. Raises ValueError as `check_fits` does, and for numbers that are not finite."""
    check_fits(model, tensors, where)
    for name, tensor in model.state_dict().items():
        finite = tensors[name].to(tensor.dtype).isfinite()
        if bad := finite.numel() - int(finite.sum()):
            raise ValueError(
                f"{where}: {name} has {bad:,} of {finite.numel():,} numbers that are NaN or infinite as {tensor.dtype}"
            )
    model.load_state_dict(tensors)


def save_pretrained(
    folder: str | Path,
    model: nn.Module,
    *,
    kind: str,
    config: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> str:
    """Write a plain (unwrapped) model; `config` and `extra` are JSON. Returns the fingerprint, also in the JSON.

    Raises ValueError for a folder that holds something else under these names.
    """
    _check_replaceable(Path(folder))
    tensors = model.state_dict()
    stated = fingerprint(tensors)
    write_folder(folder, tensors, {"kind": kind, "config": dict(config), "fingerprint": stated, **(extra or {})})
    return stated


def _check_replaceable(folder: Path) -> None:
    """Raises ValueError for a run directory, and for files of these names that no model was saved in."""
    if (folder / "status.json").exists() or (folder / "checkpoints").exists():
        raise ValueError(f"{folder} is a run directory; choose a folder outside it")
    existing = [folder / name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
    if existing and not (existing[0].name == CONFIG and "fingerprint" in read_json(existing[0])):
        raise ValueError(f"{existing[0]} was not written by this program; choose another folder")
