"""Shards -> training batches that depend on (data set, seed, position) and on nothing else.

In: a data set, a `read` that decodes one sample, samples per step, this rank and the number of ranks.  Out: an endless
stream of micro-batches. Global batch g has the positions [g·G, (g+1)·G); rank r gets the r-th contiguous slice of it.
Ranks, workers, accumulation and restarts do not change what is in a global batch.
"""

import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from vqscale.batch import Batch
from vqscale.config import local_batching
from vqscale.data.cache import Cache
from vqscale.data.order import NAME, ShuffleOrder
from vqscale.data.parts import BAD_KINDS, DECODE, PartReader, RawSample
from vqscale.data.shardcheck import ShardCheck
from vqscale.data.shards import Manifest
from vqscale.data.workers import run_workers
from vqscale.seeding import key_of, mix

log = logging.getLogger("vqscale")

# read(parts, label, position) -> the decoded sample; raises ValueError for bytes that do not decode. It may have
# `part_names`, the parts it needs, and `batch(parts, labels, positions)`, the same for many samples at once.
Read = Callable[[Mapping[str, Any], int, int], Mapping[str, "Tensor | int"]]

_SUBSTITUTE = key_of("substitute")
_MAX_SUBSTITUTES = 64  # draws before giving up on a bad sample


@dataclass
class DataState:
    """The data position: the same on every rank, and all that a checkpoint needs."""

    seed: int
    shuffle_window: int
    dataset: str  # fingerprint
    num_samples: int
    consumed_samples: int = 0
    bad_samples: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BAD_KINDS, 0))
    version: int = 1
    order: str = NAME


