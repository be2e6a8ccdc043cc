"""How fast training batches of codes come from code shards, per core.

    python benchmarks/codes.py [--json FILE] [--quick] [--minutes M] [--folder DIR]

In: nothing. Out: one row, samples per second of one core's time (both views
of 32x32 and 64x64 codes on disk, one of them in the batch), through the loader that training uses, in its own process.
The limit is what the same core does when it only reads the same bytes and computes their checksums, in turns with it.
The shards are in the page cache: this is the program's cost, not the disk's.
"""

import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import arguments, at_least, finish, median

from vqscale.data.codes import CodeReader, pack_codes
from vqscale.data.loader import build_loader
from vqscale.data.shards import Manifest, ShardWriter

LEVELS, K, VIEWS, BATCH = {"top": (32, 32), "bottom": (64, 64)}, 512, 2, 64
GOAL = 20_000
MOST = 15  # rounds


def make_shards(folder: Path, shards: int, samples: int) -> None:
    """Random codes as `extract_codes` writes them."""
    rng = np.random.default_rng(0)
    infos = []
    for number in range(shards):
        with ShardWriter(folder / f"{number:06d}.tar") as writer:
            for row in range(samples):
                codes = {name: rng.integers(K, size=(VIEWS, *grid), dtype=np.uint16) for name, grid in LEVELS.items()}
                writer.write(f"{number:06d}_{row:06d}", pack_codes(codes) | {"cls": str(row % 10).encode()})
        assert writer.info is not None
        infos.append(writer.info)
    facts = {"levels": {name: list(grid) for name, grid in LEVELS.items()}, "views": VIEWS, "num_codes": K}
    Manifest.of("codes", infos, [str(n) for n in range(10)], {}, facts).save(folder)


def samples_per_core_second(action: Callable[[], Any], samples: int) -> float:
    """By the processor time of this process, so that other work on the machine does not count."""
    start = time.process_time()
    action()
    return samples / (time.process_time() - start)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, minutes=1, devices=("cpu",))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the shards are written")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="codes-", dir=args.folder))
    shards, samples = (2, 256) if args.quick else (16, 1024)
    batches = shards * samples // BATCH
    try:
        make_shards(folder, shards, samples)
        reader = CodeReader(LEVELS, views=VIEWS, flip=True, num_codes=K)
        loader = iter(build_loader(folder, read=reader, global_batch=BATCH, workers=0))

        def through_the_loader() -> None:
            for _ in range(batches):
                next(loader)

        def bytes_alone() -> None:
            for tar in sorted(folder.glob("*.tar")):
                with open(tar, "rb", buffering=0) as file:
                    while data := file.read(BATCH * 20_480):
                        zlib.crc32(data)

        through_the_loader()  # opens the shards
        found: list[list[float]] = []
        end = time.perf_counter() + 60 * args.minutes
        while len(found) < 2 or (len(found) < MOST and time.perf_counter() < end):
            turns = (through_the_loader, bytes_alone)
            found.append([samples_per_core_second(turn, batches * BATCH) for turn in turns])
    finally:
        shutil.rmtree(folder)
    value, limit = (median(column) for column in zip(*found, strict=True))
    return finish(args, {"per core second": at_least(GOAL, value, limit=limit)})


if __name__ == "__main__":
    main()
