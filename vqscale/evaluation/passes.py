"""A pass over a data set chunk by chunk, each chunk a file: what was computed before a kill is not computed again.

In: a `Bench`, a data set, and a function of batches of images.  Out: rows of named tensors, or a FeatureSet.
A chunk is a run of consecutive images, the same at any number of ranks. Ranks take turns at the chunks, so that a run
that goes on with more or fewer ranks uses the chunks of the earlier one. Padding counts for nothing; a chunk with an
image that can't be read is not kept, and a missing image is an error.
Shapes: b images, f features, s spatial features, c logits.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from tqdm import tqdm

from vqscale.batch import Batch
from vqscale.data.images import ImageReader
from vqscale.data.sequential import SequentialBatches, read_runs
from vqscale.evaluation.features import Extractor, Features, PerceptualDistance, Unavailable, load_extractor, load_lpips
from vqscale.evaluation.inputs import DataSet, EvaluateConfig
from vqscale.evaluation.scores import METRICS, Scores
from vqscale.evaluation.statistics import (
    DamagedFile,
    FeatureSet,
    Moments,
    load_statistics,
    read_tensors,
    save_statistics,
    statistics_path,
    write_tensors,
)
from vqscale.runtime import Run, log
from vqscale.topology import Topology

CHUNK = 256  # images; of Inception's features some 5 MB
KEPT = 50_000  # images whose features are held in memory, for the metrics that compare pairs

Rows = Callable[[Batch], dict[str, Tensor]]  # a batch -> what to keep of it, tensors of [b, ...]
Chunks = Iterator[tuple[range, dict[str, Tensor]]]  # (positions of a chunk, its rows)
N = TypeVar("N", Extractor, PerceptualDistance)


@dataclass(frozen=True)
class Bench:
    """What every family works with: the run and its config, the scores so far, and the networks."""

    config: EvaluateConfig
    run: Run
    scores: Scores
    extractor: Extractor | None
    perceptual: PerceptualDistance | None

    @property
    def topology(self) -> Topology:
        return self.run.topology

    @property
    def statistics(self) -> Path:
        """The folder of cached statistics and chunks."""
        return self.run.run_dir / "statistics"

    def batches(self, data: DataSet, resolution: int, chunks: Sequence[range]) -> SequentialBatches:
        """Batches of a data set's images, chunk by chunk."""
        read = ImageReader(resolution, max_pixels=self.config.max_pixels)
        bad, block, workers = self.run.run_dir / "bad.jsonl", self.config.batch, self.config.workers
        return read_runs(data.folder, chunks, read=read, block=block, workers=workers, bad_path=bad, cache=data.cache)

    def watch(self, batches: Sequence[Any] | SequentialBatches, title: str) -> Iterator[Any]:
        """The batches under a progress bar. Ranks may have different numbers of them; all leave them together when one
        is asked to stop."""
        main = self.topology.is_main
        with self.run.stoppable(), tqdm(total=len(batches), desc=title, unit="batch", disable=not main) as bar:
            for batch in batches:
                self.run.poll()
                yield batch
                bar.update()


# --- the networks -----------------------------------------------------------------------------------------------------


def open_bench(config: EvaluateConfig, run: Run, scores: Scores) -> Bench:
    """With the networks that the metrics need; metrics whose network is absent are left out."""
    keys = [metric.key for metric in METRICS.values() if metric.features]
    unverified, device = config.allow_unverified_weights, run.topology.device
    load = partial(load_extractor, config.extractor, config.weights, allow_unverified_weights=unverified, device=device)
    extractor = _open(scores, keys, f"weights={config.weights}", load)
    path = config.vgg16_weights
    perceptual = _open(scores, ["lpips"], f"vgg16_weights={path}", partial(load_lpips, path, unverified, device))
    if extractor is not None:
        _leave_out_other_features(scores, keys, extractor)
    return Bench(config, run, scores, extractor, perceptual)


def _open(scores: Scores, keys: Sequence[str], where: str, load: Callable[[], N]) -> N | None:
    """A network, if any of the metrics is chosen; if it cannot be had, they are left out."""
    if not scores.wants(*keys):
        return None
    try:
        network = load()
    except Unavailable as error:
        scores.leave_out(keys, str(error))
        return None
    if not network.verified:
        log.warning("%s are of unknown origin: none of its numbers is comparable with papers", where)
    return network


