"""Checkpoints: named tensors and a JSON state <-> one committed, verified folder per save.

`<folder>/<images seen, 12 digits>/` holds safetensors shards written by torch's distributed checkpoint (any sharding
reads any other), state.json, and manifest.json, written last, with the sha256 and size of every other file.  A folder
without a manifest that verifies is not a checkpoint.  Nothing in it can run code.

No rank reads or hashes all of it: a rank hashes the file that it wrote; of a checkpoint to resume from, or to take a
model from, it hashes a share, opens a share of the headers, and reads its own parts of sharded tensors and a share of
the replicated ones.
"""

import concurrent.futures
import json
import logging
import os
import re
import shutil
import threading
import time
import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.futures import Future

from vqscale.engine.tensors import Tensors, fill_together, total_bytes
from vqscale.files import fsync, sha256_of
from vqscale.topology import ALONE, Topology, background_group

log = logging.getLogger("vqscale")
FORMAT = 1
_NAME = re.compile(r"\d{12}")
_TEMPORARY = ".saving-"
_SETTLE_SECONDS = 60  # a rank that hangs must not keep the others from ending
Files = dict[str, dict[str, Any]]  # of a manifest: name -> sha256, bytes


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint knows besides its tensors; what an older one lacks is at its default."""

    images_seen: int
    data: Mapping[str, Any]  # the loader's position
    optimizer_steps: int = 0
    skipped_steps: int = 0
    world_size: int = 1
    strategy: str = ""
    config: str = ""  # fingerprint
    model: Mapping[str, Any] = field(default_factory=dict)  # its description
    evaluation_owed: bool = False  # the run was stopped before figures that were due
    total_images: int = 0  # to be trained on; 0 = not known

    def to_json(self, tensors: Tensors) -> dict[str, Any]:
        """The content of state.json."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "optimizer_steps"}
        return {
            "format": FORMAT,
            "images_seen": values.pop("images_seen"),
            "tensors": {name: _dtype_and_shape(tensor) for name, tensor in tensors.items()},
            "data": values.pop("data"),
            "engine": {"optimizer_steps": self.optimizer_steps},
            **values,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CheckpointState":
        """Raises ValueError for another format, TypeError for a missing key."""
        if values.get("format") != FORMAT:
            raise ValueError(f"checkpoint format {values.get('format')}, this program reads {FORMAT}")
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        return cls(**known, optimizer_steps=values.get("engine", {}).get("optimizer_steps", 0))


class HashingWriter(HuggingFaceStorageWriter):
    """Each rank writes one file, makes it durable and hashes what was written. Rank 0's `files` then names them all."""

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.files: Files = {}

    def write_data(self, plan: Any, planner: Any) -> Any:
        """(name, manifest entry) of every file that this rank wrote, as a future."""
        written = super().write_data(plan, planner).wait()
        paths = [self.folder / name for name in sorted({result.storage_data.relative_path for result in written})]
        for path in paths:
            fsync(path)
        hashed: Any = Future()
        hashed.set_result([(path.name, _entry(path)) for path in paths])
        return hashed

    def finish(self, metadata: Any, results: Any) -> None:
        """On rank 0. results: what `write_data` gave, per rank."""
        self.files = {name: entry for rank in results for name, entry in rank}


class Checkpointer:
    """Saves in the background, one save in flight, and finds the newest checkpoint that verifies.

    A save is on trial until training has gone on from it: only then is it committed, and older ones are removed.
    """

    def __init__(self, folder: Path, topology: Topology, *, keep: int):
        self.folder = folder
        self._topology = topology
        self._keep = keep
        # The save's collectives run beside training's: they need a group of their own.
        self._group = background_group()
        # A GPU's tensors are copied to pinned buffers, which stay from save to save: pinning takes longer than copying.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=True) if topology.device.type == "cuda" else None
        self._in_flight: list[concurrent.futures.Future[Any]] = []  # of one save: written, and on rank 0 committed
        self._trial_over, self._discarded = threading.Event(), False
        self._committer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="commit")
        if topology.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(stale, ignore_errors=True)
        topology.barrier()

    def save(self, tensors: Tensors, state: CheckpointState) -> None:
        """Stage the tensors and return; writing and committing go on in the background. Called by all ranks."""
        self.wait()
        final = self.folder / f"{state.images_seen:012d}"
        temporary = self.folder / f"{_TEMPORARY}{final.name}"
        if self._prepare(temporary, final, total_bytes(tensors.values())):
            return
        self._trial_over.clear()
        writer = HashingWriter(temporary)
        staging = {"process_group": self._group, "async_stager": self._stager}
        written: Any = dcp.async_save(tensors, storage_writer=writer, **staging)  # type: ignore[arg-type]
        self._in_flight = [written]
        if self._topology.is_main:
            text = json.dumps(state.to_json(tensors), indent=1) + "\n"  # now: training changes what `state` refers to
            self._in_flight.append(self._committer.submit(self._commit, written, writer, final, text))

    def _prepare(self, temporary: Path, final: Path, needed: int) -> bool:
        """Whether this checkpoint exists already; else there is an empty temporary folder for it afterwards.

        Raises OSError on all ranks; called by all.
        """

        def make_folder() -> bool:
            if final.exists():
                return True
            shutil.rmtree(temporary, ignore_errors=True)
            if (free := shutil.disk_usage(self.folder).free) < needed:
                raise OSError(f"it needs {needed:,} bytes, {free:,} are free; earlier checkpoints are untouched")
            temporary.mkdir()
            return False

        try:
            return self._topology.on_main(make_folder)
        except ValueError as error:
            raise OSError(f"a checkpoint could not be written to {self.folder}: {error}") from None

    def _commit(self, written: Any, writer: HashingWriter, final: Path, state: str) -> None:
        written.result()
        temporary = writer.folder
        (temporary / "state.json").write_text(state)
        files = {**writer.files, "state.json": _entry(temporary / "state.json")}
        if unseen := sorted(files.keys() - {path.name for path in temporary.iterdir()}):
            raise OSError(f"{unseen[0]}, which another rank wrote, is not there: do all nodes see the same folder?")
        (temporary / "manifest.json").write_text(json.dumps({"files": files}, indent=1))
        for name in ("state.json", "manifest.json"):
            fsync(temporary / name)
        fsync(temporary)
        self._trial_over.wait()
        if self._discarded:
            shutil.rmtree(temporary)
            return
        os.rename(temporary, final)
        fsync(self.folder)
        for old in _committed_folders(self.folder)[self._keep :]:
            renamed = old.with_name(f"{_TEMPORARY}{old.name}")  # half removed it would be a damaged checkpoint
            os.rename(old, renamed)
            shutil.rmtree(renamed)

    def confirm(self) -> None:
        """Training has gone on: the save in flight may be committed."""
        self._trial_over.set()

    def discard(self) -> None:
        """Training cannot go on: a save that is still on trial is dropped."""
        self._discarded = not self._trial_over.is_set()
        self._trial_over.set()

    def wait(self) -> None:
        """Until the save in flight is committed. Raises OSError on all ranks if it failed on any; called by all."""
        self.confirm()
        failure = ""
        try:
            for future in self._in_flight:
                future.result()
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if failure := self._topology.first_text(failure):
            raise OSError(f"a checkpoint could not be written to {self.folder}: {failure}")
        self._in_flight = []

    def settle(self) -> None:
        """For a run that ends by an error: wait for the save in flight, without talking to other ranks."""
        self.confirm()
        concurrent.futures.wait(self._in_flight, timeout=_SETTLE_SECONDS)

    def latest(self) -> "Checkpoint | None":
        """The newest checkpoint that verifies, the same on all ranks; damaged ones are set aside and named. Collective.

        Raises ValueError when there are checkpoints and none of them verifies.
        """
        return find_latest(self.folder, topology=self._topology)


