"""A folder of images (or the embedded drawings) -> image shards, in `<run_dir>/{train,holdout}/`.

In: files whose first sub-folder is their class, or a labels file.  Out: tars, indexes, `dataset.json`; `bad.jsonl`
lists the images that did not decode. One shard is one job: a finished shard is never redone, and the bytes are the
same at any number of processes.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from tqdm import tqdm

from vqscale import runtime
from vqscale.config import StageConfig
from vqscale.data.arrays import array_files
from vqscale.data.drawn import CLASSES
from vqscale.data.headers import MAX_PIXELS
from vqscale.data.listing import (
    Item,
    Listing,
    holdout_every,
    holdout_fraction,
    is_flat,
    list_arrays,
    list_folder,
    show_counts,
    shuffled,
    split_items,
)
from vqscale.data.packing import Encoding, ShardJob, finished, pack_shard, read_bad, write_bad
from vqscale.data.processes import run_jobs
from vqscale.data.shards import MANIFEST, Manifest, ShardInfo, resolve
from vqscale.fields import Choice, Fraction, NonNegativeInt, PathText, PositiveInt, Range
from vqscale.files import read_json, write_json
from vqscale.text import printable

log = logging.getLogger("vqscale")
_PNG_UP_TO = 128  # pixels: below, PNG is small enough and exact
# Fewer images are packed faster than processes start.
_MIN_FOR_PROCESSES, _MIN_FOR_PROCESSES_DRAWN = 2_000, 25_000


@dataclass(frozen=True)
class PackConfig(StageConfig):
    """What to pack and how."""

    outputs: ClassVar[tuple[str, ...]] = ("train", "holdout", "bad", "bad.jsonl", "source.json")

    source: PathText = "drawn"  # a folder of images (classes in sub-folders), of IDX files or CIFAR-10 batches | drawn
    labels: PathText = ""  # a file of lines `filename class`, for a flat folder (of source, or of holdout)
    class_names: list[str] = field(default_factory=list)  # of IDX files, which have numbers alone
    classes_from: PathText = ""  # a data set whose class names and numbers to use
    resolution: PositiveInt = 64  # pixels: shorter side resized, centre cropped
    format: Annotated[str, Choice("", "png", "jpg")] = ""  # default png up to 128 pixels, else jpg
    quality: Annotated[int, Range(ge=1, le=100)] = 95  # of jpg
    holdout: PathText = "0.05"  # a fraction by key | every:20 | a folder | test (of IDX files, of CIFAR-10)
    samples_per_shard: PositiveInt = 1000  # at most
    num_drawn: PositiveInt = 20000  # images, for source=drawn
    max_pixels: PositiveInt = MAX_PIXELS  # of one image; a larger one counts as bad. Decoding takes ~20 bytes a pixel
    max_bad_fraction: Fraction = 0.01  # of images that may fail to decode; at least 1 may, unless it is 0
    workers: NonNegativeInt = 0  # processes; 0 = one per core


Config = PackConfig


@dataclass(frozen=True)
class _Contents:
    """What the data sets will hold, decided before the first byte is written."""

    train: Listing
    holdout: Listing
    encoding: Encoding

    @property
    def listings(self) -> dict[str, Listing]:
        """By split."""
        return {"train": self.train, "holdout": self.holdout}

    @property
    def fingerprints(self) -> dict[str, Any]:
        """What a resumed run compares with source.json."""
        return {name: {"images": len(x.items), "files": x.fingerprint} for name, x in self.listings.items()}


def main(config: PackConfig) -> None:
    """Pack. Raises ValueError or FileNotFoundError for a wrong source or config before anything is written."""
    _check(config)
    contents = None
    if _is_done(config) and not _source_exists(config):  # packed, and the source removed since: nothing to compare
        _check_outputs(config)
    else:
        contents = _contents(config)
    with runtime.run(config, stage="pack") as run:
        if contents is None:
            log.info("%s: already packed", run.run_dir)
            return
        _check_source_unchanged(run, contents)
        _pack(config, contents, run)


def plan(config: PackConfig) -> str:
    """What `--dry-run` says."""
    _check(config)
    contents = _contents(config)
    images, held_out, classes = len(contents.train.items), len(contents.holdout.items), len(contents.train.classes)
    size = contents.encoding.resolution
    summary = (
        f"{images} training and {held_out} held-out images of {classes} classes, "
        f"stored as {size}×{size} {contents.encoding.format}"
    )
    warnings = [f"{split}: {line}" for split, listing in contents.listings.items() for line in listing.warnings]
    return "\n".join([summary, *warnings])


def _check(config: PackConfig) -> None:
    if config.source == "drawn" and (config.labels or config.classes_from or os.path.isdir(config.holdout)):
        raise ValueError(
            "source=drawn has classes of its own: labels=, classes_from= and a holdout folder do not apply"
        )
    if not os.path.isdir(config.holdout) and config.holdout != "test" and not holdout_every(config.holdout):
        holdout_fraction(config.holdout)


def _is_done(config: PackConfig) -> bool:
    return not config.fresh and runtime.read_status(Path(config.run_dir)).get("state") == "done"


def _source_exists(config: PackConfig) -> bool:
    return config.source == "drawn" or os.path.isdir(config.source)


def _check_outputs(config: PackConfig) -> None:
    """Raises ValueError where files of a finished run are gone and the source, too."""
    run_dir = Path(config.run_dir)
    folders = [run_dir / "train", *([run_dir / "holdout"] if (run_dir / "holdout").exists() else [])]
    gone = [path for folder in folders for path in _missing_files(folder)]
    if gone:
        raise ValueError(f"{gone[0]} is gone, or not whole; without source={config.source} it cannot be packed again")


def _missing_files(folder: Path) -> list[Path]:
    """What is not as the folder's dataset.json says, or that file itself."""
    try:
        manifest = Manifest.load(folder)
    except (OSError, ValueError):
        return [folder / MANIFEST]
    sizes = {folder / info.name: info.bytes for info in manifest.shards}
    indexes = [folder / info.index_name for info in manifest.shards]
    tars = [tar for tar, size in sizes.items() if not tar.is_file() or tar.stat().st_size != size]
    return tars + [index for index in indexes if not index.is_file()]


