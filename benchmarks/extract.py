"""Extraction against the encoder alone: images per second of the whole stage over those of its forward passes.

    python benchmarks/extract.py [--json FILE] [--quick] [--minutes M] [--device cuda] [--worlds 1 2] [--port P]

In: nothing; the pictures are made here (`photos.py`), the VQ-VAE is the 256 px one of two levels with random weights.
Rows: `<ranks> ranks`. The stage is all that `vqscale extract_codes` does after its imports: reading, decoding, both
views encoded, code shards written, hashed and described, the process group brought up and taken down. The encoder alone
is the same passes over an image in memory, on as many ranks at once. The two take turns on the same ranks.
"""

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from measure import Row, arguments, at_least, finish, median, ratio, timed
from photos import Photos, make_photos

from vqscale.config import StageConfig, as_dict
from vqscale.models.init import initialise
from vqscale.models.pretrained import save_pretrained
from vqscale.models.vqvae import VQVAE, VQVAEConfig
from vqscale.sources import load_model
from vqscale.stages import extract_codes
from vqscale.topology import bring_up, take_down

BLOCK = 32
MOST = 10  # rounds


def make_tokenizer(folder: Path, side: int, hidden: int) -> None:
    """An exported VQ-VAE with random weights and a random codebook."""
    config = VQVAEConfig(hidden=hidden)
    model = VQVAE(config, resolution=side)
    initialise(model, seed=0)
    save_pretrained(folder, model, kind="vqvae", config=as_dict(config), extra={"resolution": side, "classes": []})


def encode_alone(folder: Path, side: int, count: int, device: str, go_on: bool) -> float | None:
    """Seconds of all ranks together for both views of `count` images; None if rank 0 does not want to go on."""
    topology = bring_up(StageConfig(run_dir="", device=device))
    if not topology.gather(go_on)[0]:
        take_down(orderly=True)
        return None
    model = load_model(folder / "vqvae", "vqvae", device=topology.device).model
    image = torch.rand(BLOCK, 3, side, side, device=topology.device) * 2 - 1

    def passes() -> None:
        with torch.inference_mode():
            for view in (image, image.flip(-1)) * (count // (BLOCK * topology.world_size)):
                model.encode(view)
        topology.barrier()

    topology.barrier()
    seconds = timed(passes)
    take_down(orderly=True)
    return seconds


def extract(folder: Path, name: str, device: str) -> float:
    """Seconds of the stage over the data set, into a new run directory."""
    config = extract_codes.Config(
        run_dir=str(folder / name),
        data=str(folder / "photos" / "shards"),
        vqvae=str(folder / "vqvae"),
        device=device,
        block=BLOCK,
    )
    return timed(lambda: extract_codes.main(config))


def _rank(rank: int, world: int, folder: Path, side: int, count: int, args: Any, answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    ports, end = itertools.count(args.port + 100 * world), time.time() + 60 * args.minutes / len(args.worlds)
    alone: list[float] = []
    whole: list[float] = []
    while len(whole) < MOST:
        os.environ["MASTER_PORT"] = str(next(ports))
        seconds = encode_alone(folder, side, count, args.device, not whole or time.time() < end)
        if seconds is None:
            break
        alone.append(seconds)
        os.environ["MASTER_PORT"] = str(next(ports))
        whole.append(extract(folder, f"codes-{world}-{len(whole)}", args.device))
    if rank == 0:
        answers.put((alone, whole))


def run_world(world: int, folder: Path, photos: Photos, side: int, args: Any) -> Row:
    """The row of one number of ranks."""
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    work = (world, folder, side, photos.count, args, answers)
    multiprocessing.start_processes(_rank, work, nprocs=world, start_method="spawn")
    alone, whole = answers.get()
    rate = photos.count / median(whole)
    print(f"{world} ranks: {rate:.1f} images/s, the encoder alone {photos.count / median(alone):.1f}", flush=True)
    return at_least(0.9, ratio(alone, whole), limit=1.0, images_per_second=rate)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, minutes=6)
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2], help="one GPU takes one rank")
    parser.add_argument("--port", type=int, default=29_600)
    args = parser.parse_args(argv)
    side, hidden, count = (32, 16, 256) if args.quick else (256, 128, 256)
    folder = Path(tempfile.mkdtemp(prefix="extract-"))
    try:
        photos = make_photos(folder / "photos", count, side, side, per_shard=count // 4)
        make_tokenizer(folder / "vqvae", side, hidden)
        tree = {f"{world} ranks": run_world(world, folder, photos, side, args) for world in args.worlds}
    finally:
        shutil.rmtree(folder)
    return finish(args, tree)


if __name__ == "__main__":
    main()
