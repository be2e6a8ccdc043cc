"""Checks a data set against its `dataset.json`.  In: a folder.  Out: the differences; every byte is read once."""

import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from vqscale.data.remote import open_tar
from vqscale.data.shards import MANIFEST, HashedFile, Manifest, ShardIndex

_CHUNK = 1 << 20


def verify_shard(job: tuple[Path, int, bool]) -> list[str]:
    """The differences in one (folder, shard, allow_pipe): size and sha256 of the tar, crc32 of each part. [] = none.

    A remote tar is streamed, not stored.
    """
    folder, shard, allow_pipe = job
    manifest = _manifest(folder, (folder / MANIFEST).stat().st_mtime_ns)
    try:
        index = manifest.index(folder, shard)
        with open_tar(manifest.tar(folder, shard), allow_pipe) as file:
            return list(_differences(HashedFile(file), index))
    except (OSError, ValueError) as error:
        return [str(error)]


@lru_cache(1)
def _manifest(folder: Path, _changed: int) -> Manifest:
    return Manifest.load(folder)


def _differences(tar: HashedFile, index: ShardIndex) -> Iterator[str]:
    missing = []
    for offset, size, crc32, name in _parts(index):
        if offset < tar.tell():
            raise ValueError(f"{index.where}: part {name} overlaps the one before it")
        _crc32(tar, offset - tar.tell())
        actual = _crc32(tar, size)
        if tar.tell() < offset + size:
            missing.append(name)
        elif actual != crc32:
            yield f"{tar.name}: {name} is damaged (crc32 differs)"
    while tar.tell() <= index.bytes and tar.read(_CHUNK):  # more than that is a difference already
        pass
    if missing:
        yield f"{tar.name}: ends at byte {tar.tell()}, before {len(missing)} parts, the first of them {missing[0]}"
    if (tar.tell(), tar.sha256.hexdigest()) != (index.bytes, index.sha256):
        yield (
            f"{tar.name}: {tar.tell()} bytes, sha256 {tar.sha256.hexdigest()[:12]}…; indexed with {index.bytes}, "
            f"{index.sha256[:12]}…"
        )


def _crc32(tar: HashedFile, size: int) -> int:
    """The crc32 of the next bytes, of fewer where the tar ends."""
    crc32 = 0
    while size and (data := tar.read(min(size, _CHUNK))):
        crc32 = zlib.crc32(data, crc32)
        size -= len(data)
    return crc32


def _parts(index: ShardIndex) -> list[tuple[int, int, int, str]]:
    """(offset, size, crc32, key.part) of every part, in the order of the tar."""
    return sorted(
        (int(offset), int(index.size[name][row]), int(index.crc32[name][row]), f"{index.key(row)}.{name}")
        for name in index.part_names
        for row, offset in enumerate(index.offset[name])
        if offset >= 0
    )