def _leave_out_other_features(scores: Scores, keys: Sequence[str], extractor: Extractor) -> None:
    for key in keys:
        needed = METRICS[key].features
        if needed not in ("any", extractor.name):
            scores.leave_out([key], f"it is named after the features of extractor={needed}, this is {extractor.name}")
    if extractor.name == "vgg16":
        scores.leave_out(["inception_score"], "vgg16 is used for its features, not its classes")


# --- chunks -----------------------------------------------------------------------------------------------------------


@contextmanager
def chunked_pass(
    bench: Bench, facts: Mapping[str, Any], data: DataSet, resolution: int, rows: Rows, title: str
) -> Iterator[Chunks]:
    """This rank's chunks of a pass, all of them there; removed at the end.

    Raises ValueError on all ranks if an image can't be read.
    """
    topology, folder = bench.topology, statistics_path(bench.statistics, facts).with_suffix("")
    mine = chunks_of_rank(data.n, topology)
    missing = unfinished(folder, mine)
    batches = bench.batches(data, resolution, missing)
    unread = compute_chunks(folder, missing, bench.watch(batches, title), rows, bench.config.batch)
    if unread := sum(topology.gather(unread)):
        raise ValueError(f"{data.name}: {unread} of {data.n} images could not be read: bad.jsonl names them")
    yield read_chunks(folder, mine)
    topology.barrier()
    if topology.is_main:
        shutil.rmtree(folder, ignore_errors=True)


def chunks_of(total: int) -> list[range]:
    """0 … total - 1 in runs of CHUNK, the last one shorter."""
    return [range(first, min(total, first + CHUNK)) for first in range(0, total, CHUNK)]


def chunks_of_rank(total: int, topology: Topology) -> list[range]:
    """Those that this rank works on."""
    return chunks_of(total)[topology.rank :: topology.world_size]


def chunk_path(folder: Path, chunk: range) -> Path:
    """Where a chunk is kept."""
    return folder / f"{chunk.start:09d}-{chunk.stop:09d}.safetensors"


def unfinished(folder: Path, chunks: Iterable[range]) -> list[range]:
    """The chunks that are not there or can't be read."""
    return [chunk for chunk in chunks if not _is_whole(folder, chunk)]


def _is_whole(folder: Path, chunk: range) -> bool:
    try:
        tensors, _ = read_tensors(chunk_path(folder, chunk))
    except (OSError, DamagedFile):
        return False
    return bool(tensors) and all(len(rows) == len(chunk) for rows in tensors.values())


def compute_chunks(folder: Path, chunks: Iterable[range], batches: Iterable[Batch], rows: Rows, block: int) -> int:
    """Write the rows of every chunk; `batches` are `read_runs` over just these chunks, in blocks of `block`.

    Returns how many images could not be read.
    """
    stream, unread = iter(batches), 0
    for chunk in chunks:
        blocks = [_counted_rows(next(stream), rows) for _ in range(math.ceil(len(chunk) / block))]
        tensors = {name: torch.cat([some[name] for some in blocks]) for name in blocks[0]}
        missing = len(chunk) - len(next(iter(tensors.values())))
        if not missing:
            write_tensors(chunk_path(folder, chunk), tensors)
        unread += missing
    for _ in stream:  # ends it: ranks leave together
        raise AssertionError("more batches than chunks")
    return unread


def _counted_rows(batch: Batch, rows: Rows) -> dict[str, Tensor]:
    """The rows of samples that count, on the CPU."""
    kept = batch["weight"] > 0
    return {name: value.cpu()[kept] for name, value in rows(batch).items()}


def read_chunks(folder: Path, chunks: Iterable[range]) -> Chunks:
    """(chunk, its rows) for chunks that are all there."""
    for chunk in chunks:
        yield chunk, read_tensors(chunk_path(folder, chunk))[0]


# --- features ---------------------------------------------------------------------------------------------------------


