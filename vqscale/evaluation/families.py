"""The families of metrics: inputs -> scores. One function per family; each says what it left out, and why.

In: data sets, models, an extractor, a `Bench` to work on.  Out: entries in `Scores`, and what the report shows.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqscale.batch import Batch
from vqscale.data.cache import Cache
from vqscale.data.images import ImageReader
from vqscale.data.sequential import SequentialBatches, read_runs, sequential_batches
from vqscale.evaluation import metrics
from vqscale.evaluation.collect import collect_images, feature_rows, gather_features
from vqscale.evaluation.features import Extractor
from vqscale.evaluation.inputs import DataSet
from vqscale.evaluation.moments import Gaussian, frechet_distance
from vqscale.evaluation.nll import Codes, Likelihood, bits_per_dim, likelihood, other_classes, other_samples, read_codes
from vqscale.evaluation.parts import Rows, compute_parts, parts_of, unfinished
from vqscale.evaluation.perceptual import PerceptualDistance
from vqscale.evaluation.reconstructions import Reconstructions, gather_reconstructions, reconstruction_rows
from vqscale.evaluation.scores import METRICS, Score, Scores, describe_set, is_published_set, why_not_comparable
from vqscale.evaluation.statistics import (
    FeatureSet,
    PublishedReference,
    load_statistics,
    save_statistics,
    statistics_path,
)
from vqscale.sources import Source
from vqscale.topology import Topology

_ONLY_ON = {  # a distance is named after its features
    "fid": "inception",
    "sfid": "inception",
    "reconstruction_fid": "inception",
    "fd_lite0": "lite0",
    "reconstruction_fd_lite0": "lite0",
}
_OF_FEATURES = tuple(m.key for m in METRICS.values() if m.family == "samples") + (
    "reconstruction_fid",
    "reconstruction_fd_lite0",
)


@dataclass(frozen=True)
class Bench:
    """What every family works with.

    `tick(batches, name, total)` passes batches on, equally many on every rank: a progress bar, and the place to stop.
    `share` does the same where each rank has its own number of them.
    """

    scores: Scores
    topology: Topology
    extractor: Extractor | None
    perceptual: PerceptualDistance | None
    cache: Path
    bad_path: Path
    tick: Callable[[Iterable[Any], str, int], Iterable[Any]]
    share: Callable[[Iterable[Any], str, int], Iterable[Any]]
    batch: int = 64
    workers: int = 0
    shards: Cache | None = None

    def images(self, data: DataSet, resolution: int) -> SequentialBatches:
        """This rank's batches of a data set's images."""
        return sequential_batches(
            data.folder,
            read=ImageReader(resolution),
            batch=self.batch,
            rank=self.topology.rank,
            world_size=self.topology.world_size,
            workers=self.workers,
            limit=data.limit,
            bad_path=self.bad_path,
            cache=self.shards,
        )

    def runs(self, data: DataSet, resolution: int, runs: Sequence[range]) -> SequentialBatches:
        """Batches of a data set's images at runs of positions."""
        return read_runs(
            data.folder,
            runs,
            read=ImageReader(resolution),
            block=self.batch,
            workers=self.workers,
            bad_path=self.bad_path,
            cache=self.shards,
        )

    def cached(self, facts: Mapping[str, Any], compute: Callable[[], FeatureSet]) -> FeatureSet:
        """Statistics from the cache if all ranks see them there, else computed and kept."""
        path = statistics_path(self.cache, facts)
        if all(self.topology.gather(path.is_file())):
            return load_statistics(path, facts)
        found = compute()
        if self.topology.is_main:
            save_statistics(path, found, facts)
        self.topology.barrier()
        return found


def leave_out_other_features(scores: Scores, extractor: Extractor | None, why_none: str) -> None:
    """Without an extractor, or with another one than a metric is named after, that metric is left out."""
    if extractor is None:
        scores.leave_out(_OF_FEATURES, why_none)
        return
    for name, needed in _ONLY_ON.items():
        if needed != extractor.name:
            scores.leave_out([name], f"it is named after the features of extractor={needed}, this is {extractor.name}")
    if extractor.name == "vgg16":
        scores.leave_out(["inception_score"], "vgg16 is used for its features, not its classes")


