"""Samples' bytes out of tars: one positioned read per sample, each part checked against its crc32.

In: (shard, row) pairs, or positions in stored order.  Out: each sample's parts, or why it could not be read. Files are
opened by the process that reads, never inherited; slow storage gets many reads in flight.
"""

import contextlib
import os
import resource
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from vqscale.data.cache import Cache, NoRoom, RemoteTar, Tars, open_descriptor
from vqscale.data.shards import Manifest, ShardIndex

DECODE, IO, CRC = 1, 2, 3  # why a sample is bad; 0 = it is not
BAD_KINDS = ("decode", "io", "crc")
MAX_SAMPLE_BYTES = 512 << 20  # read for one sample; 150 megapixels of raw RGB fit
_SLOW_SECONDS = 0.5e-3  # a page-cache hit takes microseconds, a seek or a network round trip milliseconds
_IN_FLIGHT = 32
_FETCHES = 4  # shards that a process fetches in the background at a time
_RETRY_SECONDS = 1.0  # between looks for room in the cache
_AT_ONCE = 64  # samples that `read_samples` reads together
_MAX_OFFSET = np.iinfo(np.int64).max


class DecodeError(ValueError):
    """A sample's bytes were read but do not decode."""


@dataclass(slots=True)
class RawSample:
    """A sample as read. `bad`: 0, IO or CRC; `error` gives the reason."""

    parts: dict[str, Any] = field(default_factory=dict)  # name -> bytes-like
    label: int = -1
    bad: int = 0
    error: str = ""


class OpenFiles:
    """Positioned reads from a fixed list of tars, which are addressed by number."""

    def __init__(self, tars: Sequence[Path | RemoteTar], limit: int = 256):
        self._tars = tars
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._limit = limit if allowed < 0 else min(limit, allowed // 4)  # below 0: without a limit
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}  # tar -> descriptor, in the order of opening
        weakref.finalize(self, _close_all, self._open)
        self._threads: ThreadPoolExecutor | None = None
        self._seconds = 0.0  # running mean over the first read of each batch
        self._needed: frozenset[int] = frozenset()

    def read(self, requests: Sequence[tuple[int, int, int]]) -> list[bytes | OSError]:
        """The bytes of each (tar, offset, size), or the OSError that prevented the read (a short file is one)."""
        self._reset_after_fork()
        while len(self._open) > self._limit:
            self._close(next(iter(self._open)))
        began = time.perf_counter()
        results = [self._read(request) for request in requests[:1]]
        self._seconds += 0.5 * (time.perf_counter() - began - self._seconds)
        if self._seconds < _SLOW_SECONDS:
            return results + [self._read(request) for request in requests[1:]]
        self._threads = self._threads or ThreadPoolExecutor(_IN_FLIGHT)
        return results + list(self._threads.map(self._read, requests[1:]))

    def keep_remote(self, needed: Sequence[int], to_fetch: Sequence[int]) -> None:
        """Release all remote tars except those `needed`; fetch some of them in the background."""
        self._reset_after_fork()
        self._needed = frozenset(needed)
        for number in [n for n in list(self._open) if n not in self._needed and isinstance(self._tars[n], RemoteTar)]:
            self._close(number)
        queue = deque(number for number in to_fetch if number not in self._open)
        for _ in range(min(_FETCHES, len(queue))):
            threading.Thread(target=self._fetch, args=(queue,), daemon=True).start()

    def _fetch(self, queue: deque[int]) -> None:
        with contextlib.suppress(IndexError, OSError, ValueError):  # only a prefetch: the read itself reports
            while True:
                number = queue.popleft()
                while number in self._needed and number not in self._open:
                    try:
                        self._descriptor(number, ahead=True)
                    except NoRoom:
                        time.sleep(_RETRY_SECONDS)  # until other processes release the previous window

    def _reset_after_fork(self) -> None:
        if self._pid != os.getpid():
            self._reset()

    def _read(self, request: tuple[int, int, int]) -> bytes | OSError:
        number, offset, size = request
        try:
            try:
                data = _pread(self._descriptor(number), size, offset)
            except OSError:  # a stale network handle: open it again, once
                self._close(number)
                data = _pread(self._descriptor(number), size, offset)
        except OSError as error:
            return error
        if len(data) < size:
            return OSError(f"{self._tars[number]} ends at byte {offset + len(data)}, before {offset + size}")
        return data

    def _descriptor(self, number: int, ahead: bool = False) -> int:
        descriptor = self._open.get(number)
        if descriptor is None:
            opened = open_descriptor(self._tars[number], ahead)  # not under the lock: it may take a download
            with self._lock:
                descriptor = self._open.setdefault(number, opened)
            if descriptor != opened:
                os.close(opened)
        return descriptor

    def _close(self, number: int) -> None:
        with self._lock:
            if number in self._open:
                os.close(self._open.pop(number))


