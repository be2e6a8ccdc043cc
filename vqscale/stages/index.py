"""WebDataset tars that others wrote -> an indexed data set in `<run_dir>/{train,holdout}/`; the tars stay in place.

In: paths or URLs such as `data-{000000..000128}.tar`, a glob or a folder.  Out: one index per tar and a `dataset.json`
that names the tars by their absolute paths or URLs; remote ones are streamed once and not stored. With `verify=true`
every byte is read again and compared; then `source` may also be a data set, which is not changed.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from tqdm import tqdm

from vqscale import runtime
from vqscale.config import StageConfig
from vqscale.data.images import SUFFIXES
from vqscale.data.processes import run_jobs
from vqscale.data.remote import is_url
from vqscale.data.shards import INDEX_SUFFIX, MANIFEST, Manifest, ShardIndex, ShardInfo, resolve
from vqscale.data.specs import expand_spec
from vqscale.data.tarindex import index_tar
from vqscale.data.verify import verify_shard
from vqscale.fields import Choice, NonNegativeInt, PathText
from vqscale.files import prepare_folder, sha256_of
from vqscale.text import redact_url

log = logging.getLogger("vqscale")
_MAX_UNNAMED_CLASSES = 100_000  # without class names, a larger label is a mistake


@dataclass(frozen=True)
class IndexConfig(StageConfig):
    """Which tars, and what their labels mean."""

    outputs: ClassVar[tuple[str, ...]] = ("train", "holdout")

    source: PathText = ""  # data-{000000..000128}.tar, such a URL (http, https, s3, gs), a glob or a folder of tars
    holdout: PathText = ""  # the same, for held-out tars
    labels: Annotated[str, Choice("cls", "none")] = "cls"  # cls: each sample's .cls part; none: one class for all
    classes_from: PathText = ""  # a data set whose class names to use; else the classes are named by their numbers
    resolution: NonNegativeInt = 0  # size to which readers crop and resize; 0 = unknown, which trainers refuse
    verify: bool = False  # read everything again and compare sha256 and crc32
    allow_pipe: bool = False  # let a source `pipe:COMMAND` run the command
    workers: NonNegativeInt = 0  # processes; 0 = one per core; remote tars may take more


Config = IndexConfig


@dataclass(frozen=True)
class _Job:
    tar: str  # a path or a URL
    index: Path
    num_classes: int
    labels: str
    allow_pipe: bool


def main(config: IndexConfig) -> None:
    """Index. Raises ValueError or FileNotFoundError, naming tar, member, key or label, for a tar that is not sound."""
    if not config.source:
        raise ValueError("source= names no tars: a path such as data-{000000..000128}.tar, a glob or a folder")
    if config.verify and (folders := _data_sets(Path(config.source))):
        with runtime.run(config, stage="index") as run:
            _verify(config, folders, run)
        return
    tars = _tars(config)
    classes = Manifest.load(resolve(config.classes_from)).classes if config.classes_from else ()
    with runtime.run(config, stage="index") as run:
        if run.topology.is_main:
            _clean(run.run_dir, tars)
        run.topology.barrier()
        jobs = {split: _jobs(config, run.run_dir / split, paths, len(classes)) for split, paths in tars.items()}
        with run.stoppable():
            _work(config, [job for split in jobs.values() for job in split], run)
        if run.topology.is_main:
            _finish(config, jobs, classes, run.run_dir)
        run.topology.barrier()
        if config.verify:
            _verify(config, [run.run_dir / split for split in jobs], run)


def _tars(config: IndexConfig) -> dict[str, list[str]]:
    """The tars of each split. Raises ValueError for one that is in both, under whatever name."""
    specs = {"train": config.source, "holdout": config.holdout}
    tars = {split: expand_spec(spec, config.allow_pipe) for split, spec in specs.items() if spec}
    train = {_identity(tar) for tar in tars["train"]}
    for tar in tars.get("holdout", []):
        if _identity(tar) in train:
            raise ValueError(
                f"holdout={config.holdout}: {redact_url(tar)} is a training tar too (source={config.source})"
            )
    return tars


def _identity(tar: str) -> tuple[int, int] | str:
    return tar if is_url(tar) else (os.stat(tar).st_dev, os.stat(tar).st_ino)


def _data_sets(folder: Path) -> list[Path]:
    return [f for f in (folder, folder / "train", folder / "holdout") if (f / MANIFEST).is_file()]


def _clean(run_dir: Path, tars: dict[str, list[str]]) -> None:
    for split in tars:
        prepare_folder(run_dir / split)
        _remove_damaged(run_dir / split)


def _jobs(config: IndexConfig, folder: Path, tars: Sequence[str], num_classes: int) -> list[_Job]:
    limit = num_classes or _MAX_UNNAMED_CLASSES
    return [
        _Job(tar, folder / f"{n:06d}{INDEX_SUFFIX}", limit, config.labels, config.allow_pipe)
        for n, tar in enumerate(tars)
    ]


def index_one(job: _Job) -> None:
    """One job: reads the tar, writes its index."""
    info, rows = index_tar(job.tar, job.num_classes, job.labels, job.allow_pipe)
    rows.save(job.index, info)


def _finished(job: _Job) -> ShardInfo | None:
    """The result of an earlier run, if it is whole and the tar still has its size; a remote one is not checked."""
    try:
        index = ShardIndex.load(job.index)
    except (OSError, ValueError):
        return None
    if index.name != Path(job.tar).name or (not is_url(job.tar) and index.bytes != Path(job.tar).stat().st_size):
        return None
    return ShardInfo(job.tar, len(index), index.bytes, index.sha256, job.index.name, index.index_sha256)


def _remove_damaged(folder: Path) -> None:
    """Remove indexes that dataset.json does not describe, so that they are made again."""
    if not (folder / MANIFEST).is_file():
        return
    for shard in Manifest.load(folder).shards:
        path = folder / shard.index_name
        if shard.index_sha256 and path.is_file() and sha256_of(path) != shard.index_sha256:
            log.warning("%s was damaged or changed: it is made again", path)
            path.unlink()


def _work(config: IndexConfig, jobs: Sequence[_Job], run: Any) -> None:
    mine = jobs[run.topology.rank :: run.topology.world_size]
    unfinished = [job for job in mine if _finished(job) is None]
    options: dict[str, Any] = {"unit": "tar", "desc": "index", "disable": not run.topology.is_main}
    with tqdm(total=len(mine), initial=len(mine) - len(unfinished), **options) as bar:
        for _ in run_jobs(index_one, unfinished, config.workers, run.stop_requested):
            bar.update()
    run.poll()


def _finish(config: IndexConfig, jobs: dict[str, list[_Job]], classes: Sequence[str], run_dir: Path) -> None:
    if not classes:
        classes = _numbered([job for split in jobs.values() for job in split], config.labels)
    infos = {split: [info for job in part if (info := _finished(job))] for split, part in jobs.items()}
    _refuse_same_content(infos)
    for split, part in jobs.items():
        assert len(infos[split]) == len(part), "a rank did not finish a tar"
        transform = {"resolution": config.resolution} if config.resolution else {}
        new = Manifest.of(
            "images", infos[split], classes, transform, {"split": split, "source": redact_url(config.source)}
        )
        folder = run_dir / split
        if (folder / MANIFEST).is_file() and (old := Manifest.load(folder)).fingerprint != new.fingerprint:
            raise ValueError(
                f"the tars have changed since {folder} was indexed: {len(old.shards)} with {old.num_samples} samples "
                f"then, {len(new.shards)} with {new.num_samples} now, or others; fresh=true indexes them anew"
            )
        new.save(folder)
        log.info("%s: %d samples of %d classes in %d tars", folder, new.num_samples, len(classes), len(new.shards))
        _warn_of_missing_pictures(part)


def _refuse_same_content(infos: dict[str, list[ShardInfo]]) -> None:
    train = {info.sha256: info.name for info in infos["train"]}
    for info in infos.get("holdout", []):
        if info.sha256 in train:
            raise ValueError(
                f"holdout: {redact_url(info.name)} has the same bytes as {redact_url(train[info.sha256])} in train"
            )


def _warn_of_missing_pictures(jobs: Sequence[_Job]) -> None:
    """Samples without a part that is read as a picture are bad samples later; say so now."""
    total, missing, example = 0, 0, ""
    for job in jobs:
        index = ShardIndex.load(job.index)
        columns = [index.offset[name] >= 0 for name in SUFFIXES if name in index.offset]
        without = np.flatnonzero(~np.any(columns, axis=0)).tolist()
        if without and not missing:
            example = f"{redact_url(job.tar)}: key {index.key(without[0])!r}"
        total, missing = total + len(index), missing + len(without)
    if missing:
        log.warning(
            "%d of %d samples have no picture (%s), the first is %s; a part's name begins at the first dot of the file "
            "name",
            *(missing, total, ", ".join(SUFFIXES), example),
        )


def _numbered(jobs: Sequence[_Job], labels: str) -> list[str]:
    if labels == "none":
        return ["all"]
    occurring = {label for job in jobs for label in np.unique(ShardIndex.load(job.index).labels).tolist()}
    if missing := set(range(max(occurring))) - occurring:
        log.warning(
            "%d of the labels 0 to %d do not occur, the first is %d; labels number the classes from 0",
            *(len(missing), max(occurring), min(missing)),
        )
    return [str(n) for n in range(max(occurring) + 1)]


def _verify(config: IndexConfig, folders: Sequence[Path], run: Any) -> None:
    """Raises ValueError naming the first difference; the log has all."""
    jobs = [(folder, n, config.allow_pipe) for folder in folders for n in range(len(Manifest.load(folder).shards))]
    mine = jobs[run.topology.rank :: run.topology.world_size]
    differences: list[str] = []
    with run.stoppable(), tqdm(total=len(mine), unit="tar", desc="verify", disable=not run.topology.is_main) as bar:
        for _, of_shard in run_jobs(verify_shard, mine, config.workers, run.stop_requested):
            differences += of_shard
            bar.update()
        run.poll()
    differences = [line for of_rank in run.topology.gather(differences) for line in of_rank]
    for line in differences:
        log.warning("%s", line)
    if differences:
        raise ValueError(f"{len(differences)} differences in {len(jobs)} tars; the first: {differences[0]}")
    log.info("verified: %d tars are whole", len(jobs))


def plan(config: IndexConfig) -> str:
    """Counts and sizes, for --dry-run."""
    tars = _tars(config)
    local = [Path(tar) for split in tars.values() for tar in split if not is_url(tar)]
    total = f"{sum(path.stat().st_size for path in local) / 1e9:.2f} GB of local ones"
    return f"{len(tars['train'])} training and {len(tars.get('holdout', []))} held-out tars, {total}"
