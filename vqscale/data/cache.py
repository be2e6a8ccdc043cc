"""Remote shards, and indexes on slow file systems -> files of this node.

In: tars at URLs and indexes on a shared file system, with the sha256 that `dataset.json` gives them.  Out: open tars,
the bytes of indexes, all from verified copies. All ranks and loader workers of a node share one folder: each file is
fetched once, by whoever comes first. A copy is named after its sha256 and appears whole. Readers of a tar hold a lock
on it, and it stays; an index is read whole. Of the others, those unused for longest are removed first. Nothing else is
touched: copies have a sub-folder of their own, which must be ours and no link.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vqscale.config import ReadsShards
from vqscale.data.remote import RemoteFile, check_url, is_url
from vqscale.data.shards import HashedFile, Manifest, ShardIndex
from vqscale.files import open_own
from vqscale.text import redact_url

_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_POLL = 0.05  # seconds between looks at a shard that another process fetches
_RETRY_AFTER_SECONDS = 30.0  # after a failure no process of the node asks for a shard again
_TAG = "CACHEDIR.TAG"  # marks a folder that may be emptied: https://bford.info/cachedir/
_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# Copies of remote shards, made by vqscale.\n"
_OURS = re.compile(r"[0-9a-f]{64}\.(tar|index|part)")
_MOST_INDEXES = 4096  # copies: looking for room takes time for each


class NoRoom(OSError):
    """The cache is full of shards in use."""


@dataclass(frozen=True)
class Cache:
    """The folder where this node keeps remote shards and their indexes, how many bytes it may hold, whether pipes may
    run. `keep_indexes`: those of local data sets too."""

    folder: Path = Path(tempfile.gettempdir()) / f"vqscale-{os.getuid()}"
    limit: int = 100 * 10**9  # bytes
    allow_pipe: bool = False
    keep_indexes: bool = False

    @classmethod
    def of(cls, config: ReadsShards) -> "Cache":
        """As a stage's config says."""
        folder = Path(config.cache_dir) if config.cache_dir else cls.folder
        return cls(folder, int(config.cache_gigabytes * 1e9), config.allow_pipe, bool(config.cache_dir))

    def check_size(self, shards: Sequence[int]) -> None:
        """Raises ValueError unless shards of these sizes, two windows of them, can be held together."""
        if sum(shards) > self.limit:
            raise ValueError(
                f"cache_gigabytes={self.limit / 1e9:g} does not hold two windows of this data set: {len(shards)} "
                f"shards of up to {sum(shards) / 1e9:.3g} GB together; allow more, or a smaller shuffle_window"
            )

    @property
    def shards(self) -> Path:
        """The sub-folder with the copies; nothing outside it is ever written or removed."""
        return self.folder / f"vqscale-shards-{os.getuid()}"

    def make_folder(self) -> None:
        """Raises ValueError when the folder cannot be made, or is not safely ours."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Anybody may write beside the default folder, and could have put a link there.
            problem = _why_not_ours(self.folder) if self.folder == Cache.folder else ""
            if not problem and not os.path.lexists(self.shards):
                _make_tagged(self.shards)
            problem = problem or _why_not_ours(self.shards)
            if not problem and not (self.shards / _TAG).is_file():
                problem = f"{self.shards} has no {_TAG}: it was not made by vqscale"
        except OSError as error:
            raise ValueError(f"cache_dir={self.folder} cannot be made: {error.strerror}") from None
        if problem:
            raise ValueError(f"cache_dir={self.folder}: {problem}; choose another")


def _make_tagged(folder: Path) -> None:
    """The folder appears with its tag in it; another process may have been faster."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (temporary / _TAG).write_text(_TAG_TEXT)
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise


def _why_not_ours(folder: Path) -> str:
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode):
        return f"{folder} is a link" if stat.S_ISLNK(info.st_mode) else f"{folder} is no folder"
    if info.st_uid != os.getuid():
        return f"{folder} belongs to user {info.st_uid}"
    return f"{folder} may be written by others" if info.st_mode & 0o022 else ""