def _contents(config: PackConfig) -> _Contents:
    default = "png" if config.resolution <= _PNG_UP_TO else "jpg"
    encoding = Encoding(config.resolution, config.format or default, config.quality)
    if config.source == "drawn":
        digits = len(str(config.num_drawn - 1))
        items = [
            Item(f"{CLASSES[i % len(CLASSES)]}/{i:0{digits}d}", i % len(CLASSES), index=i)
            for i in range(config.num_drawn)
        ]
        return _Contents(*_split(Listing("", tuple(items), CLASSES), config.holdout), encoding)
    if array_files(config.source, "train"):
        return _Contents(*_split_arrays(config), encoding)
    known = Manifest.load(resolve(config.classes_from)).classes if config.classes_from else ()
    if not os.path.isdir(config.holdout):
        return _Contents(*_split(list_folder(config.source, config.labels, known), config.holdout), encoding)
    _check_apart(config.source, config.holdout)
    source_labels, holdout_labels = _assign_labels(config)
    train = list_folder(config.source, source_labels, known)
    holdout = list_folder(config.holdout, holdout_labels, train.classes)
    _check_disjoint(train, holdout)
    return _Contents(train, holdout, encoding)


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


def _split_arrays(config: PackConfig) -> tuple[Listing, Listing]:
    train = list_arrays(config.source, "train", config.class_names)
    if config.holdout != "test":
        return _split(train, config.holdout)
    return train, list_arrays(config.source, "test", train.classes)


def _assign_labels(config: PackConfig) -> tuple[str, str]:
    """The labels file belongs to the flat one of the two folders."""
    if not config.labels:
        return "", ""
    if not os.path.isdir(config.source):
        raise FileNotFoundError(f"source folder {config.source} does not exist")
    flat = [folder for folder in (config.source, config.holdout) if is_flat(folder)]
    if len(flat) != 1:
        raise ValueError(f"labels={config.labels} must serve one flat folder; flat here: {', '.join(flat) or 'none'}")
    return (config.labels, "") if flat == [config.source] else ("", config.labels)


def _split(listing: Listing, rule: str) -> tuple[Listing, Listing]:
    train, holdout = split_items(listing.items, rule)
    return replace(listing, items=tuple(train)), Listing(listing.folder, tuple(holdout), listing.classes)


def _check_source_unchanged(run: Any, contents: _Contents) -> None:
    """Raises ValueError, naming the difference, when the source has changed since the run started."""
    path = run.run_dir / "source.json"
    earlier = read_json(path)
    for name, now in contents.fingerprints.items():
        if (was := earlier.get(name, now)) != now:
            counts = f"{was['images']} {name} images then, {now['images']} now"
            same = " (same number, but other names, sizes or classes)" if was["images"] == now["images"] else ""
            raise ValueError(
                f"the source has changed since {run.run_dir} was started: {counts}{same}; use another run_dir, or "
                "fresh=true, which removes the packed images"
            )
    if run.topology.is_main and not earlier:
        write_json(path, contents.fingerprints)


