"""What a save, its hashing, a resume's verification and reading cost when all ranks share them, against rank 0 alone.

In: ranks of gloo on this machine, which hold a state of which half is sharded and half replicated; each of them hashes
and reads at the rate of a node's link, because they share the cores and the disk of one machine.  Out: per round the
seconds of both forms of each part, in turns, and what the busiest rank hashed, opened and read. The forms in which
rank 0 hashes and verifies everything, and each rank opens every header and reads all replicated tensors, live here
alone. `python benchmarks/checkpoint.py` runs it.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as multiprocessing
from measure import Row, at_most, median, ratio, timed
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from vqscale.config import StageConfig
from vqscale.engine import checkpoint as checkpoints
from vqscale.engine.checkpoint import Checkpoint, Checkpointer, CheckpointState, HashingWriter, verify
from vqscale.topology import Topology, bring_up, take_down

RANKS = 8
TENSORS = 32  # of each kind
RATE = 100e6  # bytes/s that a rank hashes or reads: ranks of one machine stand for nodes with a link each
GOALS = {"save": 0.7, "hashing": 0.3, "verification": 0.3, "reading": 0.9}  # 1/8 for what is shared, and gloo's part


def state_of(megabytes: float) -> dict[str, Tensor]:
    rows = max(RANKS, int(megabytes * 1e6 / 4 / 1024 / 2 / TENSORS))
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    tensors = {f"replicated.{i}": torch.randn(rows, 1024) for i in range(TENSORS)}
    whole = torch.randn(rows, 1024)
    return tensors | {f"sharded.{i}": distribute_tensor(whole, mesh, [Shard(0)]) for i in range(TENSORS)}


class FirstRankHashes(HashingWriter):
    """Rank 0 reads back and hashes what all ranks wrote."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        return HuggingFaceStorageWriter.write_data(self, plan, planner)

    def finish(self, metadata: Any, results: Any) -> None:
        self.files = {path.name: checkpoints._entry(path) for path in sorted(self.folder.iterdir())}


class Forms:
    """Both forms of each part, over one committed checkpoint."""

    def __init__(self, folder: Path, topology: Topology, megabytes: float):
        self.topology, self.tensors = topology, state_of(megabytes)
        self.keeper, self.saves = Checkpointer(folder, topology, keep=1), 0
        self.save_by_all()
        self.folder = folder / "measured"
        topology.on_main(lambda: shutil.copytree(folder / f"{1:012d}", self.folder))
        self.files = json.loads((self.folder / "manifest.json").read_text())["files"]
        self.mine = self.folder / f"shard-{topology.rank + 1:05d}-model-00001-of-00001.safetensors"

    def save_by_one(self) -> None:
        checkpoints.HashingWriter = FirstRankHashes  # type: ignore[misc]
        try:
            self.save_by_all()
        finally:
            checkpoints.HashingWriter = HashingWriter  # type: ignore[misc]

    def save_by_all(self) -> None:
        self.saves += 1
        self.keeper.save(dict(self.tensors), CheckpointState(self.saves, data={}))
        self.keeper.wait()

    def hashing_by_one(self) -> None:
        self.topology.on_main(lambda: [checkpoints.sha256_of(self.folder / name) for name in self.files])

    def hashing_by_all(self) -> None:
        self.topology.gather(checkpoints.sha256_of(self.mine))

    def verification_by_one(self) -> None:
        assert self.topology.on_main(lambda: verify(self.folder)) == ""

    def verification_by_all(self) -> None:
        assert verify(self.folder, self.topology) == ""

    def reading_by_one(self) -> None:
        """Each rank by itself: all headers, all replicated tensors."""
        dcp.load(self.tensors, storage_reader=HuggingFaceStorageReader(str(self.folder)))

    def reading_by_all(self) -> None:
        Checkpoint(self.folder).load_into(self.tensors, self.topology)

    def timed(self, action: Callable[[], None]) -> float:
        """Until the last rank is through."""
        self.topology.barrier()
        return timed(lambda: (action(), self.topology.barrier()))

    def counted(self, action: Callable[[], None]) -> tuple[int, int]:
        """(files opened for tensors, bytes of tensors read) by this rank."""
        opened: list[Any] = []
        read: list[int] = []
        real_open, real_read = safetensors.safe_open, HuggingFaceStorageReader.read_data

        def noted_open(filename: Any, *arguments: Any, **options: Any) -> Any:
            opened.append(filename)
            return real_open(filename, *arguments, **options)

        def noted_read(reader: Any, plan: Any, planner: Any) -> Any:
            read.extend(4 * math.prod(item.lengths) for item in plan.items)
            return real_read(reader, plan, planner)

        safetensors.safe_open, HuggingFaceStorageReader.read_data = noted_open, noted_read  # type: ignore
        try:
            action()
        finally:
            safetensors.safe_open, HuggingFaceStorageReader.read_data = real_open, real_read  # type: ignore
        return len(opened), sum(read)


