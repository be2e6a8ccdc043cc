"""Image shards -> code shards: one shard in, one out, of the same name and order; a finished one is never redone."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vqscale import runtime
from vqscale.batch import Batch, codes_of
from vqscale.config import ReadsShards, run_of
from vqscale.data.cache import Cache
from vqscale.data.codes import CodeReader, pack_codes
from vqscale.data.images import ImageReader, to_float
from vqscale.data.sequential import read_shard_blocks
from vqscale.data.shards import Manifest, ShardIndex, ShardInfo, ShardWriter, resolve, shard_info
from vqscale.fields import Choice, NonNegativeInt, PathText, PositiveInt
from vqscale.files import read_json, write_json
from vqscale.models.codebook import perplexity
from vqscale.sources import Source, load_vqvae


@dataclass(frozen=True)
class ExtractCodesConfig(ReadsShards):
    """Codes of every split of a data set under one tokenizer."""

    outputs: ClassVar[tuple[str, ...]] = ("train", "holdout", "bad.jsonl")

    data: PathText = run_of("pack")  # images: packed or indexed
    vqvae: PathText = run_of("train_vqvae")  # the VQ-VAE: a run or an exported folder
    checkpoint: NonNegativeInt = 0  # images seen; 0 = the last checkpoint of a finished run
    weights_kind: Annotated[str, Choice("", "ema", "raw")] = ""  # "" = ema if there is one
    flips: bool = True  # also encode the mirrored image, as a second view
    block: PositiveInt = 64  # images encoded at a time; part of what makes the bytes reproducible
    workers: NonNegativeInt = 1  # loader processes per rank


Config = ExtractCodesConfig


def main(config: ExtractCodesConfig) -> None:
    """Extract into `config.run_dir/{train,holdout}`. Raises ValueError if the model and the images do not fit."""
    with runtime.run(config, "extract_codes") as run:
        if run.was_done:
            runtime.log.info("nothing left to do: the codes are in %s", run.run_dir)
            return
        source = load_vqvae(
            config.vqvae, device=run.topology.device, weights_kind=config.weights_kind, checkpoint=config.checkpoint
        )
        for split in _splits(config.data):
            _extract_split(config, run, source, split)


def _splits(data: str) -> list[str]:
    """Parts of the data set to mirror; a single data set counts as `train`."""
    found = [split for split in ("train", "holdout") if (Path(data) / split / "dataset.json").is_file()]
    return found or ["train"]


def _extract_split(config: ExtractCodesConfig, run: runtime.Run, source: Source, split: str) -> None:
    folder, out, topology = resolve(config.data, split), run.run_dir / split, run.topology
    manifest = Manifest.load(folder)
    _check_fits(config, manifest, source)
    if topology.is_main:
        out.mkdir(parents=True, exist_ok=True)
        _remember_tokenizer(out, source, manifest)
    topology.barrier()
    targets = [out / name for name in manifest.names_of_results()]
    left = [n for n, target in enumerate(targets) if shard_info(target) is None]
    topology.barrier()  # all ranks listed the same shards before any of them writes one
    mine = left[topology.rank :: topology.world_size]
    total = sum(manifest.shards[n].num_samples for n in mine)
    # One loader for all shards: its workers read on into the next one while this one is written.
    blocks = read_shard_blocks(
        folder,
        mine,
        read=ImageReader(source.description["resolution"], flip=False, crop="center"),
        block=config.block,
        workers=config.workers,
        bad_path=run.run_dir / "bad.jsonl",
        cache=Cache.of(config),
    )
    bar = tqdm(total=total, unit="img", disable=not topology.is_main, desc=split)
    with run.stoppable(), bar, closing(iter(blocks)) as batches:
        for number in mine:
            with ShardWriter(targets[number]) as writer:
                for key, parts in _encoded(config, source, manifest.index(folder, number), batches, run):
                    writer.write(key, parts)
                    bar.update()
            run.images_seen += manifest.shards[number].num_samples
    shards = [shard_info(target) for target in targets]
    _write_manifest(config, run, source, out, manifest, [info for info in shards if info is not None])


def _check_fits(config: ExtractCodesConfig, manifest: Manifest, source: Source) -> None:
    if manifest.kind != "images":
        raise ValueError(f"data={config.data}: images are needed, this is a data set of {manifest.kind}")
    have, want = manifest.transform.get("resolution"), source.description["resolution"]
    if have != want:
        raise ValueError(f"data={config.data}: images of {have} px, but vqvae={config.vqvae} takes {want} px")


def _remember_tokenizer(out: Path, source: Source, manifest: Manifest) -> None:
    """A half-finished folder belongs to one tokenizer and one data set. Raises ValueError for another's."""
    path, facts = out / "source.json", {"tokenizer": source.fingerprint, "data": manifest.fingerprint}
    saved = read_json(path)
    for key, value in facts.items():
        if saved.get(key, value) != value:
            raise ValueError(f"{path}: these code shards were begun with {key} {saved[key]}, now it is {value}")
    write_json(path, facts)


