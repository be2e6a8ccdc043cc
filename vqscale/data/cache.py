"""Remote shards -> files of this node.

In: tars at URLs, with the size and sha256 that `dataset.json` gives them.  Out: open files of verified copies. All
ranks and loader workers of a node share one folder: a shard is fetched once, by whoever comes first. A copy is named
after its sha256 and appears whole. Whoever has it open holds a lock on it, and it stays; of the others, those go first
that were not used for longest.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vqscale.config import ReadsShards
from vqscale.data.remote import RemoteFile, check_url, shown
from vqscale.data.shards import Manifest

_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_POLL = 0.05  # seconds between looks at a shard that somebody else fetches
_GRUDGE = 30.0  # seconds in which a shard that could not be had is not asked for again, by anybody on the node


class NoRoom(OSError):
    """The cache is full of shards in use."""


@dataclass(frozen=True)
class Cache:
    """The folder where this node keeps remote shards, how many bytes it may hold, whether pipes may run."""

    folder: Path = Path(tempfile.gettempdir()) / f"vqscale-{os.getuid()}"
    limit: int = 100 * 10**9  # bytes
    allow_pipe: bool = False

    @classmethod
    def of(cls, config: ReadsShards) -> "Cache":
        """As a stage's config says."""
        folder = Path(config.cache_dir) if config.cache_dir else cls.folder
        return cls(folder, int(config.cache_gigabytes * 1e9), config.allow_pipe)

    def check_size(self, shards: Sequence[int]) -> None:
        """Raises ValueError unless shards of these sizes, two windows of them, can be held together."""
        if sum(shards) > self.limit:
            raise ValueError(
                f"cache_gigabytes={self.limit / 1e9:g} does not hold two windows of this data set: {len(shards)} "
                f"shards of up to {sum(shards) / 1e9:.3g} GB together; allow more, or a smaller shuffle_window"
            )

    def make_folder(self) -> None:
        """Raises ValueError when the folder cannot be made, or is somebody else's."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.folder.stat().st_uid
        except OSError as error:
            raise ValueError(f"cache_dir={self.folder} cannot be made: {error.strerror}") from None
        if owner != os.getuid() or not os.access(self.folder, os.W_OK):
            raise ValueError(f"cache_dir={self.folder} belongs to user {owner}, or cannot be written; choose another")


@dataclass(frozen=True)
class RemoteTar:
    """A shard at a URL, and what its copy must be."""

    url: str
    size: int
    sha256: str
    cache: Cache

    def __str__(self) -> str:
        return shown(self.url)

    def open(self, ahead: bool = False) -> int:
        """A descriptor of the verified copy, fetched if need be; the copy stays until it is closed.

        Raises OSError naming the URL when the shard cannot be had, ValueError when this node cannot keep it. `ahead`:
        raises NoRoom instead of going over the cache's size.
        """
        while True:
            if (found := _open_copy(self._copy, self.size)) is not None:
                return found
            with self._kept():
                part = _lock(self._part, os.O_RDWR | os.O_CREAT)
            if part is None:
                time.sleep(_POLL)  # another process, or thread, fetches it
            elif (found := _open_copy(self._copy, self.size)) is not None:  # it came meanwhile
                self._part.unlink()
                os.close(part)
                return found
            else:
                return self._fetch_into(part, ahead)

    @property
    def _copy(self) -> Path:
        return self.cache.folder / f"{self.sha256}.tar"

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
            _make_room(self, part, ahead)
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
            for _ in range(2):  # a proxy may have spoilt the first
                size, sha256 = self._download(part)
                if (size, sha256) == (self.size, self.sha256):
                    with self._kept():
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
        digest, size = hashlib.sha256(), 0
        with RemoteFile(self.url, self.cache.allow_pipe) as source:
            while size <= self.size and (data := source.read(_CHUNK)):
                digest.update(data)
                self._write(part, data, size)
                size += len(data)
        return size, digest.hexdigest()

    def _write(self, part: int, data: bytes, at: int) -> None:
        view = memoryview(data)
        with self._kept():
            while view:
                count = os.pwrite(part, view, at)
                view, at = view[count:], at + count

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """A disk that is full is this node's trouble and not the shard's: it ends the run."""
        try:
            yield
        except OSError as error:
            raise ValueError(f"cache_dir={self.cache.folder}: {error.strerror} while keeping {self}") from None

    def _read_note(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - self._note.stat().st_mtime < _GRUDGE:
                raise ConnectionError(self._note.read_text() or f"{self} could not be had a moment ago")


def tar_places(folder: str | Path, manifest: Manifest, cache: Cache) -> list[Path | RemoteTar]:
    """Where each tar of a data set is: a path, or a RemoteTar.

    Raises ValueError for a URL that would not be opened, or a cache that cannot be written; nothing is fetched yet.
    """
    places = [manifest.tar(folder, n) for n in range(len(manifest.shards))]
    urls = [place for place in places if isinstance(place, str)]
    for url in urls:
        check_url(url, cache.allow_pipe)
    if wrong := [shard.sha256 for shard in manifest.shards if urls and not _SHA256.fullmatch(shard.sha256)]:
        raise ValueError(f"{folder}: {wrong[0]!r} is not a sha256 in hexadecimal")  # it becomes a file's name
    if urls:
        cache.make_folder()
    return [
        RemoteTar(place, shard.bytes, shard.sha256, cache) if isinstance(place, str) else place
        for place, shard in zip(places, manifest.shards, strict=True)
    ]


def open_place(place: Path | RemoteTar, ahead: bool = False) -> int:
    """A descriptor to read a tar from, wherever it is."""
    if isinstance(place, RemoteTar):
        return place.open(ahead)
    return os.open(place, os.O_RDONLY | os.O_CLOEXEC)


def _open_copy(path: Path, size: int) -> int | None:
    """A whole copy's descriptor with a reader's lock; None where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    found = os.fstat(descriptor)
    if found.st_nlink and found.st_size == size:
        os.utime(descriptor)  # used just now
        return descriptor
    os.close(descriptor)  # removed before it was locked, or spoilt by a crash of the machine
    return None


def _lock(path: Path, flags: int) -> int | None:
    """The file's descriptor, held by us alone; None while somebody has it, or when it went meanwhile."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        if flags & os.O_CREAT:
            raise  # there is no folder
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    os.close(descriptor)
    return None


def _make_room(shard: RemoteTar, part: int, ahead: bool) -> None:
    """Remove what nobody uses, longest unused first, until the shard fits; its part file then has its size.

    A shard that is needed now is let in even over the limit: `Cache.check` made that the exception.
    """
    with _one_at_a_time(shard.cache.folder):
        files = dict(_files(shard.cache.folder))
        files.pop(shard._part, None)
        left = shard.cache.limit - shard.size - sum(file.st_size for file in files.values())
        for path in sorted(files, key=lambda path: (path.suffix == ".tar", files[path].st_mtime_ns)):
            if left >= 0 and path.suffix == ".tar":
                break  # parts that nobody fetches any more go in any case
            if (descriptor := _lock(path, os.O_RDONLY)) is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)
                left += files[path].st_size
        if ahead and left < 0:
            raise NoRoom(f"cache_dir={shard.cache.folder} is full of shards in use")
        with shard._kept():
            os.ftruncate(part, shard.size)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in [*folder.glob("*.part"), *folder.glob("*.tar")]:
        with contextlib.suppress(FileNotFoundError):  # a part may go, or become a copy, meanwhile
            yield path, path.stat()


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