def features_of(bench: Bench, data: DataSet, resolution: int) -> FeatureSet:
    """Features of a data set's images, cached under everything that they depend on."""
    assert bench.extractor is not None
    extractor = bench.extractor
    facts = {
        "weights": extractor.weights_sha256,
        "preprocessing": f"centre crop to {resolution}; {extractor.preprocessing}",
        "data": data.manifest.fingerprint,
        "n": data.n,
        "split": data.folder.name,
    }
    topology = bench.topology

    def compute() -> FeatureSet:
        def rows(batch: Batch) -> dict[str, Tensor]:
            return feature_rows(extractor(batch["image"].to(topology.device)))

        with _parts(bench, facts, data, resolution, rows, f"features of {data.folder.name}") as folder:
            return gather_features(folder, data.n, resolution, extractor, topology)

    return bench.cached(facts, compute)


@contextmanager
def _parts(
    bench: Bench, facts: Mapping[str, Any], data: DataSet, resolution: int, rows: Rows, title: str
) -> Iterator[Path]:
    """A pass over a data set that goes on after a kill: the folder of its parts, all of them there, removed at the end.

    Raises ValueError on all ranks if an image can't be read.
    """
    topology, folder = bench.topology, statistics_path(bench.cache, facts).with_suffix("")
    missing = unfinished(folder, parts_of(data.n)[topology.rank :: topology.world_size])
    batches = bench.runs(data, resolution, missing)
    unread = compute_parts(folder, missing, bench.share(batches, title, len(batches)), rows, bench.batch)
    if unread := sum(topology.gather(unread)):
        raise ValueError(f"{unread} of {data.n} images could not be read: bad.jsonl names them")
    yield folder
    topology.barrier()
    if topology.is_main:
        shutil.rmtree(folder, ignore_errors=True)


def published_features(bench: Bench, reference: PublishedReference, where: str) -> FeatureSet:
    """ADM's moments, and features of the images in its file, if it has any.

    Raises ValueError for another extractor than Inception.
    """
    extractor = bench.extractor
    if extractor is None or extractor.name != "inception":
        raise ValueError(f"reference={where}: holds moments of Inception features; use extractor=inception")
    if reference.images is None or not len(reference.images):
        nothing = torch.zeros(0, len(reference.gaussian.mean))
        return FeatureSet(0, reference.gaussian, reference.spatial, nothing, nothing)
    own = collect_images(reference.images, extractor, bench.topology, bench.batch)
    return FeatureSet(own.n, reference.gaussian, reference.spatial, own.features, own.logits)


# --- samples ----------------------------------------------------------------------------------------------------------


def score_samples(
    bench: Bench, generated: FeatureSet, real: FeatureSet, reference: str, published: bool, kid_subset_size: int
) -> None:
    """Distances and diversity of samples against reference images."""
    extractor = bench.extractor
    assert extractor is not None

    def put(name: str, compute: Callable[[], float], against: str | None = reference, standard: bool = True) -> None:
        if not bench.scores.wants(name) or name in bench.scores.left_out:
            return
        reason = why_not_comparable(
            extractor, n=generated.n, published_reference=published or against is None, standard=standard
        )
        bench.scores.put(name, score_or_null(compute, generated.n, against, extractor, reason))

    def distance(mine: Gaussian | None, theirs: Gaussian | None) -> float:
        if mine is None or theirs is None:
            raise metrics.TooFew(f"a covariance needs at least 2 images, there are {generated.n} and {real.n}")
        return frechet_distance(mine, theirs)

    put("fid", lambda: distance(generated.gaussian, real.gaussian))
    put("fd_lite0", lambda: distance(generated.gaussian, real.gaussian))
    if real.spatial is None:
        if "sfid" not in bench.scores.left_out:
            bench.scores.leave_out(["sfid"], "the reference has no moments of spatial features")
    else:
        put("sfid", lambda: distance(generated.spatial, real.spatial))
    if not bench.topology.is_main:
        return  # the rest compares pairs of images, once
    usual = kid_subset_size == metrics.KID_SUBSET_SIZE
    put("kid", lambda: metrics.kid(generated.features, real.features, kid_subset_size), standard=usual)
    put("inception_score", lambda: metrics.inception_score(generated.logits), against=None)
    if bench.scores.wants("precision", "recall"):
        pair = once(lambda: metrics.precision_recall(generated.features, real.features))
        put("precision", lambda: pair()[0])
        put("recall", lambda: pair()[1])
    if bench.scores.wants("density", "coverage"):
        pair_2 = once(lambda: metrics.density_coverage(generated.features, real.features))
        put("density", lambda: pair_2()[0])
        put("coverage", lambda: pair_2()[1])


