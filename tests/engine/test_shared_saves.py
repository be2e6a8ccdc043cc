"""Ranks share the work of a save and of a resume: what each of them writes, hashes and reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.distributed import run_ranks
from support.file_calls import counted
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from vqscale.config import StageConfig
from vqscale.engine import checkpoint as checkpoints
from vqscale.engine.checkpoint import Checkpointer, CheckpointState
from vqscale.topology import Topology, bring_up, take_down

WORLD = 4
TENSORS = 12


def replicated(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"model.{i}": torch.randn(64, 64, generator=generator) for i in range(TENSORS)}
    tensors["model.0"] = tensors["model.0"].view(4, 16, 8, 8).to(memory_format=torch.channels_last)
    return {**tensors, "model.steps": torch.tensor(seed), "model.flags": torch.tensor([True, False])}


def with_sharded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    whole = torch.arange(7.0 * 64).view(7, 64)  # fewer rows on the last rank
    return {**tensors, "sharded": distribute_tensor(whole, mesh, [Shard(0)])}


def zeros_like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def bring_up_here() -> Topology:
    return bring_up(StageConfig(device="cpu", threads=1))


def hashed_files() -> list[str]:
    """Names of the files that this process hashes from now on."""
    names, real = [], checkpoints.sha256_of

    def noted(path: Path) -> str:
        names.append(path.name)
        return real(path)

    checkpoints.sha256_of = noted  # type: ignore[assignment]
    return names


def opened_files() -> list[str]:
    """Names of the tensor files that this process opens from now on, once per opening."""
    import safetensors

    names, real = [], safetensors.safe_open

    def noted(filename: Any, *arguments: Any, **options: Any) -> Any:
        names.append(Path(filename).name)
        return real(filename, *arguments, **options)

    safetensors.safe_open = noted  # type: ignore[assignment, misc]
    return names


def _save(folder: str) -> list[str]:
    """Two checkpoints; returns the files that this rank hashed for the second."""
    keeper = Checkpointer(Path(folder), bring_up_here(), keep=2)
    keeper.save(with_sharded(replicated(8)), CheckpointState(8, data={}))
    keeper.wait()
    hashed = hashed_files()
    keeper.save(with_sharded(replicated(16)), CheckpointState(16, data={}))
    keeper.wait()
    take_down(orderly=True)
    return hashed


def _resume(folder: str) -> dict[str, Any]:
    topology = bring_up_here()
    keeper = Checkpointer(Path(folder), topology, keep=2)
    hashed = hashed_files()
    latest = keeper.latest()
    assert latest is not None
    expected = with_sharded(replicated(latest.images_seen))
    tensors = zeros_like(expected)
    opened = opened_files()
    latest.load_into(tensors, topology)
    wrong = [name for name, tensor in tensors.items() if not torch.equal(local(tensor), local(expected[name]))]
    take_down(orderly=True)
    return {"seen": latest.images_seen, "hashed": hashed, "opened": opened, "wrong": wrong}


def local(tensor: Tensor) -> Tensor:
    return DTensor.to_local(tensor) if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """A folder of two checkpoints, and the files that each rank hashed for the second."""
    folder = tmp_path_factory.mktemp("shared") / "checkpoints"
    return folder, run_ranks(_save, WORLD, str(folder))


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["files"]


def test_each_rank_hashes_the_file_that_it_wrote(saved: tuple[Path, list[list[str]]]) -> None:
    folder, hashed = saved
    shards = [f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors" for rank in range(WORLD)]
    assert hashed == [[shards[0], "state.json"], *([shard] for shard in shards[1:])]
    assert manifest_of(folder / f"{16:012d}").keys() == {*shards, "state.json"}
    assert checkpoints.verify(folder / f"{16:012d}") == ""


def test_replicated_tensors_are_written_once_in_equal_shares(saved: tuple[Path, list[list[str]]]) -> None:
    folder, _ = saved
    files = manifest_of(folder / f"{16:012d}")
    assert len(files) == WORLD + 1  # one per rank, and state.json
    sizes = [entry["bytes"] for name, entry in files.items() if name != "state.json"]
    tensors = TENSORS * 64 * 64 * 4
    assert tensors < sum(sizes) < 1.1 * tensors
    assert max(sizes) < 1.15 * sum(sizes) / WORLD


@pytest.mark.parametrize("world", [2, WORLD])
def test_a_resume_shares_hashing_and_reading(saved: tuple[Path, list[list[str]]], world: int) -> None:
    folder, _ = saved
    ranks = run_ranks(_resume, world, str(folder))
    assert [(rank["seen"], rank["wrong"]) for rank in ranks] == [(16, [])] * world
    hashed = [name for rank in ranks for name in rank["hashed"]]
    assert sorted(hashed) == sorted(manifest_of(folder / f"{16:012d}"))  # each file once, over all ranks
    assert max(len(rank["hashed"]) for rank in ranks) <= -(-(WORLD + 1) // world)
    headers = WORLD // world  # opened by each rank, and then at most each file once for its parts
    assert max(len(rank["opened"]) for rank in ranks) <= headers + WORLD


def _copy(saved: Path, to: Path) -> Path:
    shutil.copytree(saved, to)
    return to


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("number", [1, WORLD])
def test_damage_that_any_rank_sees_sets_the_checkpoint_aside_once(
    saved: tuple[Path, list[list[str]]], tmp_path: Path, number: int
) -> None:
    folder = _copy(saved[0], tmp_path / "checkpoints")
    damage(folder / f"{16:012d}" / f"shard-{number:05d}-model-00001-of-00001.safetensors")
    ranks = run_ranks(_resume, WORLD, str(folder))
    assert [(rank["seen"], rank["wrong"]) for rank in ranks] == [(8, [])] * WORLD
    assert len(list(folder.glob("damaged-*"))) == 1


def _read_what_one_rank_cannot(folder: str, where: str) -> str:
    topology = bring_up_here()
    latest = Checkpointer(Path(folder), topology, keep=2).latest()
    assert latest is not None

    def fails(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    if topology.rank == 1:
        setattr(checkpoints.HuggingFaceStorageReader, where, fails)
    try:
        latest.load_into(zeros_like(with_sharded(replicated(16))), topology)
    except ValueError as error:
        return str(error)
    finally:
        take_down(orderly=True)
    return ""


@pytest.mark.parametrize("where", ["read_metadata", "read_data"])
def test_what_one_rank_cannot_read_is_an_error_on_all(saved: tuple[Path, list[list[str]]], where: str) -> None:
    for told in run_ranks(_read_what_one_rank_cannot, WORLD, str(saved[0]), where):
        assert f"{16:012d} cannot be read: " in told and "Input/output error" in told


def _save_where_a_file_is_not_seen(folder: str) -> str:
    topology = bring_up_here()
    keeper = Checkpointer(Path(folder), topology, keep=2)
    if topology.rank == 1:  # as on a node that has a disk of its own under this name

        def entry(path: Path) -> dict[str, Any]:
            path.unlink()
            return {"sha256": "", "bytes": 0}

        checkpoints._entry = entry
    keeper.save(with_sharded(replicated(8)), CheckpointState(8, data={}))
    try:
        keeper.wait()
    except OSError as error:
        return str(error)
    finally:
        take_down(orderly=True)
    return ""


def test_files_that_the_first_rank_does_not_see_make_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for told in run_ranks(_save_where_a_file_is_not_seen, 2, str(folder)):
        assert "shard-00002" in told and "do all nodes see the same folder?" in told
    assert not list(folder.glob("0*"))


RANKS = 1024


class OneOfMany(Topology):
    """A rank of a job of which only this process exists: what rank 0 did before, the others are told."""

    told: list[Any] = []

    def on_main(self, action: Any) -> Any:
        if self.rank == 0:
            self.told.append(action())
            return self.told[-1]
        self.told.append(self.told.pop(0))  # as often as it is asked
        return self.told[-1]

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def on_each(self, action: Any) -> list[Any]:
        return [action()]


def one_of_many(rank: int) -> Any:
    return OneOfMany(rank, RANKS, rank % 8, 8, RANKS // 8, "fsdp", torch.device("cpu"))


@pytest.fixture(scope="module")
def of_many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 1,024 ranks, each with rows of one tensor."""
    folder = tmp_path_factory.mktemp("many") / f"{8:012d}"
    folder.mkdir()
    for rank in range(RANKS):
        where = json.dumps({"sharded": {"saved_offsets": [rank, 0]}})
        path = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_file({"sharded": torch.full((1, 4), float(rank))}, path, {"DCP_SHARDING_INFO": where})
    state = CheckpointState(8, data={}).to_json({"sharded": torch.empty(RANKS, 4)})
    (folder / "state.json").write_text(json.dumps(state))
    files = {path.name: checkpoints._entry(path) for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder.parent


def test_a_resume_of_a_thousand_ranks_takes_few_calls_of_each(of_many: Path) -> None:
    total = sum(path.stat().st_size for path in of_many.rglob("*") if path.is_file())
    for rank in (0, 1, RANKS - 1):
        hashed = hashed_files()
        with counted(of_many) as calls:
            topology = one_of_many(rank)
            latest = checkpoints.find_latest(of_many, topology=topology)
            assert latest is not None
            headers = checkpoints._shared_headers(latest.folder, topology)
        assert len(headers.storage_data) == 1
        assert sum((latest.folder / name).stat().st_size for name in hashed) < 0.01 * total
        assert calls.of("open") <= 6 and calls.of("list") <= 3 * (rank == 0), calls.by_kind()
        assert calls.total <= 20, calls.by_kind()