def _close_all(descriptors: dict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


class PartReader:
    """Reads samples of one data set: the parts in `part_names`, or all but the label's if that is None."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        part_names: Sequence[str] | None,
        recent_indexes: int,
        cache: Cache,
    ):
        self._made_from = folder, manifest, part_names, recent_indexes, cache
        self.manifest = manifest
        self.part_names = part_names
        self.tars = Tars(folder, manifest, cache)
        self.has_remote = len(self.tars.remote) > 0
        self._files = OpenFiles(self.tars, max(256, recent_indexes))
        # Not a method of this class: without a reference cycle, files are closed with the last use of the reader.
        self._index = lru_cache(recent_indexes)(self.tars.read_index)

    def __reduce__(self) -> tuple[Any, ...]:
        """For a worker that is started afresh: it opens its own files."""
        return PartReader, self._made_from

    def index(self, shard: int) -> ShardIndex:
        """The shard's index. Raises FileNotFoundError or ValueError."""
        return self._index(shard)

    def read(self, shards: Int64[np.ndarray, "n"], rows: Int64[np.ndarray, "n"]) -> list[RawSample]:
        """One RawSample per (shard, row), in the order given."""
        samples = [RawSample() for _ in range(len(rows))]
        reads: list[_TarReads] = []
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            try:
                index = self.index(shard)
            except (OSError, ValueError) as error:
                _fail([samples[i] for i in chosen], IO, str(error))
                continue
            reads.append(_TarReads.of(index, shard, rows[chosen], self.part_names, [samples[i] for i in chosen]))
        data = iter(self._files.read([span for of_tar in reads for span in of_tar.spans]))
        for of_tar in reads:
            of_tar.fill_samples(data)
        return samples

    def prefetch(self, now: Sequence[int], following: Sequence[int], share: tuple[int, int], first: bool) -> None:
        """Reads go on in the shards `now`: fetch the `following` ones in the background.

        Local tars go into the page cache, up to a quarter of free memory, remote ones into the node's cache.
        share: (n, of): this process fetches every `of`-th shard from the n-th on. first: `now` was not prefetched.
        """
        mine = [*now[share[0] :: share[1]], *following[share[0] :: share[1]]]
        if self.has_remote:
            self._files.keep_remote([*now, *following], mine)
        soon = mine if first else following[share[0] :: share[1]]
        paths = [(tar, self.manifest.shards[n].bytes) for n in soon if isinstance(tar := self.tars[n], Path)]
        if paths and hasattr(os, "posix_fadvise"):
            threading.Thread(target=_fill_page_cache, args=(paths, share[1]), daemon=True).start()


class StoredSample(NamedTuple):
    """A sample as stored: its key, its label and the parts that were asked for, by name."""

    key: str
    label: int
    parts: dict[str, bytes]


def read_samples(
    folder: str | Path,
    parts: Sequence[str],
    positions: Sequence[int] | None = None,
    cache: Cache | None = None,
) -> Iterator[StoredSample]:
    """The samples of a data set at these positions in stored order (None: all), in the order asked, local or remote.

    `positions` count samples over all shards: 0 is the first sample of the first shard. Parts that a sample lacks are
    left out. For tools and pictures; loaders stream, shuffle and prefetch. Raises ValueError naming shard, key and
    cause for a sample that cannot be read whole, IndexError for a position outside the data set.
    """
    manifest = Manifest.load(folder)
    reader = PartReader(Path(folder), manifest, parts, len(manifest.shards), cache or Cache())
    ends = np.cumsum(manifest.column("num_samples"))
    asked = range(manifest.num_samples) if positions is None else positions
    if outside := [position for position in asked if not 0 <= position < manifest.num_samples]:
        raise IndexError(f"{folder}: there is no position {outside[0]} among {manifest.num_samples} samples")
    for first in range(0, len(asked), _AT_ONCE):
        chosen = np.asarray(asked[first : first + _AT_ONCE], np.int64)
        shards = np.searchsorted(ends, chosen, side="right")
        rows = chosen - np.append(0, ends)[shards]
        for shard, row, sample in zip(shards.tolist(), rows.tolist(), reader.read(shards, rows), strict=True):
            if sample.bad == IO:
                raise ValueError(sample.error)
            key = reader.index(shard).key(row)
            if sample.bad:
                raise ValueError(f"{reader.tars[shard]}: key {key!r}: {sample.error}")
            yield StoredSample(key, sample.label, {name: bytes(data) for name, data in sample.parts.items()})


@dataclass
class _TarReads:
    """Reads from one tar: one per sample, from its first part to the end of its last, in disk order.

    The columns stay plain lists over all samples: an object per sample would trigger the garbage collector every batch.
    """

    samples: list[RawSample]
    spans: list[tuple[int, int, int]]  # tar, offset, size
    columns: list[tuple[str, list[int], list[int], list[int]]]  # part's name; offset, size, crc32 per sample

    @classmethod
    def of(
        cls, index: ShardIndex, shard: int, rows: np.ndarray, part_names: Sequence[str] | None, samples: list[RawSample]
    ) -> "_TarReads":
        every = [name for name in index.part_names if name != "cls"]
        names = every if part_names is None else [name for name in part_names if name in index.offset]
        for sample, label in zip(samples, index.labels[rows].tolist(), strict=True):
            sample.label = label
        if not names:
            return cls([], [], [])
        offset, size, crc32 = (np.stack([t[n][rows] for n in names]) for t in (index.offset, index.size, index.crc32))
        start = np.where(offset < 0, _MAX_OFFSET, offset).min(0)
        width = np.where(offset < 0, 0, offset + size).max(0) - start
        too_large = width > MAX_SAMPLE_BYTES
        for i in np.flatnonzero(too_large).tolist():
            _fail([samples[i]], IO, f"its parts take {width[i]} bytes, above the limit of {MAX_SAMPLE_BYTES}")
        order = np.argsort(start)
        order = order[(width >= 0)[order] & ~too_large[order]]  # of samples that have any of the parts
        columns = zip(names, offset[:, order].tolist(), size[:, order].tolist(), crc32[:, order].tolist(), strict=True)
        spans = [(shard, at, length) for at, length in zip(start[order].tolist(), width[order].tolist(), strict=True)]
        return cls([samples[i] for i in order.tolist()], spans, list(columns))

    def fill_samples(self, data: Iterator[bytes | OSError]) -> None:
        """Take one item of `data` per sample and slice it into parts, each checked against its crc32."""
        for i, (sample, (_, start, _), read) in enumerate(zip(self.samples, self.spans, data, strict=False)):
            if isinstance(read, OSError):
                sample.bad, sample.error = IO, str(read)
                continue
            view = memoryview(read)
            for name, offsets, sizes, crc32s in self.columns:
                if offsets[i] < 0:
                    continue
                first = offsets[i] - start
                part = sample.parts[name] = view[first : first + sizes[i]]
                if zlib.crc32(part) != crc32s[i]:
                    sample.bad, sample.error = CRC, f"part {name!r} is damaged (crc32 differs)"


def _fail(samples: Iterable[RawSample], kind: int, error: str) -> None:
    for sample in samples:
        sample.bad, sample.error = kind, error


def _fill_page_cache(paths: Sequence[tuple[Path, int]], processes: int) -> None:
    budget = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (4 * processes)
    for path, size in paths:
        budget -= size
        if budget < 0:
            return
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue  # only a hint: the read itself reports
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        os.close(descriptor)