def once(compute: Callable[[], tuple[float, float]]) -> Callable[[], tuple[float, float]]:
    """The same function, computed at its first call."""
    known: list[tuple[float, float]] = []

    def get() -> tuple[float, float]:
        if not known:
            known.append(compute())
        return known[0]

    return get


def score_or_null(
    compute: Callable[[], float], n: int, reference: str | None, extractor: Extractor | None, reason: str
) -> Score:
    """A score; where there are too few images, one without a value."""
    name, sha256, resize = (extractor.name, extractor.weights_sha256, extractor.resize) if extractor else (None,) * 3
    try:
        return Score(float(compute()), n, reference, name, sha256, resize, not reason, reason)
    except metrics.TooFew as few:
        return Score(None, n, reference, name, sha256, resize, False, str(few))


# --- reconstructions --------------------------------------------------------------------------------------------------


def score_reconstructions(bench: Bench, source: Source, data: DataSet) -> Reconstructions:
    """Errors of the VQ-VAE on reference images, and the distance between them and what it makes of them."""
    scores, resolution = bench.scores, source.description["resolution"]
    names = [name for name in ("reconstruction_fid", "reconstruction_fd_lite0") if name not in scores.left_out]
    names = [name for name in names if scores.wants(name)]
    extractor, topology = (bench.extractor if names else None), bench.topology
    networks = [network.weights_sha256 for network in (extractor, bench.perceptual) if network is not None]
    facts = {"vqvae": source.fingerprint, "data": data.manifest.fingerprint, "n": data.n, "networks": networks}
    rows = reconstruction_rows(source.model, topology, extractor, bench.perceptual)
    with _parts(bench, facts, data, resolution, rows, "reconstructions") as folder:
        found = gather_reconstructions(folder, source.model, data.n, topology, extractor, bench.perceptual is not None)
    against, published = data.describe(), is_published_set(data.manifest, data.n)
    reason = why_not_comparable(None, n=data.n, published_reference=published)
    for key, value in (("reconstruction_mse", found.mse), ("psnr", found.psnr), ("ssim", found.ssim)):
        scores.put(key, Score(value, data.n, against, comparable_with_papers=not reason, reason=reason))
    if (network := bench.perceptual) is not None:
        about = ("vgg16, LPIPS 0.1", network.weights_sha256, "none")
        why = why_not_comparable(None, n=data.n, published_reference=published, verified=network.verified)
        scores.put("lpips", Score(found.lpips, data.n, against, *about, comparable_with_papers=not why, reason=why))
    if found.features is not None:
        mine, real = found.features.gaussian, features_of(bench, data, resolution).gaussian
        reason = why_not_comparable(bench.extractor, n=data.n, published_reference=published)
        for name in names:
            scores.put(name, score_or_null(lambda: _distance(mine, real), data.n, against, bench.extractor, reason))
    return found


def _distance(mine: Gaussian | None, real: Gaussian | None) -> float:
    if mine is None or real is None:
        raise metrics.TooFew("a covariance needs at least 2 images, there is 1")
    return frechet_distance(mine, real)


