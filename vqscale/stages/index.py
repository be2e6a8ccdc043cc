"""WebDataset tars that others wrote -> an indexed data set in `<run_dir>/{train,holdout}/`; the tars stay in place.

In: paths or URLs such as `data-{000000..000128}.tar`, a glob or a folder.  Out: one index per tar and a `dataset.json`
that names the tars by their absolute paths or URLs; remote ones are streamed once and not stored. With `verify=true`
every byte is read again and compared; then `source` may also be a data set, which is not changed.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from vqscale.data.shardtable import ShardTable, look_together, survey
from vqscale.data.specs import expand_spec
from vqscale.data.tarindex import index_tar
from vqscale.data.verify import verify_shard
from vqscale.fields import Choice, NonNegativeInt, PathText
from vqscale.files import prepare_folder, sha256_of
from vqscale.text import redact_url
from vqscale.topology import ALONE, Topology, launched_ranks

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
    # A process that is alone looks before it makes a run directory; ranks share the look, once they can talk.
    tars = _tars(config, ALONE) if launched_ranks()[1] == 1 else {}
    classes = Manifest.load(resolve(config.classes_from)).classes if config.classes_from else ()
    with runtime.run(config, stage="index") as run:
        tars = tars or _tars(config, run.topology)
        for split in tars:
            if run.topology.is_main:
                prepare_folder(run.run_dir / split)
            run.topology.barrier()
            _remove_damaged(run.run_dir / split, run.topology)
        run.topology.barrier()
        jobs = _Jobs(config, run.run_dir, tars, len(classes))
        with run.stoppable():
            _work(config, jobs, run)
        contents = _Contents()
        rows = survey(run.topology, len(jobs), lambda n: contents.look(n, jobs[n]))
        everywhere = run.topology.gather(contents)
        if run.topology.is_main:
            _finish(config, jobs, rows, everywhere, classes)
        run.topology.barrier()
        if config.verify:
            _verify(config, [run.run_dir / split for split in tars], run)


def _tars(config: IndexConfig, topology: Topology) -> dict[str, list[str]]:
    """The tars of each split. Collective. Raises ValueError for one that is in both, under whatever name."""
    specs = {"train": config.source, "holdout": config.holdout}
    tars = {split: expand_spec(spec, config.allow_pipe, topology) for split, spec in specs.items() if spec}
    if "holdout" not in tars:
        return tars
    train, holdout = (look_together(topology, tars[split], _identity) for split in tars)
    in_train = {*train}
    for tar, identity in zip(tars["holdout"], holdout, strict=True):
        if identity in in_train:
            raise ValueError(
                f"holdout={config.holdout}: {redact_url(tar)} is a training tar too (source={config.source})"
            )
    return tars


def _identity(tar: str) -> tuple[int, int] | str:
    return tar if is_url(tar) else ((info := os.stat(tar)).st_dev, info.st_ino)


def _data_sets(folder: Path) -> list[Path]:
    return [f for f in (folder, folder / "train", folder / "holdout") if (f / MANIFEST).is_file()]


class _Jobs(Sequence[_Job]):
    """One per tar, those of all splits; each is made when it is asked for."""

    def __init__(self, config: IndexConfig, run_dir: Path, tars: dict[str, list[str]], num_classes: int):
        self.tars, self.run_dir = tars, run_dir
        self._rest = (num_classes or _MAX_UNNAMED_CLASSES, config.labels, config.allow_pipe)

    def __len__(self) -> int:
        return sum(len(tars) for tars in self.tars.values())

    def __getitem__(self, number: Any) -> Any:
        for split, tars in self.tars.items():
            if number < len(tars):
                return _Job(tars[number], self.run_dir / split / f"{number:06d}{INDEX_SUFFIX}", *self._rest)
            number -= len(tars)
        raise IndexError(number)


def index_one(job: _Job) -> None:
    """One job: reads the tar, writes its index."""
    info, rows = index_tar(job.tar, job.num_classes, job.labels, job.allow_pipe)
    rows.save(job.index, info)


def _finished(job: _Job) -> ShardIndex | None:
    """The result of an earlier run, if it is whole and the tar still has its size; a remote one is not checked."""
    try:
        index = ShardIndex.load(job.index)
    except (OSError, ValueError):
        return None
    if index.name != Path(job.tar).name or (not is_url(job.tar) and index.bytes != Path(job.tar).stat().st_size):
        return None
    return index


@dataclass
class _Contents:
    """What the indexes that a rank has looked at hold: labels, and samples that have no picture by the tar's number."""

    labels: set[int] = field(default_factory=set)
    without_picture: dict[int, tuple[int, str]] = field(default_factory=dict)  # how many, and the first one's key

    def look(self, number: int, job: _Job) -> ShardInfo | None:
        """The shard of a job that is done."""
        if (index := _finished(job)) is None:
            return None
        self.labels.update(np.unique(index.labels).tolist())
        columns = [index.offset[name] >= 0 for name in SUFFIXES if name in index.offset]
        without = np.flatnonzero(~np.any(columns, axis=0)).tolist()
        if without:
            self.without_picture[number] = (len(without), index.key(without[0]))
        return ShardInfo(job.tar, len(index), index.bytes, index.sha256, job.index.name, index.index_sha256)


