"""Image shards -> code shards: one shard in, one out, of the same name and order; a finished one is never redone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from vqscale import runtime
from vqscale.batch import Batch, codes_of, to_host
from vqscale.config import ReadsShards, run_of
from vqscale.data.beside import use_beside
from vqscale.data.cache import Cache
from vqscale.data.codes import CodeReader, pack_codes
from vqscale.data.images import ImageReader, to_float
from vqscale.data.loader import allowed_bad
from vqscale.data.sequential import read_runs
from vqscale.data.shards import MANIFEST, Manifest, ShardIndex, ShardInfo, ShardWriter, resolve, shard_info
from vqscale.data.shardtable import ShardTable, survey
from vqscale.fields import Choice, Fraction, NonNegativeInt, PathText, PositiveInt
from vqscale.files import read_json
from vqscale.models.codebook import perplexity
from vqscale.sources import Source, load_model
from vqscale.topology import Topology


@dataclass(frozen=True)
class ExtractCodesConfig(ReadsShards):
    """Codes of every split of a data set under one tokenizer."""

    outputs: ClassVar[tuple[str, ...]] = ("train", "holdout", "bad.jsonl")
    batch_key: ClassVar[str] = "block"

    data: PathText = run_of("pack")  # images: packed or indexed
    vqvae: PathText = run_of("train_vqvae")  # the VQ-VAE: a run or an exported folder
    checkpoint: NonNegativeInt = 0  # images seen; 0 = the last checkpoint of a finished run
    weights_kind: Annotated[str, Choice("", "ema", "raw")] = ""  # "" = ema if there is one
    flips: bool = True  # also encode the mirrored image, as a second view
    block: PositiveInt = 64  # images encoded at a time; part of what makes the bytes reproducible
    workers: NonNegativeInt = 1  # loader processes per rank
    max_bad_fraction: Fraction = 0.01  # of a split's images that may be unreadable; at least 1 may, unless it is 0


Config = ExtractCodesConfig
_Block = tuple[Callable[[], dict[str, Tensor]], Tensor]  # codes by level, once they are computed; weights
_WAITING = 4  # blocks that are encoded and not yet written


def main(config: ExtractCodesConfig) -> None:
    """Extract into `config.run_dir/{train,holdout}`. Raises ValueError if the model and the images do not fit, or are
    not those of earlier code shards."""
    with runtime.run(config, "extract_codes") as run:
        try:
            source = load_model(
                config.vqvae,
                "vqvae",
                device=run.topology.device,
                weights_kind=config.weights_kind,
                checkpoint=config.checkpoint,
                topology=run.topology,
            )
            images = {split: Manifest.load(resolve(config.data, split)) for split in _splits(config.data)}
        except FileNotFoundError as error:
            if not run.was_done or any(_load_manifest(run.run_dir / split) is None for split in _splits(config.data)):
                raise
            runtime.log.info("nothing left to do; not compared with the inputs, which are missing: %s", error)
            return
        for split, manifest in images.items():
            _check_fits(config, manifest, source)
            _refuse_other_source(run.run_dir / split / "source.json", source, manifest)
        data = " ".join(manifest.fingerprint for manifest in images.values())
        run.check_inputs({"vqvae": source.tokenizer, "data": data})
        extracted = [_extract_split(config, run, source, split, manifest) for split, manifest in images.items()]
        if not any(extracted):
            runtime.log.info("nothing left to do: the codes are in %s", run.run_dir)


def _splits(data: str) -> list[str]:
    """Splits of the data set to mirror; a single data set counts as `train`."""
    return [split for split in ("train", "holdout") if (Path(data) / split / MANIFEST).is_file()] or ["train"]


def _load_manifest(folder: Path) -> Manifest | None:
    """The description of a finished split; None if there is none or it cannot be read."""
    try:
        manifest = Manifest.load(folder)
    except (OSError, ValueError):
        return None
    return manifest if "usage" in manifest.extra else None


def _finished_shards(topology: Topology, out: Path, names: Sequence[str]) -> np.ndarray:
    """The code shards of an earlier run, as `survey` has them: none where one is missing, or not what dataset.json says
    it is. Collective."""
    manifest = _load_manifest(out)
    recorded = manifest.shards if manifest and len(manifest.shards) == len(names) else None

    def look(n: int) -> ShardInfo | None:
        info = shard_info(out / names[n])
        known = recorded[n].index_sha256 if recorded else ""
        return info if info and known in ("", info.index_sha256) else None

    return survey(topology, len(names), look)


def _extract_split(config: ExtractCodesConfig, run: runtime.Run, source: Source, split: str, images: Manifest) -> bool:
    """Make what is missing of a split. Returns whether anything was."""
    folder, out, topology = resolve(config.data, split), run.run_dir / split, run.topology
    names = images.names_of_results()
    rows = _finished_shards(topology, out, names)
    finished = rows["num_samples"] >= 0
    if finished.all() and _load_manifest(out) is not None:
        return False
    if topology.is_main:
        out.mkdir(parents=True, exist_ok=True)
    topology.barrier()
    numbers = np.flatnonzero(~finished)[topology.rank :: topology.world_size].tolist()
    # One loader for all shards: its workers read on into the next one while this one is written.
    blocks = read_runs(
        folder,
        images.runs(numbers),
        read=ImageReader(source.description["resolution"], flip=False, crop="center", max_pixels=config.max_pixels),
        block=config.block,
        workers=config.workers,
        bad_path=run.run_dir / "bad.jsonl",
        cache=Cache.of(config),
        pin_memory=topology.device.type == "cuda",
    )
    sizes = images.column("num_samples")
    bad = int((sizes - rows["num_samples"])[finished].sum())
    total = int(sizes[numbers].sum())
    bar = tqdm(total=total, unit="img", disable=not topology.is_main, desc=split)

    def write(encoded: Iterator[_Block]) -> None:
        nonlocal bad
        for number in numbers:
            with ShardWriter(out / names[number]) as writer:
                for key, parts in _samples(config, images.index(folder, number), encoded):
                    bar.update()
                    if parts is None:
                        bad += 1
                        _check_budget(config, bad, images.num_samples)
                    else:
                        writer.write(key, parts)
            run.images_seen += images.shards[number].num_samples

    with run.stoppable(), bar, closing(iter(blocks)) as batches:
        waiting = _WAITING if topology.device.type == "cuda" else 0
        use_beside(_encoded(config, source, batches, run), write, waiting)
    topology.barrier()
    shards = ShardTable.of_rows(_finished_shards(topology, out, names), names)
    bad = images.num_samples - int(shards.column("num_samples").sum())
    _check_budget(config, bad, images.num_samples)
    if bad:
        where = run.run_dir / "bad.jsonl"
        runtime.log.warning("%s: %d of %d images could not be read; see %s", split, bad, images.num_samples, where)
    _write_manifest(config, run, source, out, images, shards)
    return True


def _check_budget(config: ExtractCodesConfig, bad: int, total: int) -> None:
    if bad > (allowed := allowed_bad(total, config.max_bad_fraction)):
        raise ValueError(
            f"{bad} of {total} images could not be read, more than the {int(allowed)} that "
            f"max_bad_fraction={config.max_bad_fraction} allows; {config.run_dir}/bad.jsonl lists them"
        )


def _check_fits(config: ExtractCodesConfig, manifest: Manifest, source: Source) -> None:
    if manifest.kind != "images":
        raise ValueError(f"data={config.data}: images are needed, this is a data set of {manifest.kind}")
    have, want = manifest.transform.get("resolution"), source.description["resolution"]
    if have != want:
        raise ValueError(f"data={config.data}: images of {have} px, but vqvae={config.vqvae} takes {want} px")


def _refuse_other_source(path: Path, source: Source, manifest: Manifest) -> None:
    """Earlier versions recorded the inputs here and not in the run's inputs.json. Raises ValueError for others."""
    inputs = {"tokenizer": source.tokenizer, "data": manifest.fingerprint}
    for key, recorded in read_json(path).items():
        if inputs.get(key, recorded) != recorded:
            raise ValueError(
                f"{path}: these code shards were made with {key} {recorded}, now it is {inputs[key]}; fresh=true "
                "removes them and starts over, another run_dir keeps them"
            )