def _pack(config: PackConfig, contents: _Contents, run: Any) -> None:
    jobs = {split: _jobs(config, contents, run.run_dir, split) for split in contents.listings}
    if run.topology.is_main:
        _log_listings(contents)
        _clean(run.run_dir)
    run.topology.barrier()
    all_jobs = [job for split in jobs.values() for job in split]
    own_jobs = all_jobs[run.topology.rank :: run.topology.world_size]
    with run.stoppable():
        _work(config, own_jobs, sum(len(job.items) for job in all_jobs), run)
    if run.topology.is_main:
        _finish(contents, jobs, run.run_dir)


def _jobs(config: PackConfig, contents: _Contents, run_dir: Path, split: str) -> list[ShardJob]:
    listing = contents.listings[split]
    items = shuffled(listing.items, config.seed)
    count = -(-len(items) // config.samples_per_shard)
    cuts = np.linspace(0, len(items), count + 1).astype(int)
    return [
        ShardJob(
            run_dir / split / f"{n:06d}.tar",
            run_dir / "bad" / f"{split}-{n:06d}.jsonl",
            listing.folder,
            tuple(items[cuts[n] : cuts[n + 1]]),
            contents.encoding,
            config.seed,
            config.max_pixels,
        )
        for n in range(count)
    ]


def _log_listings(contents: _Contents) -> None:
    for name, listing in contents.listings.items():
        ignored = listing.ignored.total()
        notes = [f"; {ignored} other files ignored ({show_counts(listing.ignored)})"] * bool(ignored)
        notes += [f"; {listing.unclassified} images beside the class folders left out"] * bool(listing.unclassified)
        log.info("%s: %d images of %d classes%s", name, len(listing.items), len(listing.classes), "".join(notes))
        for warning in listing.warnings:
            log.warning("%s: %s", name, warning)


def _clean(run_dir: Path) -> None:
    """Make the folders; remove temporary files of a killed run."""
    for name in ("train", "holdout", "bad"):
        (run_dir / name).mkdir(exist_ok=True)
        for path in (run_dir / name).glob(".*.tmp"):
            path.unlink()


def _work(config: PackConfig, jobs: Sequence[ShardJob], total: int, run: Any) -> None:
    """Do the jobs that no earlier run has finished; raises ValueError when too many images are bad."""
    done = {job.tar: info for job in jobs if (info := finished(job)) is not None}
    bad = [line for job in jobs if job.tar in done for line in read_bad(job.bad_path)]
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
            bad += read_bad(job.bad_path)
            _check_budget(bad, total, config.max_bad_fraction)
            bar.update(len(job.items))
    run.poll()


def _check_budget(bad: Sequence[dict[str, str]], total: int, fraction: float) -> None:
    allowed = max(1, int(fraction * total)) if fraction else 0
    if len(bad) > allowed:
        first = bad[0]
        raise ValueError(
            f"{len(bad)} of {total} images do not decode, more than the {allowed} that max_bad_fraction={fraction} "
            f"allows; the first is {printable(first['file'])}: {first['error']}"
        )


def _finish(contents: _Contents, jobs: dict[str, list[ShardJob]], run_dir: Path) -> None:
    bad = []
    for split, listing in contents.listings.items():
        infos = [info for job in jobs[split] if (info := finished(job)) is not None]
        assert len(infos) == len(jobs[split]), "a rank did not finish a shard"
        skipped = [line for job in jobs[split] for line in read_bad(job.bad_path)]
        bad += skipped
        _save_manifest(run_dir / split, contents.encoding, listing, infos, len(skipped))
    if bad:
        write_bad(run_dir / "bad.jsonl", bad)
        log.warning(
            "%d images do not decode and were left out, e.g. %s; see %s",
            len(bad),
            printable(bad[0]["file"]),
            run_dir / "bad.jsonl",
        )


def _save_manifest(folder: Path, encoding: Encoding, listing: Listing, infos: list[ShardInfo], bad: int) -> None:
    if not sum(info.num_samples for info in infos):
        if folder.name == "train":
            raise ValueError("no image is left to train on: all are held out or do not decode")
        if not any(folder.iterdir()):
            folder.rmdir()
        return
    transform = {
        "resolution": encoding.resolution,
        "format": encoding.format,
        "resize": "bilinear, antialiased",
        "crop": "center",
    }
    if encoding.format == "jpg":
        transform["quality"] = encoding.quality
    extra = {"split": folder.name, "source": printable(Path(listing.folder).name) or "drawn", "bad_images": bad}
    Manifest.of("images", infos, listing.classes, transform, extra).save(folder)
    log.info("%s: %d images in %d shards", folder, sum(info.num_samples for info in infos), len(infos))