# --- codes and their likelihood ---------------------------------------------------------------------------------------

_OWN_CODES = "a figure of this tokenizer's codes on this data set"


def score_usage(scores: Scores, usage: Mapping[str, np.ndarray], n: int, reference: str) -> None:
    """Perplexity and number of used codes, level by level, from counts [K]."""
    for level, counts in usage.items():
        for key, value in (
            (f"perplexity/{level}", metrics.perplexity(counts)),
            (f"used_codes/{level}", float((counts > 0).sum())),
        ):
            scores.put(key, Score(value, n, reference, reason=_OWN_CODES))


def score_order0(scores: Scores, codes: Codes, train_usage: Mapping[str, Any], reference: str) -> None:
    """What a model that knows only the training frequencies pays per code: the mark that a prior must beat."""
    for level in codes.levels:
        value = metrics.order0_entropy(codes.usage(level), np.asarray(train_usage[level], np.float64))
        scores.put(f"order0_entropy/{level}", Score(value, len(codes), reference, reason=_OWN_CODES))


def score_nll(
    bench: Bench, priors: Mapping[str, Source], codes: Codes, reference: str, *, shuffled: bool, seed: int
) -> dict[str, Likelihood]:
    """Nats and bits per code by level, nats with shuffled classes and shuffled upper codes. Returns the plain ones."""
    plain = {}
    for level, prior in priors.items():

        def nll(level: str = level, prior: Source = prior, **exchanged: Tensor) -> Likelihood:
            total = -(-len(codes) // (bench.batch * bench.topology.world_size))
            steps = iter(bench.tick(range(total), f"NLL {level}", total))
            found = likelihood(
                prior.model, codes, level, bench.topology, batch=bench.batch, tick=lambda: next(steps), **exchanged
            )
            next(steps, None)  # closes the bar
            return found

        def put(name: str, value: float, level: str = level) -> None:
            bench.scores.put(f"{name}/{level}", Score(value, len(codes), reference, reason=_OWN_CODES))

        plain[level] = nll()
        put("nll", plain[level].per_code())
        put("bits_per_code", plain[level].per_code() / math.log(2))
        if not shuffled or len(codes) < 2:
            continue
        if bench.scores.wants("nll_shuffled_class") and len(codes.labels.unique()) > 1:
            put("nll_shuffled_class", nll(labels_of=other_classes(codes.labels, seed)).per_code())
        if bench.scores.wants("nll_shuffled_upper") and codes.above(level):
            put("nll_shuffled_upper", nll(upper_of=other_samples(len(codes), seed)).per_code())
    return plain


def score_train_nll(bench: Bench, priors: Mapping[str, Source], data: DataSet, limit: int) -> None:
    """Nats per code on the first `limit` training samples: the distance to the held-out ones is overfitting."""
    codes = read_codes(data.folder, limit=limit, cache=bench.shards)
    about = describe_set(data.manifest, str(data.folder), len(codes))
    for level, prior in priors.items():
        value = likelihood(prior.model, codes, level, bench.topology, batch=bench.batch).per_code()
        bench.scores.put(f"nll_train/{level}", Score(value, len(codes), about, reason=_OWN_CODES))


def score_bits(
    scores: Scores, nats: Mapping[str, float], codes: Codes, n: int, resolution: int, reference: str
) -> None:
    """Bits per dimension of the codes, once every level has its NLL."""
    missing = [level for level in codes.levels if level not in nats]
    if missing:
        scores.leave_out(["bits_per_dim"], f"it needs a prior for every level, there is none for {', '.join(missing)}")
        return
    grids = {level: (array.shape[1], array.shape[2]) for level, array in codes.levels.items()}
    reason = "of the codes alone: what the decoder gets wrong is not coded"
    scores.put("bits_per_dim", Score(bits_per_dim(nats, grids, resolution), n, reference, reason=reason))