def _encoded(
    config: ExtractCodesConfig, source: Source, index: ShardIndex, batches: Iterator[Batch], run: runtime.Run
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, parts) of one code shard, in the source's order; unreadable images are left out, counted and named."""
    for first in range(0, len(index), config.block):
        batch = next(batches)
        run.poll()
        views = _encode(source, to_float(batch["image"].to(run.topology.device)), config.flips)
        for i in range(min(config.block, len(index) - first)):
            if batch["weight"][i]:
                codes = {name: level[i] for name, level in views.items()}
                yield index.key(first + i), pack_codes(codes) | {"cls": str(int(index.labels[first + i])).encode()}


@torch.inference_mode()
def _encode(source: Source, image: Tensor, flips: bool) -> dict[str, np.ndarray]:
    """Codes of images [b, 3, R, R] by level name: uint16 [b, V, h, w]; V = 2 with the mirrored image's codes second."""
    views = [source.model.encode(view) for view in ([image, image.flip(-1)] if flips else [image])]
    stacked = [torch.stack(level, 1).cpu().numpy().astype(np.uint16) for level in zip(*views, strict=True)]
    return dict(zip(source.model.level_names, stacked, strict=True))


def _write_manifest(
    config: ExtractCodesConfig,
    run: runtime.Run,
    source: Source,
    out: Path,
    images: Manifest,
    shards: Sequence[ShardInfo],
) -> None:
    """Count the codes of all shards, shared among the ranks, and describe the data set: its last file."""
    topology, model = run.topology, source.model
    levels = {name: list(grid) for name, grid in zip(model.level_names, model.grids, strict=True)}
    extra: dict[str, Any] = {
        "tokenizer": source.fingerprint,
        "tokenizer_model": source.description,
        "num_codes": model.num_codes,
        "levels": levels,
        "views": 2 if config.flips else 1,
        "source": images.fingerprint,
        "resolution": source.description["resolution"],
    }
    manifest = Manifest.of("codes", shards, images.classes, images.transform, extra)
    if topology.is_main:
        manifest.save(out)
    topology.barrier()
    usage = {name: torch.zeros(model.num_codes, dtype=torch.int64) for name in levels}
    mine = range(topology.rank, len(shards), topology.world_size)
    for batch in read_shard_blocks(out, mine, read=CodeReader(levels, views=extra["views"]), block=1024):
        for name, histogram in usage.items():
            histogram += torch.bincount(codes_of(batch, name)[batch["weight"] > 0].flatten(), minlength=model.num_codes)
    for histogram in usage.values():
        topology.all_reduce_(histogram)
    extra["usage"] = {name: histogram.tolist() for name, histogram in usage.items()}
    extra["perplexity"] = {name: float(perplexity(histogram)) for name, histogram in usage.items()}
    for name, value in extra["perplexity"].items():
        if value < 2:
            runtime.log.warning("the %s codes have collapsed: perplexity %.2f of %d", name, value, model.num_codes)
    if topology.is_main:
        Manifest.of("codes", shards, images.classes, images.transform, extra).save(out)
    topology.barrier()


def plan(config: ExtractCodesConfig) -> str:
    """Sizes, for --dry-run."""
    lines = []
    for split in _splits(config.data):
        manifest = Manifest.load(resolve(config.data, split))
        lines.append(f"\n{split}: {manifest.num_samples:,} images in {len(manifest.shards)} shards")
    return "".join(lines)