def _remove_damaged(folder: Path, topology: Topology) -> None:
    """Remove indexes that dataset.json does not describe, so that they are made again; each rank looks at its share."""
    if not (folder / MANIFEST).is_file():
        return
    shards = Manifest.load(folder).shards
    for number in range(topology.rank, len(shards), topology.world_size):
        shard, path = shards[number], folder / shards[number].index_name
        if shard.index_sha256 and path.is_file() and sha256_of(path) != shard.index_sha256:
            log.warning("%s was damaged or changed: it is made again", path)
            path.unlink()


def _work(config: IndexConfig, jobs: _Jobs, run: Any) -> None:
    mine = [jobs[n] for n in range(run.topology.rank, len(jobs), run.topology.world_size)]
    unfinished = [job for job in mine if _finished(job) is None]
    options: dict[str, Any] = {"unit": "tar", "desc": "index", "disable": not run.topology.is_main}
    with tqdm(total=len(mine), initial=len(mine) - len(unfinished), **options) as bar:
        for _ in run_jobs(index_one, unfinished, config.workers, run.stop_requested):
            bar.update()
    run.poll()


def _finish(
    config: IndexConfig, jobs: _Jobs, rows: np.ndarray, contents: Sequence[_Contents], classes: Sequence[str]
) -> None:
    assert (rows["num_samples"] >= 0).all(), "a rank did not finish a tar"
    classes = classes or _numbered(set().union(*(part.labels for part in contents)), config.labels)
    without = {n: what for part in contents for n, what in part.without_picture.items()}
    transform = {"resolution": config.resolution} if config.resolution else {}
    manifests, first = {}, 0
    for split, tars in jobs.tars.items():
        names = [f"{n:06d}{INDEX_SUFFIX}" for n in range(len(tars))]
        table = ShardTable.of_rows(rows[first : first + len(tars)], tars, names)
        extra = {"split": split, "source": redact_url(config.source)}
        manifests[split] = Manifest.of("images", table, classes, transform, extra)
        of_split = {n - first: what for n, what in sorted(without.items()) if first <= n < first + len(tars)}
        _warn_of_missing_pictures(manifests[split], of_split)
        first += len(tars)
    _refuse_same_content(manifests)
    for split, new in manifests.items():
        folder = jobs.run_dir / split
        if (folder / MANIFEST).is_file() and (old := Manifest.load(folder)).fingerprint != new.fingerprint:
            raise ValueError(
                f"the tars have changed since {folder} was indexed: {len(old.shards)} with {old.num_samples} samples "
                f"then, {len(new.shards)} with {new.num_samples} now, or others; fresh=true indexes them anew"
            )
        new.save(folder)
        log.info("%s: %d samples of %d classes in %d tars", folder, new.num_samples, len(classes), len(new.shards))


def _refuse_same_content(manifests: dict[str, Manifest]) -> None:
    if "holdout" not in manifests:
        return
    train, holdout = manifests["train"], manifests["holdout"]
    numbers = {sha256: n for n, sha256 in enumerate(train.column("sha256"))}
    for n, sha256 in enumerate(holdout.column("sha256")):
        if sha256 in numbers:
            raise ValueError(
                f"holdout: {redact_url(holdout.shards[n].name)} has the same bytes as "
                f"{redact_url(train.shards[numbers[sha256]].name)} in train"
            )


def _warn_of_missing_pictures(manifest: Manifest, without: dict[int, tuple[int, str]]) -> None:
    """Samples without a part that is read as a picture are bad samples later; say so now. `without`: by tar."""
    for number, (_, key) in list(without.items())[:1]:
        log.warning(
            "%d of %d samples have no picture (%s), the first is %s: key %r; a part's name begins at the first dot of "
            "the file name",
            *(sum(count for count, _ in without.values()), manifest.num_samples, ", ".join(SUFFIXES)),
            *(redact_url(manifest.shards[number].name), key),
        )


def _numbered(occurring: set[int], labels: str) -> list[str]:
    if labels == "none":
        return ["all"]
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
    tars = _tars(config, ALONE)
    local = [Path(tar) for split in tars.values() for tar in split if not is_url(tar)]
    total = f"{sum(path.stat().st_size for path in local) / 1e9:.2f} GB of local ones"
    return f"{len(tars['train'])} training and {len(tars.get('holdout', []))} held-out tars, {total}"
