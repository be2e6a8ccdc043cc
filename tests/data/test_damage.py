"""300 random damages to tars: not one sample is lost or changed without being counted.

Strict (`max_bad_fraction=0`): the run ends. Otherwise exactly the damaged samples are flagged and replaced, within the
budget.
"""

import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqscale.data.loader import Loader, build_loader
from vqscale.data.shards import Manifest, ShardIndex
from vqscale.data.verify import verify_shard

TRIALS = 300
N = 37
Damage = Callable[[bytes, random.Random], bytes]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip(data: bytes, rng: random.Random) -> bytes:
    """One to eight flipped bits anywhere."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def blank(data: bytes, rng: random.Random) -> bytes:
    """A stretch of zeros, as a lost block of a file system leaves it."""
    first = rng.randrange(len(data))
    length = min(rng.choice((1, 512, 4096)), len(data) - first)
    return data[:first] + bytes(length) + data[first + length :]


def shift(data: bytes, rng: random.Random) -> bytes:
    """A block missing in the middle, the end filled up: the same length."""
    first = rng.randrange(len(data) // 512) * 512
    return data[:first] + data[first + 512 :] + bytes(512)


def empty(data: bytes, _rng: random.Random) -> bytes:
    return b""


def swap(data: bytes, rng: random.Random) -> bytes:
    """Another file of the same length."""
    return rng.randbytes(len(data))


KINDS: tuple[Damage, ...] = (cut, cut, flip, flip, flip, blank, shift, swap, empty)


def digest(parts: Mapping[str, Any], _label: int, _position: int) -> dict[str, int]:
    """The `read` of this test: what was delivered, as a number."""
    return {"digest": zlib.crc32(parts["png"])}


def build(folder: Path, max_bad_fraction: float, bad_path: Path | None = None) -> Loader:
    return build_loader(
        folder, read=digest, global_batch=N, shuffle_window=2, max_bad_fraction=max_bad_fraction, bad_path=bad_path
    )


def epoch(loader: Loader) -> Iterator[tuple[tuple[int, int], int, int]]:
    """((shard, row), what was delivered, bad) of each sample of the first epoch."""
    batch = next(iter(loader))
    _, shards, rows = loader.dataset.order.locate(np.arange(N))
    for i, sample in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
        yield sample, int(batch["digest"][i]), int(batch["bad"][i])


def lost_rows(index: ShardIndex, data: bytes) -> set[int]:
    """Rows whose picture is no longer what it was."""
    spans = [(int(o), int(o + s)) for o, s in zip(index.offset["png"], index.size["png"], strict=True)]
    crc32 = index.crc32["png"]
    return {row for row, (a, b) in enumerate(spans) if b > len(data) or zlib.crc32(data[a:b]) != crc32[row]}


def test_no_damage_is_silent(own_images: Path, tmp_path: Path) -> None:
    rng = random.Random(4)
    manifest, whole = Manifest.load(own_images), {sample: value for sample, value, _ in epoch(build(own_images, 0))}
    assert len(whole) == N
    harmful = refused = 0
    for trial in range(TRIALS):
        shard, kind = rng.randrange(len(manifest.shards)), rng.choice(KINDS)
        path, index = own_images / f"{shard:06d}.tar", manifest.index(own_images, shard)
        before = path.read_bytes()
        after = kind(before, rng)
        path.write_bytes(after)
        lost = {(shard, row) for row in lost_rows(index, after)}
        about = f"trial {trial}: {kind.__name__} of shard {shard}"
        assert (verify_shard((own_images, shard, False)) != []) == (after != before), about

        named = tmp_path / f"{trial}.jsonl"
        lenient = build(own_images, 0.5, named)
        found = list(epoch(lenient))
        assert {sample for sample, _, bad in found if bad} == lost, about
        assert all((value == whole[sample]) != bool(bad) for sample, value, bad in found), about
        lines = [json.loads(line) for line in named.read_text().splitlines()] if named.exists() else []
        assert sorted(line["key"] for line in lines) == sorted(index.key(row) for _, row in lost), about
        lenient.advance()
        lenient.count_bad({"crc": len(lost)})  # within the budget: it goes on

        harmful += bool(lost)
        if lost:
            with pytest.raises(ValueError, match="cut short|more than the 0 that max_bad_fraction=0 allows"):
                strict = build(own_images, 0)
                strict.advance()
                strict.count_bad({"crc": sum(bad > 0 for _, _, bad in epoch(strict))})
            refused += 1
        path.write_bytes(before)
    assert refused == harmful > 100  # the others hit headers, labels and padding