class TarDataset(Dataset):
    """Positions -> a `Batch`: the tensors that `read` returns, stacked, with label, position and bad.

    `bad`: 0, or why the sample at this position was replaced: 1 does not decode, 2 cannot be read, 3 crc32 differs.
    The substitute is drawn by position, so it too is the same everywhere. With `weighted`, batches also have
    `weight`: 0 for padding (position -1) and for substitutes, so that no sample counts twice.
    """

    def __init__(
        self,
        folder: str | Path,
        read: Read,
        *,
        seed: int = 0,
        window: int = 0,
        weighted: bool = False,
        cache: Cache | None = None,
    ):
        self.folder = Path(folder)
        self.manifest = Manifest.load(folder)
        self.read = read
        self.weighted = weighted
        sizes = self.manifest.column("num_samples")
        try:
            self.order = ShuffleOrder(sizes, seed, window)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None
        self._in_sequence = ShuffleOrder(sizes, 0, 0)
        cache, two_windows = cache or Cache(), 2 * max(window, 1)
        part_names = getattr(read, "part_names", None)
        self.files = PartReader(self.folder, self.manifest, part_names, two_windows + 16, cache)
        remote = self.manifest.column("bytes")[self.files.tars.remote]
        cache.check_size(np.sort(remote)[-two_windows:].tolist())
        self._prefetched_from = -1  # the window whose successor was prefetched last

    def __len__(self) -> int:
        return self.order.num_samples

    def __getitem__(self, position: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The batch at these positions."""
        with_padding = np.asarray(positions, np.int64)
        clamped = np.maximum(with_padding, 0)
        self._prefetch(int(clamped[0]))
        _, shards, rows = self.order.locate(clamped)
        samples = self.files.read(shards, rows)
        batch = cast(Batch, self._decode(samples, clamped))
        batch["label"] = torch.tensor([sample.label for sample in samples])
        batch["position"] = torch.from_numpy(clamped)
        batch["bad"] = torch.tensor([sample.bad for sample in samples], dtype=torch.uint8)
        if self.weighted:
            batch["weight"] = (torch.from_numpy(with_padding >= 0) & (batch["bad"] == 0)).float()
        batch["errors"] = [
            (int(p), s.bad, s.error) for p, s in zip(with_padding, samples, strict=True) if s.bad and p >= 0
        ]
        return batch

    def _decode(self, samples: list[RawSample], positions: np.ndarray) -> dict[str, Tensor]:
        read_many = getattr(self.read, "batch", None)
        if read_many is not None and not any(sample.bad for sample in samples):
            try:
                return dict(read_many([s.parts for s in samples], [s.label for s in samples], positions.tolist()))
            except ValueError:
                pass  # one of them does not decode: find out which
        return collate([self._decode_one(s, p) for s, p in zip(samples, positions.tolist(), strict=True)])

    def _decode_one(self, sample: RawSample, position: int) -> Mapping[str, Tensor | int]:
        if not sample.bad:
            try:
                return self.read(sample.parts, sample.label, position)
            except ValueError as error:
                sample.bad, sample.error = DECODE, str(error)
        for attempt in range(_MAX_SUBSTITUTES):
            drawn = mix(self.order.seed, _SUBSTITUTE, position, attempt) % len(self)
            _, shard, row = self._in_sequence.locate(np.array([drawn]))
            candidate = self.files.read(shard, row)[0]
            try:
                if not candidate.bad:
                    decoded = self.read(candidate.parts, candidate.label, position)
                    sample.label = candidate.label
                    return decoded
            except ValueError:
                continue
        raise OSError(
            f"{self.folder}: none of {_MAX_SUBSTITUTES} samples drawn to replace a bad one can be read: {sample.error}"
        )

    def batches(
        self, positions: Iterable[Sequence[int]], bad_path: Path | None, workers: int, pin_memory: bool = False
    ) -> Generator[Batch, None, None]:
        """The batches at these positions, in order. Bad samples are appended to the JSONL file `bad_path`."""
        with closing(run_workers(self, positions, workers=workers, pin_memory=pin_memory)) as stream:
            for batch in stream:
                self._record(batch.pop("errors"), bad_path)
                yield batch

    def _record(self, errors: Sequence[tuple[int, int, str]], path: Path | None) -> None:
        if path is None or not errors:
            return
        lines = [
            json.dumps({**self.sample_at(position), "position": position, "kind": BAD_KINDS[kind - 1], "error": error})
            for position, kind, error in errors
        ]
        try:
            with open(path, "a") as file:  # all ranks append to this file, with one write each
                file.write("".join(line + "\n" for line in lines))
        except OSError as error:  # the samples are counted all the same
            log.warning("%s cannot be written (%s); bad samples: %s", path, error.strerror, "; ".join(lines))

    def sample_at(self, position: int) -> dict[str, Any]:
        """Names the sample at a position: {epoch, shard, key}."""
        epoch, shard, row = (int(a[0]) for a in self.order.locate(np.array([position])))
        try:
            key: Any = self.files.index(shard).key(row)
        except (OSError, ValueError):
            key = row  # an index that cannot be read has no keys
        return {"epoch": epoch, "shard": str(self.files.tars[shard]), "key": key}

    def _prefetch(self, position: int) -> None:
        if not (self.order.window or self.files.has_remote):
            return
        window, shards = self.order.window_shards(position)
        if window == self._prefetched_from:
            return
        _, following = self.order.window_shards(position, ahead=1)
        worker = get_worker_info()
        share = (worker.id, worker.num_workers) if worker else (0, 1)
        self.files.prefetch(shards.tolist(), following.tolist(), share, first=self._prefetched_from < 0)
        self._prefetched_from = window


def collate(samples: Sequence[Mapping[str, Tensor | int]]) -> dict[str, Tensor]:
    """Stack tensors; integers become an int64 tensor [b]."""
    return {name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in samples[0]}


@dataclass
class Loader:
    """An endless stream of micro-batches, from `state.consumed_samples` on. Made by `build_loader`.

    `micro_batches_per_step` of them, of `micro_batch` samples each, make this rank's `local_batch` of one global batch.
    Prefetching does not move the state: only `advance`, called after the optimizer step, does.
    """

    dataset: TarDataset
    state: DataState
    rank: int
    global_batch: int
    local_batch: int
    micro_batch: int
    micro_batches_per_step: int
    max_bad_fraction: float
    bad_path: Path | None
    workers: int
    pin_memory: bool
    check: ShardCheck | None = None
    bad_kinds: ClassVar[tuple[str, ...]] = BAD_KINDS

    def __iter__(self) -> Generator[Batch, None, None]:
        batches = self.dataset.batches(self.positions(), self.bad_path, self.workers, self.pin_memory)
        with closing(batches):
            yield from self.check.beside(batches) if self.check else batches

    def positions(self) -> Iterator[range]:
        """Endless: those of each micro-batch of this rank."""
        start = self.state.consumed_samples + self.rank * self.local_batch
        while True:
            for first in range(start, start + self.local_batch, self.micro_batch):
                yield range(first, first + self.micro_batch)
            start += self.global_batch

    def sample_at(self, position: int) -> dict[str, Any]:
        """Names the sample at a position: {epoch, shard, key}."""
        return self.dataset.sample_at(position)

    def advance(self) -> None:
        """Count one global batch as consumed."""
        self.state.consumed_samples += self.global_batch

    def count_bad(self, counts: Mapping[str, int]) -> None:
        """Add bad samples by kind, summed over all ranks.

        Raises ValueError, on every rank alike, when there are more so far than the epochs begun allow.
        """
        state = self.state
        for kind, count in counts.items():
            state.bad_samples[kind] += int(count)
        epochs = state.consumed_samples // state.num_samples + 1  # the same sample may come early in the next one
        allowed = allowed_bad(state.num_samples, self.max_bad_fraction) * epochs
        total = sum(state.bad_samples.values())
        if total > allowed:
            by_kind = ", ".join(f"{kind} {count}" for kind, count in state.bad_samples.items())
            where = f"; {self.bad_path} lists them" if self.bad_path else ""
            raise ValueError(
                f"{total} of {state.consumed_samples} samples could not be used ({by_kind}), more than the "
                f"{int(allowed)} that max_bad_fraction={self.max_bad_fraction} allows{where}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The data state as plain JSON types."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, at any number of ranks; the next `iter` starts there.

        Raises ValueError when it belongs to other data, another seed or order.
        """
        for name in ("version", "order", "dataset", "num_samples", "seed", "shuffle_window"):
            if state.get(name) != (here := getattr(self.state, name)):
                raise ValueError(
                    f"the checkpoint's data position has {name}={state.get(name)}, this run has {here}: it would not "
                    "continue the same stream"
                )
        self.state.consumed_samples = int(state["consumed_samples"])
        self.state.bad_samples = {kind: int(state["bad_samples"].get(kind, 0)) for kind in BAD_KINDS}


def build_loader(
    folder: str | Path,
    *,
    read: Read,
    global_batch: int,
    micro_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    shuffle_window: int = 64,
    workers: int = 0,
    state: Mapping[str, Any] | None = None,
    pin_memory: bool = False,
    max_bad_fraction: float = 0.001,
    bad_path: Path | None = None,
    cache: Cache | None = None,
    gather: Callable[[Any], list[Any]] | None = None,
) -> Loader:
    """The training batches of one rank.

    read: decodes one sample (see `Read`). shuffle_window: shards shuffled together, 0 = stored order.
    max_bad_fraction: share of an epoch's samples that may be bad; 0 = none, else at least one per epoch. bad_path: a
    JSONL file that lists the bad ones. cache: where remote shards are kept. gather: one value per rank on every rank, a
    collective; with it the ranks share the check of the shards, and an error of one is raised on all.

    Raises ValueError before the first batch when global_batch does not fit the ranks, when the shards have already
    lost more than allowed, or when `state` belongs to other data.
    """
    batching = local_batching(global_batch, world_size, micro_batch)
    dataset = TarDataset(folder, read, seed=seed, window=shuffle_window, cache=cache)
    start = DataState(seed, shuffle_window, dataset.manifest.fingerprint, len(dataset))
    loader = Loader(dataset, start, rank, global_batch, *batching, max_bad_fraction, bad_path, workers, pin_memory)
    if state is not None:
        loader.load_state_dict(state)
    loader.check = ShardCheck(
        dataset.folder,
        dataset.files,
        dataset.order,
        position=loader.state.consumed_samples,
        allowed=allowed_bad(len(dataset), max_bad_fraction),
        share=(rank, world_size) if gather else (0, 1),
        gather=gather or (lambda problems: [problems]),
    )
    return loader


def allowed_bad(num_samples: int, max_bad_fraction: float) -> float:
    """How many samples of an epoch may be bad: the fraction, but at least one unless the fraction is 0."""
    return max(max_bad_fraction * num_samples, 1.0) if max_bad_fraction else 0.0
