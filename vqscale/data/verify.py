"""Is a data set still what its `dataset.json` says?  In: a folder.  Out: what differs, every byte read again."""

import hashlib
from pathlib import Path

from vqscale.data.shards import Manifest, read_row

_CHUNK = 1 << 22


def verify_shard(job: tuple[Path, int]) -> list[str]:
    """Differences found in one (folder, shard): size, sha256 of the tar, crc32 of each part. [] = whole."""
    folder, shard = job
    manifest = Manifest.load(folder)
    info, path = manifest.shards[shard], manifest.tar(folder, shard)
    try:
        index = manifest.index(folder, shard)
        digest, size = _digest(path)
    except (OSError, ValueError) as error:
        return [str(error)]
    found = []
    if (size, digest) != (info.bytes, info.sha256):
        found.append(f"{path}: {size} bytes, sha256 {digest[:12]}…; indexed with {info.bytes}, {info.sha256[:12]}…")
    with open(path, "rb") as file:
        for row in range(len(index)):
            try:
                read_row(file, index, row, index.part_names)
            except ValueError as error:
                found.append(str(error))
    return found


def _digest(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
            size += len(data)
    return digest.hexdigest(), size
