import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqscale.data.images import ImageReader
from vqscale.data.loader import TarDataset
from vqscale.data.sequential import read_runs, sequential_batches
from vqscale.data.shards import Manifest

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
READ = ImageReader(12)


@pytest.mark.parametrize(("world", "batch", "workers"), [(1, 5, 0), (1, 37, 0), (2, 8, 2), (3, 4, 0), (5, 64, 0)])
def test_every_sample_counts_once(images: Path, world: int, batch: int, workers: int) -> None:
    counted: list[int] = []
    for rank in range(world):
        batches = sequential_batches(images, read=READ, batch=batch, rank=rank, world_size=world, workers=workers)
        got = list(batches)
        assert len(got) == len(batches) == -(-37 // (batch * world))
        assert all(len(b["image"]) == len(b["weight"]) == batch for b in got)
        counted += [int(p) for b in got for p, w in zip(b["position"], b["weight"], strict=True) if w]
    assert sorted(counted) == list(range(37))


def test_limit_and_stored_order(images: Path) -> None:
    batches = list(sequential_batches(images, read=READ, batch=4, limit=10))
    assert torch.cat([b["position"][b["weight"] > 0] for b in batches]).tolist() == list(range(10))
    labels = [label for n in range(2) for label in Manifest.load(images).index(images, n).labels]
    assert torch.cat([b["label"] for b in batches])[:8].tolist() == labels[:8]


def test_a_bad_sample_has_no_weight(own_images: Path) -> None:
    index = Manifest.load(own_images).index(own_images, 4)
    os.truncate(own_images / "000004.tar", int(index.offset["png"][10]))
    batches = list(sequential_batches(own_images, read=READ, batch=37))
    assert batches[0]["bad"].tolist() == [0] * 36 + [2]
    assert batches[0]["weight"].tolist() == [1.0] * 36 + [0.0]


def test_shard_blocks_are_the_same_whoever_reads_them(images: Path) -> None:
    runs = Manifest.load(images).runs([0, 2, 4])
    alone = list(read_runs(images, runs, read=READ, block=4))
    assert [len(b["image"]) for b in alone] == [4] * (2 + 4 + 3)
    starts = {0: 0, 2: 8, 4: 26}
    expected = [starts[s] + row for s, size in ((0, 7), (2, 13), (4, 11)) for row in range(size)]
    assert torch.cat([b["position"][b["weight"] > 0] for b in alone]).tolist() == expected
    other = [b for run in runs for b in read_runs(images, [run], read=READ, block=4, workers=1)]
    for one, two in zip(alone, other, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


LEFT_OPEN = """
import sys
from vqscale.data.images import ImageReader
from vqscale.data.sequential import sequential_batches

class Held:
    pass

if __name__ == "__main__":
    batches = iter(sequential_batches(sys.argv[1], read=ImageReader(12), batch=5, workers=2))
    held = Held()
    held.me, held.batches = held, batches  # a cycle, as an error's traceback makes one
    next(batches)
"""


def test_a_process_ends_though_its_workers_were_left_open(images: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", LEFT_OPEN, str(images)]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_empty_data_set_is_named(tmp_path: Path) -> None:
    Manifest.of("images", [], ["a"]).save(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: .*0 samples"):
        TarDataset(tmp_path, READ)