@dataclass(frozen=True)
class RemoteTar:
    """A shard at a URL, and what its copy must be."""

    url: str
    size: int
    sha256: str
    cache: Cache

    def __str__(self) -> str:
        return redact_url(self.url)

    def open(self, ahead: bool = False) -> int:
        """A descriptor of the verified copy, fetched if need be; the copy stays until it is closed.

        Raises OSError naming the URL when the shard cannot be had, ValueError when this node cannot keep it. `ahead`:
        raises NoRoom instead of going over the cache's size.
        """
        while True:
            if (copy := _open_copy(self._copy, self.size)) is not None:
                return copy
            with self._storing():
                part = _lock(self._part, os.O_RDWR | os.O_CREAT)
            if part is None:
                time.sleep(_POLL)  # another process, or thread, fetches it
            elif (copy := _open_copy(self._copy, self.size)) is not None:  # it came meanwhile
                self._part.unlink()
                os.close(part)
                return copy
            else:
                return self._fetch_into(part, ahead)

    @property
    def _copy(self) -> Path:
        return self.cache.shards / f"{self.sha256}.tar"

    @property
    def _part(self) -> Path:
        return self._copy.with_suffix(".part")

    @property
    def _note(self) -> Path:
        return self._copy.with_suffix(".error")

    def _fetch_into(self, part: int, ahead: bool) -> int:
        """Fill the locked part file and give it its name; afterwards its lock is a reader's."""
        try:
            self._read_note()
            with self._storing():
                _make_room(self.cache, self.size, self._part, part, ahead)
            self._fetch(part)
            os.replace(self._part, self._copy)
            self._note.unlink(missing_ok=True)
            fcntl.flock(part, fcntl.LOCK_SH)
            return part
        except BaseException:
            self._part.unlink(missing_ok=True)
            os.close(part)
            raise

    def _fetch(self, part: int) -> None:
        try:
            for _ in range(2):  # a proxy may have damaged the first
                size, sha256 = self._download(part)
                if (size, sha256) == (self.size, self.sha256):
                    with self._storing():
                        os.ftruncate(part, self.size)  # a first, wrong one may have been longer
                        os.fsync(part)
                    return
            raise OSError(
                f"{self}: {size} bytes, sha256 {sha256[:12]}…, where {self.size}, {self.sha256[:12]}… were indexed: "
                "damaged, or another file"
            )
        except OSError as error:
            with contextlib.suppress(OSError):
                self._note.write_text(str(error))
            raise

    def _download(self, part: int) -> tuple[int, str]:
        with RemoteFile(self.url, self.cache.allow_pipe, compare_versions=False) as remote:
            source = HashedFile(remote)
            while source.tell() <= self.size and (data := source.read(_CHUNK)):
                self._write(part, data, source.tell() - len(data))
        return source.tell(), source.sha256.hexdigest()

    def _write(self, part: int, data: bytes, at: int) -> None:
        view = memoryview(data)
        with self._storing():
            while view:
                count = os.pwrite(part, view, at)
                view, at = view[count:], at + count

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        """A full disk is this node's fault and not the shard's: it ends the run."""
        try:
            yield
        except NoRoom:
            raise
        except OSError as error:
            raise ValueError(f"cache_dir={self.cache.folder}: {error.strerror} while keeping {self}") from None

    def _read_note(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - self._note.stat().st_mtime < _RETRY_AFTER_SECONDS:
                raise ConnectionError(self._note.read_text() or f"{self} could not be had a moment ago")


class Tars(Sequence[Path | RemoteTar]):
    """Where each tar of a data set is: a path, or a RemoteTar. `remote`: the numbers of those, int64 [k]."""

    def __init__(self, folder: str | Path, manifest: Manifest, cache: Cache):
        """Raises ValueError for a URL that would not be opened, or a cache that cannot be written; nothing is fetched
        yet."""
        self._folder, self._manifest, self._cache = folder, manifest, cache
        names = manifest.column("name")
        self.remote = np.flatnonzero([is_url(name) for name in names])
        for url in {names[n].rpartition("/")[0]: names[n] for n in self.remote}.values():  # one of each host and folder
            check_url(url, cache.allow_pipe)
        if len(self.remote):
            if wrong := [digest for digest in manifest.column("sha256") if not _SHA256.fullmatch(digest)]:
                raise ValueError(f"{folder}: {wrong[0]!r} is not a sha256 in hexadecimal")  # it becomes a file's name
        self._keeps_indexes = cache.keep_indexes or len(self.remote) > 0
        if self._keeps_indexes:
            cache.make_folder()

    def __len__(self) -> int:
        return len(self._manifest.shards)

    def __getitem__(self, number: Any) -> Any:
        tar, shard = self._manifest.tar(self._folder, number), self._manifest.shards[number]
        return RemoteTar(tar, shard.bytes, shard.sha256, self._cache) if isinstance(tar, str) else tar

    def read_index(self, number: int) -> ShardIndex:
        """A tar's index, through the cache if that keeps it. Raises FileNotFoundError or ValueError."""
        sha256 = self._manifest.shards[number].index_sha256
        if not self._keeps_indexes or not _SHA256.fullmatch(sha256):
            return self._manifest.index(self._folder, number)
        return self._manifest.index(self._folder, number, partial(_index_bytes, sha256=sha256, cache=self._cache))


def open_descriptor(tar: Path | RemoteTar, ahead: bool = False) -> int:
    """To read a tar from, local or remote."""
    if isinstance(tar, RemoteTar):
        return tar.open(ahead)
    return os.open(tar, os.O_RDONLY | os.O_CLOEXEC)


def _open_copy(path: Path, size: int) -> int | None:
    """A whole copy's descriptor with a reader's lock; None where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    info = os.fstat(descriptor)
    if info.st_nlink and info.st_size == size:
        os.utime(descriptor)  # used just now
        return descriptor
    os.close(descriptor)  # removed before it was locked, or cut by a crash of the machine
    return None


def _lock(path: Path, flags: int) -> int | None:
    """The file's descriptor, locked by us alone; None while another has it, or when it was removed meanwhile.

    Raises OSError where a file cannot be made, or the file system has no locks.
    """
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        if flags & os.O_CREAT:
            raise  # there is no folder
        return None
    is_ours = False
    try:
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(descriptor), os.stat(path))
    finally:
        if not is_ours:
            os.close(descriptor)
    return descriptor if is_ours else None


def _index_bytes(path: Path, sha256: str, cache: Cache) -> bytes:
    """An index, from this node's copy, which the first that asks makes; as it is where there can be no copy."""
    copy, part = (cache.shards / f"{sha256}{suffix}" for suffix in (".index", ".part"))
    while not (data := _read_copy(copy, sha256)):
        try:
            descriptor = _lock(part, os.O_RDWR | os.O_CREAT)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            return path.read_bytes()
        if descriptor is None:
            time.sleep(_POLL / 10)  # another process, or thread, reads it
            continue
        try:
            return _read_copy(copy, sha256) or _copy_index(path, sha256, cache, copy, part, descriptor)
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), os.stat(part)):  # it has not become the copy
                    part.unlink()
            os.close(descriptor)
    return data