def _encoded(
    config: ExtractCodesConfig, source: Source, batches: Iterator[Batch], run: runtime.Run
) -> Iterator[_Block]:
    """The codes of each block of images, and which of them count."""
    for batch in batches:
        run.poll()
        image = batch["image"].to(run.topology.device, non_blocking=True)
        yield _encode(source, to_float(image), config.flips), batch["weight"]


@torch.inference_mode()
def _encode(source: Source, image: Tensor, flips: bool) -> Callable[[], dict[str, Tensor]]:
    """Codes of images [b, 3, R, R] by level name, once they are computed: uint16 [b, V, h, w]; V = 2 with the mirrored
    image's codes second."""
    views = [image, image.flip(-1)] if flips else [image]
    # One batch on a GPU. On a CPU it is no faster, and convolutions may give other last bits at another batch size.
    batches = [torch.cat(views)] if image.is_cuda else views
    levels = map(torch.cat, zip(*map(source.model.encode, batches), strict=True))
    by_name = zip(source.model.level_names, levels, strict=True)
    views_apart = {name: rearrange(level, "(v b) h w -> b v h w", v=len(views)) for name, level in by_name}
    return to_host({name: level.to(torch.uint16) for name, level in views_apart.items()})


def _samples(
    config: ExtractCodesConfig, index: ShardIndex, encoded: Iterator[_Block]
) -> Iterator[tuple[str, dict[str, bytes] | None]]:
    """(key, parts) for each sample of one code shard, in the source's order; None for an image that is unreadable."""
    for first in range(0, len(index), config.block):
        computed, weight = next(encoded)
        codes = {name: level.numpy() for name, level in computed().items()}
        for i in range(min(config.block, len(index) - first)):
            parts = pack_codes({name: level[i] for name, level in codes.items()})
            parts |= {"cls": str(int(index.labels[first + i])).encode()}
            yield index.key(first + i), parts if weight[i] else None


