"""A data set of very many shards for the price of one: every shard is a copy of the same small tar.

In: how many.  Out: a folder whose description lists them all. The tars that are read first exist, as links to one
file. While `pretending` is on, `os.stat` answers for the others too: half a million files would take minutes to make.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vqscale.data.codes import pack_codes
from vqscale.data.order import ShuffleOrder
from vqscale.data.shards import Manifest, ShardInfo, ShardWriter

SAMPLES = 20  # in each shard
FACTS = {"levels": {"top": [2, 2]}, "views": 1, "num_codes": 4096}


def make_many_shards(folder: Path, count: int, window: int, ahead: int = 3) -> None:
    """A data set of `count` shards of codes; those of the first `ahead` windows of seed 0 exist."""
    folder.mkdir()
    with ShardWriter(folder / "one.tar") as writer:
        for n in range(SAMPLES):
            writer.write(f"k{n:02d}", {**pack_codes({"top": np.full((1, 2, 2), n, np.uint16)}), "cls": b"0"})
    assert (one := writer.info) is not None
    shards = [
        ShardInfo(f"{n:06d}.tar", SAMPLES, one.bytes, one.sha256, "one.index.safetensors", one.index_sha256)
        for n in range(count)
    ]
    Manifest.of("codes", shards, ["a"], {"resolution": 8}, FACTS).save(folder)
    order = ShuffleOrder([SAMPLES] * count, 0, window)
    for n in {int(n) for later in range(ahead) for n in order.window_shards(0, later)[1]}:
        os.link(folder / "one.tar", folder / f"{n:06d}.tar")


@contextlib.contextmanager
def pretending(folder: Path) -> Iterator[None]:
    """`os.stat` finds every tar of the folder. Count inside of it, so that these calls are counted."""
    stat, one = os.stat, os.stat(folder / "one.tar")

    def of_any(path, *arguments, **options):  # type: ignore[no-untyped-def]
        is_tar = isinstance(path, str | os.PathLike) and os.fspath(path).endswith(".tar")
        return one if is_tar else stat(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", of_any)
        yield
