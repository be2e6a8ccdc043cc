"""A part of `gpu.py`: what feeds a GPU and what leaves it: the loader, extraction and a checkpoint of 14 GB.

In: a `Case`, for the VQ-VAE's step among its earlier rows.  Out: its rows. The pictures are made here (`photos.py`).
"""

import itertools
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from extract import make_tokenizer
from gpu_rows import Case
from gpu_steps import release, seconds_of
from measure import alone, timed
from photos import CLASSES, Photos, make_photos

from vqscale.data.images import ImageReader
from vqscale.data.loader import build_loader
from vqscale.data.shards import Manifest, shard_info
from vqscale.engine.checkpoint import Checkpointer, CheckpointState
from vqscale.sources import load_model
from vqscale.stages import extract_codes
from vqscale.topology import cores

WORKERS = (4, 8, 14)
SHARDS = 1  # that are made; the others are copies


def data(case: Case) -> None:
    folder = Path(tempfile.mkdtemp(prefix="gpu-data-"))
    try:
        side, count, copies = (256, 512, 32) if case.full else (32, 64, 4)
        loaders, extraction = [*case.rows.rows][:4], [name for name in case.rows.rows if name.startswith("extract")]
        with case.rows.attempt(*loaders, *extraction):
            photos = make_photos(folder / "photos", count, side, side, per_shard=count // SHARDS)
            small, large = (repeated(photos, folder / name, times) for name, times in (("1", 1), ("2", copies)))
            rate = measure_loader(case, large, side)
            measure_extraction(case, folder, [small, large], side, rate)
        with case.rows.attempt("save/return over a pinned copy"):
            release()
            measure_save(case, folder / "checkpoints")
    finally:
        shutil.rmtree(folder)


def repeated(photos: Photos, folder: Path, times: int) -> Path:
    """A data set of the same shards, `times` over."""
    folder.mkdir()
    infos = []
    for copy, tar in itertools.product(range(times), sorted(photos.shards.glob("*.tar"))):
        name = f"{copy * SHARDS + int(tar.stem):06d}"
        for file in photos.shards.glob(f"{tar.stem}.*"):
            shutil.copy(file, folder / f"{name}{file.name.removeprefix(tar.stem)}")
        infos.append(shard_info(folder / f"{name}.tar"))
    resolution = Manifest.load(photos.shards).transform["resolution"]
    names = [f"{label:02d}" for label in range(CLASSES)]
    Manifest.of("images", [info for info in infos if info], names, {"resolution": resolution}).save(folder)
    return folder


def measure_loader(case: Case, folder: Path, side: int) -> float:
    """Images per second of the loader that trains, with the most workers; into pinned memory on a GPU."""
    rate = 0.0
    for workers in WORKERS:
        used = min(workers, cores())
        batch = 128 if case.full else 8
        loader = build_loader(
            folder, read=ImageReader(side, True), global_batch=batch, workers=used, pin_memory=case.on_gpu
        )
        batches = iter(loader)
        for _ in range(6 * used):  # the start, and what was read ahead meanwhile
            next(batches)
        start, drawn, enough = time.perf_counter(), 0, 3.0 if case.full else 0.2
        while time.perf_counter() - start < enough:
            next(batches)
            drawn += batch
        rate = drawn / (time.perf_counter() - start)
        batches.close()
        case.rows.put(f"loader/{workers} workers images per second", rate, workers=used)
    with case.rows.attempt("loader/over the VQ-VAE's step"):
        step = case.earlier.get("vqvae/images per second", {}).get("value")
        if not step:
            raise ValueError("the VQ-VAE's step was not measured")
        case.rows.put("loader/over the VQ-VAE's step", rate / step)
    return rate


def measure_extraction(case: Case, folder: Path, data_sets: list[Path], side: int, loaded: float) -> None:
    """The stage on two data sets: what the larger one takes more is its speed without its start and end."""
    block = 256 if case.full else 8
    make_tokenizer(folder / "vqvae", side, 128 if case.full else 16)
    model = load_model(folder / "vqvae", "vqvae", device=torch.device(case.device)).model
    image = torch.rand(block, 3, side, side, device=case.device) * 2 - 1
    with torch.inference_mode():
        seconds = seconds_of(case, lambda: model.encode(torch.cat((image, image.flip(-1)))))  # as the stage on a GPU
    encoded = block / seconds
    case.rows.put("extract/encoder images per second", encoded, block=block)
    counts, taken = [], []
    for number, data_set in enumerate(data_sets):
        config = extract_codes.Config(
            run_dir=str(folder / f"codes-{number}"),
            data=str(data_set),
            vqvae=str(folder / "vqvae"),
            device=case.device,
            block=block,
            workers=min(max(WORKERS), cores()),
        )
        counts.append(Manifest.load(data_set).num_samples)
        taken.append(timed(lambda: extract_codes.main(config)))  # noqa: B023
    rate = (counts[1] - counts[0]) / (taken[1] - taken[0])
    details = {"images_per_second": rate, "images": counts, "seconds": taken}
    case.rows.put("extract/over its slower half", rate / min(encoded, loaded), **details)


def measure_save(case: Case, folder: Path) -> None:
    """Until `save` returns, the first time and again, over a copy of the same bytes into pinned memory."""
    count, size = (14, 1 << 28) if case.full else (2, 1 << 18)  # of fp32
    tensors = {f"tensor {number}": torch.randn(size, device=case.device) for number in range(count)}
    pinned = torch.zeros(size, pin_memory=case.on_gpu)

    def copy() -> None:
        for tensor in tensors.values():
            pinned.copy_(tensor, non_blocking=True)

    alone_seconds = seconds_of(case, copy)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    checkpoints = Checkpointer(folder, alone(case.device), keep=1)
    for number in (1, 2):
        seconds = timed(lambda: checkpoints.save(dict(tensors), CheckpointState(number, data={})))  # noqa: B023
        details = {"seconds": seconds, "save": number, "bytes": 4 * size * count}
        case.rows.put("save/return over a pinned copy", seconds / alone_seconds, **details)
        checkpoints.wait()
    dist.destroy_process_group()