def _write_manifest(
    config: ExtractCodesConfig, run: runtime.Run, source: Source, out: Path, images: Manifest, shards: ShardTable
) -> None:
    """Count the codes of all shards, shared among the ranks, and write dataset.json, the last file of the data set."""
    topology, model = run.topology, source.model
    levels = {name: list(grid) for name, grid in zip(model.level_names, model.grids, strict=True)}
    extra = {
        "tokenizer": source.tokenizer,
        "tokenizer_model": source.description,
        "num_codes": model.num_codes,
        "levels": levels,
        "views": 2 if config.flips else 1,
        "source": images.fingerprint,
        "bad_images": images.num_samples - int(shards.column("num_samples").sum()),
        "resolution": source.description["resolution"],
    }
    manifest = Manifest.of("codes", shards, images.classes, images.transform, extra)
    if topology.is_main:
        manifest.save(out)
    topology.barrier()
    usage = {name: torch.zeros(model.num_codes, dtype=torch.int64) for name in levels}
    numbers = range(topology.rank, len(shards), topology.world_size)
    reader = CodeReader(levels, views=manifest.extra["views"])
    for batch in read_runs(out, manifest.runs(numbers), read=reader, block=1024):
        run.stop_requested()  # counts as progress
        for name, histogram in usage.items():
            histogram += torch.bincount(codes_of(batch, name)[batch["weight"] > 0].flatten(), minlength=model.num_codes)
    for histogram in usage.values():
        topology.all_reduce_(histogram)
    manifest.extra["usage"] = {name: histogram.tolist() for name, histogram in usage.items()}
    manifest.extra["perplexity"] = {name: float(perplexity(histogram)) for name, histogram in usage.items()}
    for name, value in manifest.extra["perplexity"].items():
        if value < 2:
            runtime.log.warning("the %s codes have collapsed: perplexity %.2f of %d", name, value, model.num_codes)
    if topology.is_main:
        manifest.save(out)
    topology.barrier()


def plan(config: ExtractCodesConfig) -> str:
    """Sizes, for --dry-run."""
    lines = []
    for split in _splits(config.data):
        manifest = Manifest.load(resolve(config.data, split))
        lines.append(f"\n{split}: {manifest.num_samples:,} images in {len(manifest.shards)} shards")
    return "".join(lines)
