"""What a training stream consists of, sample by sample, on any number of ranks: the same for the same data."""

import hashlib
import multiprocessing
from pathlib import Path
from typing import Any

from vqscale.data.images import ImageReader
from vqscale.data.loader import Loader, build_loader


def reader() -> ImageReader:
    return ImageReader(12, flip=True, crop="random", seed=9)


def build(folder: Path, **options: Any) -> Loader:
    options = {"read": reader(), "global_batch": 12, "seed": 5, "shuffle_window": 2, **options}
    return build_loader(folder, **options)


def rank_stream(loader: Loader, steps: int) -> list[list[tuple[str, int, int, int]]]:
    """Per step, each sample of this rank: (sha256 of its pixels, label, position, bad)."""
    batches, stream = iter(loader), []
    for _ in range(steps):
        step = []
        for _ in range(loader.micro_batches_per_step):
            batch = next(batches)
            assert len(batch["image"]) == loader.micro_batch
            for i, image in enumerate(batch["image"]):
                digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
                step.append((digest, *(int(batch[name][i]) for name in ("label", "position", "bad"))))
        stream.append(step)
    batches.close()
    return stream


def global_stream(folder: Path, world: int, steps: int, **options: Any) -> list[list[tuple[str, int, int, int]]]:
    """The global batches that `world` real processes get together."""
    context = multiprocessing.get_context("fork")

    def run(rank: int, out: Any) -> None:
        out.send(rank_stream(build(folder, rank=rank, world_size=world, **options), steps))

    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [context.Process(target=run, args=(rank, pipes[rank][1])) for rank in range(world)]
    for process, (_, send) in zip(ranks, pipes, strict=True):
        process.start()
        send.close()  # so that a rank that fails is an end of file here, not a wait
    streams = [receive.recv() for receive, _ in pipes]
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    return [[sample for stream in streams for sample in stream[step]] for step in range(steps)]
