"""A folder of images (or the embedded drawings) -> image shards, in `<run_dir>/{train,holdout}/`.

In: files whose first sub-folder is their class, or a labels file.  Out: tars, indexes, `dataset.json`; `bad.jsonl`
lists the images that did not decode. One shard is one job: a finished shard is never redone, and the bytes are the
same at any number of processes.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from tqdm import tqdm

from vqscale import rundir, runtime
from vqscale.config import StageConfig
from vqscale.data.arrays import array_files
from vqscale.data.drawn import CLASSES
from vqscale.data.headers import MAX_PIXELS
from vqscale.data.images import ADM, BILINEAR, CENTER, CENTER_OR_PADDED, DRAWN, preparation
from vqscale.data.listing import Item, Listing, is_flat, list_arrays, list_folder, parse_holdout, show_counts, shuffled
from vqscale.data.loader import allowed_bad
from vqscale.data.packing import Encoding, ShardJob, finished, pack_shard, write_bad
from vqscale.data.processes import run_jobs
from vqscale.data.shards import Manifest, missing_file, resolve
from vqscale.data.shardtable import ShardTable, survey
from vqscale.fields import Choice, Fraction, NonNegativeInt, PathText, PositiveInt, Range
from vqscale.files import prepare_folder, read_json, read_jsonl, write_json
from vqscale.text import printable
from vqscale.topology import Topology
from vqscale.versions import versions

log = logging.getLogger("vqscale")
_PNG_UP_TO = 128  # pixels: below, PNG is small enough and exact
_PREPARED_BY = ("vqscale", "torch", "torchvision", "pillow")
# Fewer images are packed faster than processes start.
_MIN_FOR_PROCESSES, _MIN_FOR_PROCESSES_DRAWN = 2_000, 25_000


@dataclass(frozen=True)
class PackConfig(StageConfig):
    """What to pack and how."""

    outputs: ClassVar[tuple[str, ...]] = ("train", "holdout", "bad", "bad.jsonl", "source.json")

    source: PathText = "drawn"  # a folder of images (classes in sub-folders), of IDX files or CIFAR-10 batches | drawn
    labels: PathText = ""  # a file of lines `filename class`, for a flat folder (of source, or of holdout)
    class_names: list[str] = field(default_factory=list)  # of IDX files; or instead of the class folders' own, in order
    classes_from: PathText = ""  # a data set whose class names and numbers to use
    resolution: PositiveInt = 64  # pixels: shorter side resized, centre cropped
    format: Annotated[str, Choice("", "png", "jpg")] = ""  # default png up to 128 pixels, else jpg
    quality: Annotated[int, Range(ge=1, le=100)] = 95  # of jpg
    resize: Annotated[str, Choice("bilinear", "adm")] = "bilinear"  # adm: as the ADM evaluation suite, for papers' FID
    holdout_format: Annotated[str, Choice("", "png", "jpg")] = ""  # of held-out images; "" = as the training images
    holdout: PathText = "0.05"  # a fraction by key | every:20 | a folder | test (of IDX files, of CIFAR-10)
    samples_per_shard: PositiveInt = 1000  # at most
    num_drawn: PositiveInt = 20000  # images, for source=drawn
    max_pixels: PositiveInt = MAX_PIXELS  # of one image; a larger one counts as bad. Decoding takes ~20 bytes a pixel
    max_bad_fraction: Fraction = 0.01  # of images that may fail to decode; at least 1 may, unless it is 0
    workers: NonNegativeInt = 0  # processes; 0 = one per core


Config = PackConfig


def main(config: PackConfig) -> None:
    """Pack. Raises ValueError or FileNotFoundError for a wrong source or config before anything is written."""
    _check(config)
    is_done = not config.fresh and rundir.read_status(Path(config.run_dir)).get("state") == "done"
    if is_done and config.source != "drawn" and not os.path.isdir(config.source):  # removed since
        with runtime.run(config, stage="pack") as run:
            _check_outputs(config, run.topology)
            log.info("%s: already packed", run.run_dir)
        return
    listings = _listings(config)
    with runtime.run(config, stage="pack") as run:
        _check_source_unchanged(run, listings)
        _pack(config, listings, run)


def plan(config: PackConfig) -> str:
    """What `--dry-run` says."""
    _check(config)
    listings = _listings(config)
    train, holdout = listings.values()
    summary = f"{len(train.items)} training and {len(holdout.items)} held-out images of {len(train.classes)} classes"
    prepared = [
        f"{split}: {preparation(_transform(config, split))}" for split, listing in listings.items() if listing.items
    ]
    warnings = [f"{split}: {line}" for split, listing in listings.items() for line in listing.warnings]
    return "\n".join([summary, *prepared, *warnings])


def _check(config: PackConfig) -> None:
    own = config.labels or config.class_names or config.classes_from or os.path.isdir(config.holdout)
    if config.source == "drawn" and own:
        raise ValueError(
            "source=drawn has classes of its own: no labels=, class_names=, classes_from= or holdout folder applies"
        )
    if config.class_names and config.classes_from:
        raise ValueError("class_names= and classes_from= both name the classes; give one of them")
    if not os.path.isdir(config.holdout) and config.holdout != "test":
        parse_holdout(config.holdout)


def _check_outputs(config: PackConfig, topology: Topology) -> None:
    """Raises ValueError where files of a finished run are gone and the source, too."""
    train, holdout = Path(config.run_dir, "train"), Path(config.run_dir, "holdout")
    gone = missing_file(train, topology) or (missing_file(holdout, topology) if holdout.exists() else None)
    if gone:
        raise ValueError(f"{gone} is gone, or not whole; without source={config.source} it cannot be packed again")


def _encoding(config: PackConfig, split: str) -> Encoding:
    default = config.format or ("png" if config.resolution <= _PNG_UP_TO else "jpg")
    stored_as = default if split == "train" else config.holdout_format or default
    return Encoding(config.resolution, stored_as, config.quality, config.resize)


def _transform(config: PackConfig, split: str) -> dict[str, Any]:
    """What dataset.json says of how the images were made."""
    encoding = _encoding(config, split)
    transform: dict[str, Any] = {"resolution": encoding.resolution, "format": encoding.format}
    if config.source == "drawn":
        transform["resize"] = DRAWN
    else:
        transform["resize"] = ADM if config.resize == "adm" else BILINEAR
        transform["crop"] = CENTER_OR_PADDED if array_files(config.source, "train") else CENTER
    if encoding.format == "jpg":
        transform["quality"] = encoding.quality
    return transform


def _listings(config: PackConfig) -> dict[str, Listing]:
    """What each split will hold, decided before the first byte is written."""
    if config.source == "drawn":
        return _list_drawn(config.num_drawn).split(config.holdout)
    if array_files(config.source, "train"):
        if config.labels or config.classes_from:
            raise ValueError(f"source={config.source} has labels of its own: labels= and classes_from= do not apply")
        train = list_arrays(config.source, "train", config.class_names)
        if config.holdout == "test":
            return {"train": train, "holdout": list_arrays(config.source, "test", train.classes)}
        return train.split(config.holdout)
    known = Manifest.load(resolve(config.classes_from)).classes if config.classes_from else ()
    if not os.path.isdir(config.holdout):
        return list_folder(config.source, config.labels, known).renamed(config.class_names).split(config.holdout)
    _check_apart(config.source, config.holdout)
    source_labels, holdout_labels = _assign_labels(config)
    train = list_folder(config.source, source_labels, known)
    holdout = list_folder(config.holdout, holdout_labels, train.classes)
    _check_disjoint(train, holdout)
    return {"train": train.renamed(config.class_names), "holdout": holdout.renamed(config.class_names)}


def _list_drawn(count: int) -> Listing:
    digits = len(str(count - 1))
    items = [Item(f"{CLASSES[n % len(CLASSES)]}/{n:0{digits}d}", n % len(CLASSES), index=n) for n in range(count)]
    return Listing("", tuple(items), CLASSES)


def _check_apart(source: str, holdout: str) -> None:
    """Raises ValueError when one of the folders lies in the other, links resolved."""
    paths = [os.path.realpath(folder) for folder in (source, holdout)]
    if os.path.commonpath(paths) in paths:
        raise ValueError(
            f"holdout={holdout} and source={source} lie one in the other: held-out images would be trained on; "
            "give two folders that share nothing"
        )


def _check_disjoint(train: Listing, holdout: Listing) -> None:
    """Raises ValueError when both have links to the same file."""
    paths = {item.identity: item.path for item in train.items if item.identity}
    shared = [item for item in holdout.items if item.identity in paths]
    if shared:
        first = shared[0]
        raise ValueError(
            f"holdout={holdout.folder} and source={train.folder} share {len(shared)} files: "
            f"{printable(first.path)} is {printable(paths[first.identity])}"
        )


def _assign_labels(config: PackConfig) -> tuple[str, str]:
    """The labels file belongs to the flat one of the two folders."""
    if not config.labels:
        return "", ""
    flat = [folder for folder in (config.source, config.holdout) if is_flat(folder)]
    if len(flat) != 1:
        raise ValueError(f"labels={config.labels} must serve one flat folder; flat here: {', '.join(flat) or 'none'}")
    return (config.labels, "") if flat == [config.source] else ("", config.labels)


def _check_source_unchanged(run: runtime.Run, listings: dict[str, Listing]) -> None:
    """Raises ValueError, naming the difference, when the source has changed since the run started."""
    path = run.run_dir / "source.json"
    earlier = read_json(path)
    fingerprints = {name: {"images": len(x.items), "files": x.fingerprint} for name, x in listings.items()}
    for name, now in fingerprints.items():
        if (was := earlier.get(name, now)) != now:
            counts = f"{was['images']} {name} images then, {now['images']} now"
            same = " (same number, but other names, sizes or classes)" if was["images"] == now["images"] else ""
            raise ValueError(
                f"the source has changed since {run.run_dir} was started: {counts}{same}; use another run_dir, or "
                "fresh=true, which removes the packed images"
            )
    if run.topology.is_main and not earlier:
        write_json(path, fingerprints)


def _pack(config: PackConfig, listings: dict[str, Listing], run: runtime.Run) -> None:
    jobs = {split: _jobs(config, listing, run.run_dir, split) for split, listing in listings.items()}
    if run.topology.is_main:
        _log_listings(listings)
        for name in ("train", "holdout", "bad"):
            prepare_folder(run.run_dir / name)
    run.topology.barrier()
    all_jobs = [job for split in jobs.values() for job in split]
    own_jobs = all_jobs[run.topology.rank :: run.topology.world_size]
    with run.stoppable():
        _work(config, own_jobs, sum(len(job.items) for job in all_jobs), run)
    rows = survey(run.topology, len(all_jobs), lambda n: finished(all_jobs[n]))
    if run.topology.is_main:
        _finish(config, listings, jobs, rows, run.run_dir)


def _jobs(config: PackConfig, listing: Listing, run_dir: Path, split: str) -> list[ShardJob]:
    items = shuffled(listing.items, config.seed)
    count = -(-len(items) // config.samples_per_shard)
    cuts = np.linspace(0, len(items), count + 1).astype(int)
    return [
        ShardJob(
            run_dir / split / f"{n:06d}.tar",
            run_dir / "bad" / f"{split}-{n:06d}.jsonl",
            listing.folder,
            tuple(items[cuts[n] : cuts[n + 1]]),
            _encoding(config, split),
            config.seed,
            config.max_pixels,
        )
        for n in range(count)
    ]


def _log_listings(listings: dict[str, Listing]) -> None:
    for name, listing in listings.items():
        ignored = listing.ignored.total()
        notes = [f"; {ignored} other files ignored ({show_counts(listing.ignored)})"] * bool(ignored)
        notes += [f"; {listing.unclassified} images beside the class folders left out"] * bool(listing.unclassified)
        log.info("%s: %d images of %d classes%s", name, len(listing.items), len(listing.classes), "".join(notes))
        for warning in listing.warnings:
            log.warning("%s: %s", name, warning)


def _work(config: PackConfig, jobs: Sequence[ShardJob], total: int, run: runtime.Run) -> None:
    """Do the jobs that no earlier run has finished; raises ValueError when too many images are bad."""
    done = {job.tar for job in jobs if finished(job)}
    bad = [line for job in jobs if job.tar in done for line in read_jsonl(job.bad_path)]
    _check_budget(bad, total, config.max_bad_fraction)
    remaining = [job for job in jobs if job.tar not in done]
    if run.was_done and remaining:
        log.warning("%s was packed, but %s is gone, or not whole: packing again", run.run_dir, remaining[0].tar)
    elif run.was_done:
        log.info("%s: already packed", run.run_dir)
    num_images, num_remaining = (sum(len(job.items) for job in part) for part in (jobs, remaining))
    enough = _MIN_FOR_PROCESSES_DRAWN if config.source == "drawn" else _MIN_FOR_PROCESSES
    workers = config.workers or (0 if num_remaining >= enough else 1)
    options: dict[str, Any] = {"unit": "image", "desc": "pack", "disable": not run.topology.is_main}
    with tqdm(total=num_images, initial=num_images - num_remaining, **options) as bar:
        for job, _ in run_jobs(pack_shard, remaining, workers, run.stop_requested):
            bad += read_jsonl(job.bad_path)
            _check_budget(bad, total, config.max_bad_fraction)
            bar.update(len(job.items))
    run.poll()


def _check_budget(bad: Sequence[dict[str, str]], total: int, fraction: float) -> None:
    allowed = int(allowed_bad(total, fraction))
    if len(bad) > allowed:
        first = bad[0]
        raise ValueError(
            f"{len(bad)} of {total} images do not decode, more than the {allowed} that max_bad_fraction={fraction} "
            f"allows; the first is {printable(first['file'])}: {first['error']}"
        )


def _finish(
    config: PackConfig, listings: dict[str, Listing], jobs: dict[str, list[ShardJob]], rows: np.ndarray, run_dir: Path
) -> None:
    bad = []
    for split, listing in listings.items():
        counts, of_split = rows["num_samples"][: len(jobs[split])], rows[: len(jobs[split])]
        rows = rows[len(jobs[split]) :]
        assert (counts >= 0).all(), "a rank did not finish a shard"
        incomplete = [job for job, count in zip(jobs[split], counts, strict=True) if count < len(job.items)]
        skipped = [line for job in incomplete for line in read_jsonl(job.bad_path)]
        bad += skipped
        shards = ShardTable.of_rows(of_split, [job.tar.name for job in jobs[split]])
        _save_manifest(run_dir / split, _transform(config, split), listing, shards, len(skipped))
    if bad:
        path, example = run_dir / "bad.jsonl", printable(bad[0]["file"])
        write_bad(path, bad)
        log.warning("%d images do not decode and were left out, e.g. %s; see %s", len(bad), example, path)


def _save_manifest(folder: Path, transform: dict[str, Any], listing: Listing, shards: ShardTable, bad: int) -> None:
    extra = {"split": folder.name, "source": printable(Path(listing.folder).name) or "drawn", "bad_images": bad}
    manifest = Manifest.of("images", shards, listing.classes, transform, extra)
    manifest.transform.update(_as_recorded(folder, manifest) or {"versions": _versions()})
    if manifest.num_samples:
        manifest.save(folder)
        log.info("%s: %d images in %d shards", folder, manifest.num_samples, len(shards))
    elif folder.name == "train":
        raise ValueError("no image is left to train on: all are held out or do not decode")
    elif not any(folder.iterdir()):
        folder.rmdir()


def _as_recorded(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The `transform` of the same images in an earlier dataset.json: other versions may have made them."""
    try:
        recorded = Manifest.load(folder)
    except (OSError, ValueError):
        return {}
    return recorded.transform if recorded.fingerprint == manifest.fingerprint else {}


def _versions() -> dict[str, str]:
    """Of the software that decodes, resizes and encodes."""
    return {name: version for name, version in versions().items() if name in _PREPARED_BY}
