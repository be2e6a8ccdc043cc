"""Is a data set still what its `dataset.json` says?  In: a folder.  Out: what differs, every byte read once."""

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vqscale.data.remote import RemoteFile, open_tar
from vqscale.data.shards import Manifest, ShardIndex

_CHUNK = 1 << 20


def verify_shard(job: tuple[Path, int, bool]) -> list[str]:
    """Differences found in one (folder, shard, allow_pipe): size, sha256 of the tar, crc32 of each part. [] = whole.

    A remote tar is streamed, and not kept.
    """
    folder, shard, allow_pipe = job
    manifest = Manifest.load(folder)
    try:
        index = manifest.index(folder, shard)
        with open_tar(manifest.tar(folder, shard), allow_pipe) as file:
            found = list(_differences(_Pass(file), index))
    except (OSError, ValueError) as error:
        return [str(error)]
    return found


class _Pass:
    """A tar read front to back, hashed on the way."""

    def __init__(self, file: BinaryIO | RemoteFile):
        self._file = file
        self.name = file.name
        self.sha256 = hashlib.sha256()
        self.at = 0

    def crc32_of(self, size: int) -> int:
        """The crc32 of the next bytes, of fewer where the tar ends."""
        crc32 = 0
        while size and (data := self._file.read(min(size, _CHUNK))):
            self.sha256.update(data)
            crc32 = zlib.crc32(data, crc32)
            self.at += len(data)
            size -= len(data)
        return crc32


def _differences(tar: _Pass, index: ShardIndex) -> Iterator[str]:
    lost = []
    for offset, size, crc32, name in _parts(index):
        if offset < tar.at:
            raise ValueError(f"{index.where}: part {name} begins inside the one before it")
        tar.crc32_of(offset - tar.at)
        found = tar.crc32_of(size)
        if tar.at < offset + size:
            lost.append(name)
        elif found != crc32:
            yield f"{tar.name}: {name} is damaged (crc32 differs)"
    before = -1
    while tar.at > before:
        before = tar.at
        tar.crc32_of(_CHUNK)
    if lost:
        yield f"{tar.name}: ends at byte {tar.at}, before {len(lost)} parts, {lost[0]} the first"
    if (tar.at, tar.sha256.hexdigest()) != (index.bytes, index.sha256):
        yield (
            f"{tar.name}: {tar.at} bytes, sha256 {tar.sha256.hexdigest()[:12]}…; indexed with {index.bytes}, "
            f"{index.sha256[:12]}…"
        )


def _parts(index: ShardIndex) -> list[tuple[int, int, int, str]]:
    """(offset, size, crc32, key.part) of every part, in the order of the tar."""
    return sorted(
        (int(offset), int(index.size[name][row]), int(index.crc32[name][row]), f"{index.key(row)}.{name}")
        for name in index.part_names
        for row, offset in enumerate(index.offset[name])
        if offset >= 0
    )