def _read_copy(copy: Path, sha256: str) -> bytes:
    """The index in this copy; empty where there is none, or a damaged one."""
    with contextlib.suppress(OSError):
        data = copy.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            os.utime(copy)  # used just now
            return data
    return b""


def _copy_index(path: Path, sha256: str, cache: Cache, copy: Path, part: Path, descriptor: int) -> bytes:
    """Read the index and keep it, if it is the right one and there is room."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() == sha256:
        with contextlib.suppress(OSError):
            _make_room(cache, len(data), part, descriptor, ahead=True)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
            os.replace(part, copy)
    return data


def _make_room(cache: Cache, size: int, part: Path, descriptor: int, ahead: bool) -> None:
    """Remove copies that nobody uses, longest unused first, until `size` bytes fit; the open part file then has them.

    A shard that is needed now is let in even over the limit: `Cache.check_size` made that the exception.
    """
    with open(cache.shards / "lock", "w", opener=open_own) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = dict(_files(cache.shards))
        files.pop(part, None)
        room = cache.limit - size - sum(file.st_size for file in files.values())
        by_age = sorted(files, key=lambda path: files[path].st_mtime_ns)
        unwanted = {path for path in by_age if path.suffix == ".part"}  # those that nobody fetches any more
        unwanted |= {*[path for path in by_age if path.suffix == ".index"][:-_MOST_INDEXES]}
        for path in sorted(by_age, key=lambda path: path not in unwanted):
            if room >= 0 and path not in unwanted:
                break
            if (lock_of_file := _lock(path, os.O_RDONLY)) is not None:
                path.unlink(missing_ok=True)
                os.close(lock_of_file)
                room += files[path].st_size
        if ahead and room < 0:
            raise NoRoom(f"cache_dir={cache.folder} is full of shards in use")
        os.ftruncate(descriptor, size)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # a part may be removed, or become a copy, meanwhile
                yield path, path.lstat()