class Checkpoint:
    """One committed folder."""

    def __init__(self, folder: Path):
        """Raises ValueError where state.json is of another format or none."""
        self.folder = folder
        try:
            values = json.loads((folder / "state.json").read_text())
            self.state = CheckpointState.from_json(values)
            self._saved: dict[str, list[Any]] = values["tensors"]  # name -> [dtype, shape]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: state.json: {type(error).__name__}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    @property
    def images_seen(self) -> int:
        return self.state.images_seen

    def load_into(self, tensors: Tensors, topology: Topology = ALONE) -> None:
        """Fill the tensors (plain or sharded) in place. Raises ValueError naming the first that does not fit.

        Several ranks give their topology, and call it together: headers and replicated tensors are read once for all.
        """
        self._check(tensors)
        fill_together(tensors, partial(self._fill, headers=_shared_headers(self.folder, topology)), topology)

    def read(self, prefix: str, topology: Topology = ALONE, without: Container[str] = ()) -> Tensors:
        """All tensors whose names begin with `prefix`, whole, on the CPU, without the prefix; none named in
        `without`.

        Several ranks give their topology, and call it together: each reads a share, and all get the whole.
        """
        header = {name: one for name, one in self.header(prefix).items() if name not in without}
        tensors = {f"{prefix}{name}": torch.empty_like(one, device="cpu") for name, one in header.items()}
        if tensors:
            fill_together(tensors, partial(self._fill, headers=_shared_headers(self.folder, topology)), topology)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def header(self, prefix: str) -> Tensors:
        """What `read` gives, on the meta device: names, shapes and types, which take no memory."""
        return {
            name.removeprefix(prefix): torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, (dtype, shape) in self._saved.items()
            if name.startswith(prefix)
        }

    def _fill(self, tensors: Tensors, headers: Metadata) -> None:
        reader = HuggingFaceStorageReader(str(self.folder))
        reader.read_metadata = lambda: headers  # type: ignore[method-assign]
        try:
            with warnings.catch_warnings():  # each rank reads for itself, on purpose
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                dcp.load(tensors, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # a BaseException
            cause = str(next(iter(error.failures.values()))[0])
            raise ValueError(f"{self.folder} cannot be read: {' '.join(cause.split())}") from None

    def _check(self, tensors: Tensors) -> None:
        for name in sorted(self._saved.keys() ^ tensors.keys()):
            holder = "the checkpoint" if name in self._saved else "this run"
            raise ValueError(f"{self.folder}: only {holder} has the tensor {name}: it is of another model or config")
        for name, tensor in tensors.items():
            if (saved := self._saved[name]) != (ours := _dtype_and_shape(tensor)):
                raise ValueError(f"{self.folder}: {name} is {saved} in the checkpoint and {ours} in this run")


def _dtype_and_shape(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _shared_headers(folder: Path, topology: Topology) -> Metadata:
    """What all files hold; each rank opens a share of them. Raises ValueError on all ranks. Collective."""
    names = topology.on_main(lambda: sorted(str(path) for path in folder.glob("*.safetensors")))
    share = names[topology.rank :: topology.world_size]
    whole, *parts = topology.on_each(lambda: _headers(folder, share))
    for part in parts:
        whole.storage_data.update(part.storage_data)
        for name, other in part.state_dict_metadata.items():
            if (one := whole.state_dict_metadata.setdefault(name, other)) is not other:
                one.chunks.extend(other.chunks)
                one.size = torch.Size(map(max, one.size, other.size))
    return whole


def _headers(folder: Path, paths: list[str]) -> Any:
    """The Metadata of these files. Raises ValueError."""
    reader = HuggingFaceStorageReader(str(folder))
    reader.fs.ls = lambda _folder: paths  # type: ignore[method-assign, assignment, return-value]
    try:
        return reader.read_metadata()
    except Exception as error:  # safetensors has its own
        raise ValueError(f"{folder} cannot be read: {' '.join(str(error).split())}") from None


def find_latest(folder: Path, *, set_aside: bool = True, topology: Topology = ALONE) -> Checkpoint | None:
    """The newest checkpoint in `folder` that verifies. Damaged ones are named loudly and renamed to `damaged-…`,
    unless the folder is another run's (`set_aside=False`).

    With a topology it is collective: the ranks share the reading, and get the same answer.
    Raises ValueError when there are checkpoints and none of them verifies.
    """
    damaged: list[Path] = []
    for candidate in topology.on_main(partial(_committed_folders, folder)):
        if not (problem := verify(candidate, topology)):
            return topology.on_main(partial(Checkpoint, candidate))
        topology.on_main(partial(_set_aside, candidate, problem, set_aside))
        damaged.append(candidate)
    topology.on_main(partial(_refuse_if_damaged, folder, damaged))
    return None


def _set_aside(candidate: Path, problem: str, rename: bool) -> None:
    log.error("CHECKPOINT %s IS DAMAGED (%s)%s", candidate, problem, ": set aside" if rename else "")
    if rename:
        os.rename(candidate, candidate.with_name(f"damaged-{candidate.name}-{int(time.time())}"))


def _refuse_if_damaged(folder: Path, damaged: list[Path]) -> None:
    earlier = sorted(folder.glob("damaged-*")) if folder.is_dir() else []
    if damaged or earlier:
        names = ", ".join(path.name for path in damaged or earlier)
        raise ValueError(
            f"{folder}: every checkpoint is damaged ({names}); not starting again from zero: "
            "take the damaged-* folders away if that is what you want"
        )


def verify(folder: Path, topology: Topology = ALONE) -> str:
    """What is wrong with a checkpoint folder, or "" if every file is as its manifest says.

    With a topology it is collective: each rank reads a share of the files, and all get the same answer.
    """
    files = topology.on_main(partial(_listed, folder))
    if isinstance(files, str):
        return files
    share = dict(sorted(files.items())[topology.rank :: topology.world_size])
    return topology.first_text(_first_damaged(folder, share))


def _listed(folder: Path) -> Files | str:
    """The manifest's entries, or what is wrong with it or with the names of the files."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        present = {path.name for path in folder.iterdir()} - {"manifest.json"}
        if present != files.keys():
            return f"files differ from the manifest: {', '.join(sorted(present ^ files.keys()))}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json: {type(error).__name__}: {error}"
    return files


def _first_damaged(folder: Path, files: Files) -> str:
    """The first of these files that is not as its entry says, and how, or ""."""
    try:
        # Every byte of the manifest counts: whatever changes in it, a comparison below fails.
        for name, entry in files.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if sha256_of(path) != entry["sha256"]:
                return f"{name} does not have the sha256 of the manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json: {type(error).__name__}: {error}"
    return ""


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def _committed_folders(folder: Path) -> list[Path]:
    """Newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has saved before (damaged saves count: a run with those must not start again from zero)."""
    return folder.is_dir() and any(_NAME.fullmatch(p.name) or p.name.startswith("damaged-") for p in folder.iterdir())
