"""Checks a data set against its `dataset.json`.  In: a folder.  Out: the differences; every byte is read once."""

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vqscale.data.processes import made_progress
from vqscale.data.remote import RemoteFile, open_tar
from vqscale.data.shards import Manifest, ShardIndex

_CHUNK = 1 << 20


def verify_shard(job: tuple[Path, int, bool]) -> list[str]:
    """The differences in one (folder, shard, allow_pipe): size and sha256 of the tar, crc32 of each part. [] = none.

    A remote tar is streamed, not stored.
    """
    folder, shard, allow_pipe = job
    manifest = Manifest.load(folder)
    try:
        index = manifest.index(folder, shard)
        with open_tar(manifest.tar(folder, shard), allow_pipe) as file:
            return list(_differences(_Stream(file), index))
    except (OSError, ValueError) as error:
        return [str(error)]


class _Stream:
    """A tar read once from front to back and hashed on the way."""

    def __init__(self, file: BinaryIO | RemoteFile):
        self._file = file
        self.name = file.name
        self.sha256 = hashlib.sha256()
        self.at = 0

    def crc32_of(self, size: int) -> int:
        """The crc32 of the next bytes, of fewer where the tar ends."""
        crc32 = 0
        while size and (data := self._file.read(min(size, _CHUNK))):
            made_progress()
            self.sha256.update(data)
            crc32 = zlib.crc32(data, crc32)
            self.at += len(data)
            size -= len(data)
            made_progress()
        return crc32


def _differences(tar: _Stream, index: ShardIndex) -> Iterator[str]:
    missing = []
    for offset, size, crc32, name in _parts(index):
        if offset < tar.at:
            raise ValueError(f"{index.where}: part {name} overlaps the one before it")
        tar.crc32_of(offset - tar.at)
        actual = tar.crc32_of(size)
        if tar.at < offset + size:
            missing.append(name)
        elif actual != crc32:
            yield f"{tar.name}: {name} is damaged (crc32 differs)"
    before = -1
    while before < tar.at <= index.bytes:  # more than that is a difference already
        before = tar.at
        tar.crc32_of(_CHUNK)
    if missing:
        yield f"{tar.name}: ends at byte {tar.at}, before {len(missing)} parts, the first of them {missing[0]}"
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