def slow_down() -> None:
    """From here on this rank hashes and reads files at `RATE`."""
    hash_file, read = checkpoints.sha256_of, HuggingFaceStorageReader.read_data

    def hash_slowly(path: Path) -> str:
        time.sleep(path.stat().st_size / RATE)
        return hash_file(path)

    def read_slowly(reader: Any, plan: Any, planner: Any) -> Any:
        time.sleep(sum(4 * math.prod(item.lengths) for item in plan.items) / RATE)
        return read(reader, plan, planner)

    checkpoints.sha256_of, HuggingFaceStorageReader.read_data = hash_slowly, read_slowly  # type: ignore


def _rank(rank: int, folder: str, port: int, megabytes: float, seconds: float, answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    topology = bring_up(StageConfig(run_dir="", strategy="fsdp", device="cpu", threads=1))
    slow_down()
    forms = Forms(Path(folder), topology, megabytes)
    columns: dict[str, list[float]] = {f"{part}_by_{who}": [] for part in GOALS for who in ("one", "all")}
    end = time.perf_counter() + seconds
    while topology.on_main(lambda: time.perf_counter() < end or not columns["reading_by_all"]):
        for name, column in columns.items():
            column.append(forms.timed(getattr(forms, name)))
    counts = {who: topology.gather(forms.counted(getattr(forms, f"reading_by_{who}"))) for who in ("one", "all")}
    if topology.is_main:
        sizes = {name: entry["bytes"] for name, entry in forms.files.items()}
        answers.put((columns, counts, sizes))
    take_down(orderly=True)


def measure_shared(folder: Path, port: int, megabytes: float, seconds: float) -> dict[str, Row]:
    """Rows: seconds of all ranks together over those of rank 0 alone, and what the busiest rank does of the whole."""
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.start_processes(
        _rank, (str(folder), port, megabytes, seconds, answers), nprocs=RANKS, start_method="spawn"
    )
    columns, counts, sizes = answers.get()
    rows: dict[str, Row] = {}
    for part in GOALS:
        one, every = columns[f"{part}_by_one"], columns[f"{part}_by_all"]
        print(f"{RANKS} ranks, {part}: {median(one):.3f} s, not shared; shared {median(every):.3f} s")
        rows[part] = at_most(GOALS[part], ratio(every, one), rounds=len(one))
    whole = sum(sizes.values())
    rows["bytes_hashed"] = at_most(0.2, max(sizes.values()) / whole, limit=1 / RANKS)
    for name, index in (("files_opened", 0), ("bytes_read", 1)):
        busiest = {who: max(rank[index] for rank in counts[who]) for who in counts}
        print(f"{RANKS} ranks, {name}, the busiest rank: {busiest['one']:,} each for itself, shared {busiest['all']:,}")
        rows[name] = at_most(1.0, busiest["all"] / busiest["one"])
    return rows
