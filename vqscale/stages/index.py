"""WebDataset tars that others wrote -> an indexed data set in `<run_dir>/{train,holdout}/`; the tars stay in place.

In: paths or URLs such as `data-{000000..000128}.tar`, a glob or a folder.  Out: one index per tar and a `dataset.json`
that names the tars by their absolute paths or URLs; remote ones are streamed once and not kept. With `verify=true`
every byte is read again and compared; then `source` may also be a data set, which is left as it is.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vqscale import runtime
from vqscale.config import StageConfig
from vqscale.data.processes import run_jobs
from vqscale.data.remote import is_url
from vqscale.data.shards import Manifest, ShardIndex, ShardInfo, resolve
from vqscale.data.specs import expand_spec
from vqscale.data.tarindex import index_tar
from vqscale.data.verify import verify_shard

log = logging.getLogger("vqscale")
_MOST_CLASSES = 100_000  # without class names, a larger label is a mistake


@dataclass(frozen=True)
class IndexConfig(StageConfig):
    """Which tars, and what their labels mean."""

    source: str = ""  # data-{000000..000128}.tar, a URL of that form (http, https, s3, gs), a glob or a folder of tars
    holdout: str = ""  # the same, for held-out tars
    labels: str = "cls"  # cls: the number in each sample's .cls part; none: one class for all
    classes_from: str = ""  # a data set whose class names to use; else the classes are named by their numbers
    resolution: int = 0  # size at which readers shall crop and resize the images; 0 = unknown, and trainers refuse it
    verify: bool = False  # read everything again and compare sha256 and crc32
    allow_pipe: bool = False  # let a source `pipe:COMMAND` run the command
    workers: int = 0  # processes; 0 = one per core; remote tars may take more


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
    if config.labels not in ("cls", "none"):
        raise ValueError(f"labels={config.labels}: choose cls or none")
    if config.verify and (folders := _data_sets(Path(config.source))):
        with runtime.run(config, stage="index") as run:
            _verify(config, folders, run)
        return
    tars = {split: expand_spec(spec, config.allow_pipe) for split, spec in _splits(config)}
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


def _splits(config: IndexConfig) -> list[tuple[str, str]]:
    return [(split, spec) for split, spec in (("train", config.source), ("holdout", config.holdout)) if spec]


def _data_sets(folder: Path) -> list[Path]:
    return [f for f in (folder, folder / "train", folder / "holdout") if (f / "dataset.json").is_file()]


def _clean(run_dir: Path, tars: dict[str, list[str]]) -> None:
    for split in tars:
        (run_dir / split).mkdir(exist_ok=True)
        for path in (run_dir / split).glob(".*.tmp"):
            path.unlink()


def _jobs(config: IndexConfig, folder: Path, tars: Sequence[str], num_classes: int) -> list[_Job]:
    most = num_classes or _MOST_CLASSES
    return [
        _Job(tar, folder / f"{n:06d}.index.safetensors", most, config.labels, config.allow_pipe)
        for n, tar in enumerate(tars)
    ]


def index_one(job: _Job) -> ShardInfo:
    """One job: reads the tar, writes its index."""
    info, rows = index_tar(job.tar, job.num_classes, job.labels, job.allow_pipe)
    rows.save(job.index, info)
    return info


def _finished(job: _Job) -> ShardInfo | None:
    """What an earlier run made of this job, if the tar is still as long as it was; a remote one is not asked."""
    try:
        index = ShardIndex.load(job.index)
    except (OSError, ValueError):
        return None
    if index.name != Path(job.tar).name or (not is_url(job.tar) and index.bytes != Path(job.tar).stat().st_size):
        return None
    return ShardInfo(job.tar, len(index), index.bytes, index.sha256, job.index.name)


def _work(config: IndexConfig, jobs: Sequence[_Job], run: Any) -> None:
    mine = jobs[run.topology.rank :: run.topology.world_size]
    left = [job for job in mine if _finished(job) is None]
    options: dict[str, Any] = {"unit": "tar", "desc": "index", "disable": not run.topology.is_main}
    with tqdm(total=len(mine), initial=len(mine) - len(left), **options) as bar:
        for _ in run_jobs(index_one, left, config.workers, run.stop_requested):
            bar.update()
    run.poll()


def _finish(config: IndexConfig, jobs: dict[str, list[_Job]], classes: Sequence[str], run_dir: Path) -> None:
    if not classes:
        classes = _numbered([job for split in jobs.values() for job in split], config.labels)
    for split, part in jobs.items():
        infos = [info for job in part if (info := _finished(job)) is not None]
        assert len(infos) == len(part), "a rank left a tar undone"
        transform = {"resolution": config.resolution} if config.resolution else {}
        made = Manifest.of("images", infos, classes, transform, {"split": split, "source": config.source})
        folder = run_dir / split
        if (folder / "dataset.json").is_file() and (was := Manifest.load(folder)).fingerprint != made.fingerprint:
            raise ValueError(
                f"the tars have changed since {folder} was indexed: {len(was.shards)} with {was.num_samples} samples "
                f"then, {len(made.shards)} with {made.num_samples} now, or other contents; use another run_dir"
            )
        made.save(folder)
        log.info("%s: %d samples of %d classes in %d tars", folder, made.num_samples, len(classes), len(made.shards))


def _numbered(jobs: Sequence[_Job], labels: str) -> list[str]:
    if labels == "none":
        return ["all"]
    return [str(n) for n in range(max(int(ShardIndex.load(job.index).labels.max()) for job in jobs) + 1)]


def _verify(config: IndexConfig, folders: Sequence[Path], run: Any) -> None:
    """Raises ValueError naming the first difference."""
    shards = [(folder, n) for folder in folders for n in range(len(Manifest.load(folder).shards))]
    jobs = [(folder, n, config.allow_pipe) for folder, n in shards]
    mine = jobs[run.topology.rank :: run.topology.world_size]
    wrong: list[str] = []
    with run.stoppable(), tqdm(total=len(mine), unit="tar", desc="verify", disable=not run.topology.is_main) as bar:
        for _, found in run_jobs(verify_shard, mine, config.workers, run.stop_requested):
            wrong += found
            bar.update()
        run.poll()
    wrong = [line for part in run.topology.gather(wrong) for line in part]
    for line in wrong:
        log.warning("%s", line)
    if wrong:
        raise ValueError(f"{len(wrong)} differences in {len(jobs)} tars; the first: {wrong[0]}")
    log.info("verified: %d tars are whole", len(jobs))


def plan(config: IndexConfig) -> str:
    """What `--dry-run` says."""
    tars = {split: expand_spec(spec, config.allow_pipe) for split, spec in _splits(config)}
    local = [Path(tar) for split in tars.values() for tar in split if not is_url(tar)]
    total = f"{sum(path.stat().st_size for path in local) / 1e9:.2f} GB of local ones"
    return f"{len(tars['train'])} training and {len(tars.get('holdout', []))} held-out tars, {total}"