class Collector:
    """Adds up the features of `total` images, wherever they are computed; `finish` brings the ranks together."""

    def __init__(self, extractor: Extractor, total: int, topology: Topology):
        self._extractor, self._total, self._topology = extractor, total, topology
        self._kept = min(total, KEPT)
        self._moments: dict[str, Moments] = {}
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []  # positions, features, logits; on the CPU

    def add(self, images: UInt8[Tensor, "b 3 h w"], position: Int[Tensor, " b"], weight: Float[Tensor, " b"]) -> None:
        """position: in 0 … total - 1; weight: 0 (padding) and 1."""
        self._add_rows(feature_rows(self._extractor(images)), position, weight)

    def add_chunk(self, chunk: range, rows: Mapping[str, Tensor]) -> None:
        """A chunk of a pass that kept `feature_rows`, and perhaps others."""
        self._add_rows(rows, torch.arange(chunk.start, chunk.stop), torch.ones(len(chunk)))

    def _add_rows(self, rows: Mapping[str, Tensor], position: Int[Tensor, " b"], weight: Float[Tensor, " b"]) -> None:
        for name in ("pooled", "spatial"):
            if name in rows:
                if name not in self._moments:
                    self._moments[name] = Moments(rows[name].shape[1], self._topology.device)
                self._moments[name].add(rows[name], weight)
        kept = ((weight > 0) & (position < self._kept)).nonzero().flatten()
        self._rows.append((position[kept].cpu(), rows["pooled"][kept].cpu(), rows["logits"][kept].cpu()))

    def finish(self) -> FeatureSet:
        """The features of all ranks. Every rank must call it. Raises ValueError if images are missing."""
        for moments in self._moments.values():
            moments.reduce_(self._topology.all_reduce_)
        n = self._moments["pooled"].n
        if n != self._total:
            raise ValueError(f"{self._total - n} of {self._total} images could not be read: bad.jsonl names them")
        position, *columns = (torch.cat(column) for column in zip(*self._rows, strict=True))
        features, logits = (gather_rows(rows, position, self._kept, self._topology) for rows in columns)
        gaussians = {name: moments.gaussian() for name, moments in self._moments.items() if n > 1}
        return FeatureSet(n, gaussians, features, logits)


def gather_rows(
    rows: Shaped[Tensor, "b *row"], position: Int[Tensor, " b"], total: int, topology: Topology
) -> Shaped[Tensor, "n *row"]:
    """Each rank's rows at their positions among all n = `total`: a sum in which every row has one summand."""
    whole = torch.zeros(total, *rows.shape[1:], dtype=rows.dtype)
    whole[position] = rows
    return topology.all_reduce_(whole.to(topology.device)).cpu()


def collect_images(
    images: UInt8[Tensor, "n 3 h w"], extractor: Extractor, topology: Topology, batch: int
) -> FeatureSet:
    """Features of images that every rank holds."""
    collector = Collector(extractor, len(images), topology)
    stride = topology.world_size * batch
    for first in range(topology.rank * batch, max(len(images), stride), stride):
        position = torch.arange(first, first + batch)
        rows = images[position.clamp_max(len(images) - 1)].to(topology.device)
        weight = (position < len(images)).float()
        collector.add(rows, position.to(topology.device), weight.to(topology.device))
    return collector.finish()


def feature_rows(features: Features) -> dict[str, Tensor]:
    """What a chunk keeps of features: float32, `spatial` only where there is one."""
    return {name: value.float() for name, value in vars(features).items() if value is not None}


def chunk_collector(total: int, resolution: int, extractor: Extractor, topology: Topology) -> Collector:
    """A collector of chunks, which knows the features' widths on a rank that has no chunk, too."""
    collector = Collector(extractor, total, topology)
    blank = torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8, device=topology.device)
    collector.add(blank, torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    return collector


def cached_statistics(path: Path, facts: Mapping[str, Any]) -> FeatureSet | None:
    """What was saved for these facts, or None, with a warning where the file is damaged. Raises ValueError for
    statistics of other facts."""
    try:
        return load_statistics(path, facts)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        log.warning("%s; it is computed again", error)
        return None


def features_of(bench: Bench, data: DataSet, resolution: int) -> FeatureSet:
    """Features of a data set's images, cached under everything that they depend on. Every rank must call it."""
    assert bench.extractor is not None
    extractor, topology = bench.extractor, bench.topology
    facts = {
        "weights": extractor.weights_sha256,
        "preprocessing": f"centre crop to {resolution}; {extractor.preprocessing}",
        "data": data.manifest.fingerprint,
        "n": data.n,
        "split": data.folder.name,
    }
    path = statistics_path(bench.statistics, facts)
    cached = cached_statistics(path, facts)
    if all(topology.gather(cached is not None)):
        assert cached is not None
        return cached

    def rows(batch: Batch) -> dict[str, Tensor]:
        return feature_rows(extractor(batch["image"].to(topology.device)))

    with chunked_pass(bench, facts, data, resolution, rows, f"features of {data.folder.name}") as chunks:
        collector = chunk_collector(data.n, resolution, extractor, topology)
        for chunk, kept in chunks:
            collector.add_chunk(chunk, kept)
        statistics = collector.finish()
        if topology.is_main:
            save_statistics(path, statistics, facts)
    return statistics
