"""A folder of images (or the embedded drawings) -> image shards, in `<run_dir>/{train,holdout}/`.

In: files whose first sub-folder is their class, or a labels file.  Out: tars, indexes, `dataset.json`; `bad.jsonl`
names the images that did not decode. One shard is one job: a finished shard is never redone, and the bytes are the
same at any number of processes.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vqscale import runtime
from vqscale.config import StageConfig
from vqscale.data.drawn import CLASSES
from vqscale.data.listing import (
    Item,
    Listing,
    holdout_every,
    holdout_fraction,
    is_flat,
    list_folder,
    shuffled,
    split_items,
)
from vqscale.data.packing import Encoding, ShardJob, finished, pack_shard, read_bad
from vqscale.data.processes import run_jobs
from vqscale.data.shards import Manifest, ShardInfo, resolve
from vqscale.files import write_json

log = logging.getLogger("vqscale")
_PNG_UP_TO = 128  # pixels: below, PNG is small enough and exact
# Fewer images are packed sooner than processes start.
_WORTH_PROCESSES, _WORTH_PROCESSES_DRAWN = 2_000, 25_000
_SPLITS = ("train", "holdout")


@dataclass(frozen=True)
class PackConfig(StageConfig):
    """What to pack and how."""

    source: str = "drawn"  # a folder of images (its sub-folders are the classes), or drawn: the embedded data set
    labels: str = ""  # a file of lines `filename class`, for a flat folder (of source, or of holdout)
    classes_from: str = ""  # a data set whose class names and numbers to use
    resolution: int = 64  # pixels: shorter side resized, centre cropped
    format: str = ""  # png | jpg; default png up to 128 pixels, else jpg
    quality: int = 95  # of jpg
    holdout: str = "0.05"  # a fraction by key | every:20 | a folder
    samples_per_shard: int = 1000  # at most
    num_drawn: int = 20000  # images, for source=drawn
    max_bad_fraction: float = 0.01  # of images that may fail to decode; at least 1 may, unless it is 0
    workers: int = 0  # processes; 0 = one per core


Config = PackConfig


@dataclass(frozen=True)
class _Plan:
    """All that is decided before the first byte is written."""

    train: Listing
    holdout: Listing
    encoding: Encoding

    @property
    def facts(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        parts = {"train": self.train, "holdout": self.holdout}
        return {name: {"images": len(part.items), "files": part.fingerprint} for name, part in parts.items()}


def main(config: PackConfig) -> None:
    """Pack. Raises ValueError or FileNotFoundError before anything is written if source or config do not hold."""
    _check(config)
    if _is_done(config) and not _source_is_there(config):
        plan = None  # packed long ago and the source put away since: nothing left to compare
    else:
        plan = _plan(config)
    with runtime.run(config, stage="pack") as run:
        if plan is not None:
            _agree_with_earlier(run, plan)
        if run.was_done or plan is None:
            log.info("%s: already packed", run.run_dir)
            return
        _pack(config, plan, run)


def plan(config: PackConfig) -> str:
    """What `--dry-run` says."""
    _check(config)
    made = _plan(config)
    return (
        f"{len(made.train.items)} training and {len(made.holdout.items)} held-out images of {len(made.train.classes)} "
        f"classes, stored as {made.encoding.resolution}×{made.encoding.resolution} {made.encoding.format}"
    )


def _check(config: PackConfig) -> None:
    if config.format not in ("", "png", "jpg"):
        raise ValueError(f"format={config.format}: choose png or jpg")
    for name in ("resolution", "samples_per_shard", "num_drawn"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if not 1 <= config.quality <= 100:
        raise ValueError(f"quality={config.quality} must lie in 1 … 100")
    if config.source == "drawn" and (config.labels or config.classes_from or os.path.isdir(config.holdout)):
        raise ValueError(
            "source=drawn has classes of its own: labels=, classes_from= and a holdout folder do not apply"
        )
    if not os.path.isdir(config.holdout) and not holdout_every(config.holdout):
        holdout_fraction(config.holdout)


def _is_done(config: PackConfig) -> bool:
    return runtime.read_status(Path(config.run_dir)).get("state") == "done"


def _source_is_there(config: PackConfig) -> bool:
    return config.source == "drawn" or os.path.isdir(config.source)


def _plan(config: PackConfig) -> _Plan:
    default = "png" if config.resolution <= _PNG_UP_TO else "jpg"
    encoding = Encoding(config.resolution, config.format or default, config.quality)
    if config.source == "drawn":
        digits = len(str(config.num_drawn - 1))
        items = [
            Item(f"{CLASSES[i % len(CLASSES)]}/{i:0{digits}d}", i % len(CLASSES), index=i)
            for i in range(config.num_drawn)
        ]
        return _Plan(*_split(Listing("", tuple(items), CLASSES), config.holdout), encoding)
    known = Manifest.load(resolve(config.classes_from)).classes if config.classes_from else ()
    if not os.path.isdir(config.holdout):
        return _Plan(*_split(list_folder(config.source, config.labels, known), config.holdout), encoding)
    for_source, for_holdout = _whose_labels(config)
    train = list_folder(config.source, for_source, known)
    return _Plan(train, list_folder(config.holdout, for_holdout, train.classes), encoding)


def _whose_labels(config: PackConfig) -> tuple[str, str]:
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
    return replace(listing, items=tuple(train)), replace(listing, items=tuple(holdout), ignored=0, outside=0)


def _agree_with_earlier(run: Any, plan: _Plan) -> None:
    """Raises ValueError, naming what differs, when the source is no longer the one this run began with."""
    path = run.run_dir / "source.json"
    if path.is_file():
        earlier = json.loads(path.read_text())
        for name, now in plan.facts.items():
            if (was := earlier[name]) != now:
                counts = f"{was['images']} {name} images then, {now['images']} now"
                same = " (same number, but other names, sizes or classes)" if was["images"] == now["images"] else ""
                raise ValueError(
                    f"the source has changed since {run.run_dir} was begun: {counts}{same}; use another run_dir"
                )
    elif run.topology.is_main:
        write_json(path, plan.facts)


def _pack(config: PackConfig, plan: _Plan, run: Any) -> None:
    jobs = {split: _jobs(config, plan, run.run_dir, split) for split in _SPLITS}
    if run.topology.is_main:
        _announce(plan)
        _clean(run.run_dir)
    run.topology.barrier()
    every = [job for split in _SPLITS for job in jobs[split]]
    mine = every[run.topology.rank :: run.topology.world_size]
    with run.stoppable():
        _work(config, mine, sum(len(job.items) for job in every), run)
    if run.topology.is_main:
        _finish(plan, jobs, run.run_dir)


def _jobs(config: PackConfig, plan: _Plan, run_dir: Path, split: str) -> list[ShardJob]:
    listing = plan.train if split == "train" else plan.holdout
    items = shuffled(listing.items, config.seed)
    count = -(-len(items) // config.samples_per_shard)
    cuts = np.linspace(0, len(items), count + 1).astype(int)
    return [
        ShardJob(
            run_dir / split / f"{n:06d}.tar",
            run_dir / "bad" / f"{split}-{n:06d}.jsonl",
            listing.folder,
            tuple(items[cuts[n] : cuts[n + 1]]),
            plan.encoding,
            config.seed,
        )
        for n in range(count)
    ]


def _announce(plan: _Plan) -> None:
    for name, part in (("train", plan.train), ("holdout", plan.holdout)):
        left_out = [f"{part.ignored} other files ignored"] * bool(part.ignored)
        left_out += [f"{part.outside} images beside the class folders left out"] * bool(part.outside)
        notes = "".join(f"; {note}" for note in left_out)
        log.info("%s: %d images of %d classes%s", name, len(part.items), len(part.classes), notes)


def _clean(run_dir: Path) -> None:
    """Make the folders; remove what a killed run was writing."""
    for name in (*_SPLITS, "bad"):
        (run_dir / name).mkdir(exist_ok=True)
        for path in (run_dir / name).glob(".*.tmp"):
            path.unlink()


def _work(config: PackConfig, jobs: Sequence[ShardJob], total: int, run: Any) -> None:
    """Do the jobs that an earlier run has not done; raises ValueError when too many images are bad."""
    done = {job.tar: info for job in jobs if (info := finished(job)) is not None}
    bad = [line for job in jobs if job.tar in done for line in read_bad(job.bad_path)]
    _check_budget(bad, total, config.max_bad_fraction)
    left = [job for job in jobs if job.tar not in done]
    mine, to_do = (sum(len(job.items) for job in part) for part in (jobs, left))
    enough = _WORTH_PROCESSES_DRAWN if config.source == "drawn" else _WORTH_PROCESSES
    workers = config.workers or (0 if to_do >= enough else 1)
    with tqdm(total=mine, initial=mine - to_do, unit="image", desc="pack", disable=not run.topology.is_main) as bar:
        for job, _ in run_jobs(pack_shard, left, workers, run.stop_requested):
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
            f"allows; the first is {first['file']}: {first['error']}"
        )


def _finish(plan: _Plan, jobs: dict[str, list[ShardJob]], run_dir: Path) -> None:
    bad = []
    for split, listing in (("train", plan.train), ("holdout", plan.holdout)):
        infos = [info for job in jobs[split] if (info := finished(job)) is not None]
        assert len(infos) == len(jobs[split]), "a rank left a shard undone"
        missing = [line for job in jobs[split] for line in read_bad(job.bad_path)]
        bad += missing
        _save_manifest(run_dir / split, plan, listing, infos, len(missing))
    if bad:
        (run_dir / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
        log.warning(
            "%d images do not decode and were left out, e.g. %s; see %s",
            len(bad),
            bad[0]["file"],
            run_dir / "bad.jsonl",
        )


def _save_manifest(folder: Path, plan: _Plan, listing: Listing, infos: list[ShardInfo], bad: int) -> None:
    if not sum(info.num_samples for info in infos):
        if folder.name == "train":
            raise ValueError("no image is left to train on: all are held out or do not decode")
        if not any(folder.iterdir()):
            folder.rmdir()
        return
    how = plan.encoding
    transform = {
        "resolution": how.resolution,
        "format": how.format,
        "resize": "bilinear, antialiased",
        "crop": "center",
    }
    if how.format == "jpg":
        transform["quality"] = how.quality
    extra = {"split": folder.name, "source": Path(listing.folder).name or "drawn", "bad_images": bad}
    Manifest.of("images", infos, listing.classes, transform, extra).save(folder)
    log.info("%s: %d images in %d shards", folder, sum(info.num_samples for info in infos), len(infos))
