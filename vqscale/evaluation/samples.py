"""Samples against reference images: distances, diversity, the curve of rejection sampling, and memorisation.

In: a `Bench`, samples, a reference, training images.  Out: scores, and `SampleResults` for the report. Checks come
before any number: does the network see what it should, do the metrics give the answers that are known beforehand?

Rejection keeps the samples whose class a classifier is surest of (Razavi et al. 2019, section 3.4 and figure 7). Beside
its curve stands the distance of as many samples kept at random: that of fewer images is larger for that reason alone.
Shapes: b images, n samples, m training images or rows of neighbours, f features, k neighbours, h w pixels.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from vqscale.data.parts import read_samples
from vqscale.evaluation import metrics
from vqscale.evaluation.classify import CLASS_PROBABILITY
from vqscale.evaluation.features import Extractor
from vqscale.evaluation.inputs import DataSet, Inputs, reference_facts
from vqscale.evaluation.intervals import (
    error_of_share,
    errors_by_halves,
    frechet_error,
    inception_score_error,
    kid_error,
)
from vqscale.evaluation.metrics import PRC_NEIGHBOURS, precision_recall
from vqscale.evaluation.passes import Bench, collect_images, features_of
from vqscale.evaluation.protocols import Standing, extractor_facts, judge, sample_facts
from vqscale.evaluation.scores import keys_of, score_or_null
from vqscale.evaluation.statistics import FeatureSet, PublishedReference, frechet_distance
from vqscale.seeding import key_of, mix, uniform

NOISE = (8, 32)  # standard deviations, of 255, that the extractor is tried on
NEAREST = 3  # training images beside each sample
_CHECKED_IMAGES = 8
_MOST_COMPARED, _FEWEST_COMPARED = 1_000, 20  # images whose pairs are compared in a check
_CLOSE = 0.01  # the share of held-out images that lie as close as "close" means
_ROWS = 512
_DISTANCES = ("fid", "fd_lite0", "fd_lite2")
_CURVES = (*_DISTANCES, "inception_score", "precision", "recall")
_SELECTED = Standing(reason="a part of the samples, chosen by a classifier that papers did not use")


class CheckFailed(RuntimeError):
    """The machinery is wrong, not the input."""


@dataclass(frozen=True)
class Neighbours:
    """m samples, closest to the training images first, each with its k nearest ones, nearest first.

    names: of the classes, m lists of 1 + k. summary: one sentence for the report.
    """

    images: UInt8[Tensor, "m row 3 h w"]  # a row: the sample and its k neighbours
    distances: Float64[Tensor, "m k"]
    names: list[list[str]]
    summary: str


@dataclass(frozen=True)
class SampleResults:
    """For the report. checks: one line for each that was made."""

    checks: list[str] = field(default_factory=list)
    neighbours: Neighbours | None = None


def leave_out_samples(bench: Bench, inputs: Inputs) -> None:
    """Without samples or a reference. Raises ValueError for what is asked for and lacks its inputs."""
    scores, config = bench.scores, bench.config
    for key in ("samples", "reference"):
        if getattr(inputs, key) is None:
            scores.leave_out(keys_of("samples"), inputs.absent[key])
    if not scores.pending(keys_of("samples")):
        return
    if config.neighbours and inputs.training is None:
        raise ValueError(f"neighbours={config.neighbours} needs training images: {inputs.absent['training']}")
    if isinstance(inputs.reference, PublishedReference):
        if config.extractor != "inception":
            raise ValueError(
                f"reference={config.reference}: holds moments of Inception features; use extractor=inception"
            )
        if "spatial" not in inputs.reference.gaussians:
            scores.leave_out(["sfid"], "the reference has no moments of spatial features")


def score_samples(bench: Bench, inputs: Inputs) -> SampleResults:
    """All scores of samples, and the nearest training images of those that lie closest to one."""
    config = bench.config
    if not bench.scores.pending(keys_of("samples")):
        return SampleResults()
    assert inputs.samples is not None and inputs.reference is not None and bench.extractor is not None
    confidence = None
    if config.acceptance:
        check_independent_judge(inputs.samples, bench.extractor)
        confidence = read_confidence(inputs.samples)
    generated = features_of(bench, inputs.samples, inputs.resolution_of(inputs.samples))
    real = _features_of_reference(bench, inputs)
    checks = check_metrics(real) + _check_extractor_on_reference(bench, inputs)
    if bench.topology.is_main:
        _score(bench, generated, real, inputs.samples, inputs.reference)
        if confidence is not None:
            _score_rejection(bench, confidence, generated, real, inputs.reference.describe())
    neighbours = _neighbours(bench, inputs, generated, real) if config.neighbours else None
    return SampleResults(checks, neighbours)


def _features_of_reference(bench: Bench, inputs: Inputs) -> FeatureSet:
    """Of ADM's file its moments, and features of the images in it, if it has any."""
    reference = inputs.reference
    assert reference is not None and bench.extractor is not None
    if isinstance(reference, DataSet):
        return features_of(bench, reference, inputs.resolution_of(reference))
    if reference.images is None:
        nothing = torch.zeros(0, len(reference.gaussians["pooled"].mean))
        return FeatureSet(0, reference.gaussians, nothing, nothing)
    own = collect_images(reference.images, bench.extractor, bench.topology, bench.config.batch)
    return FeatureSet(own.n, reference.gaussians, own.features, own.logits)


# --- scores -----------------------------------------------------------------------------------------------------------


def _score(
    bench: Bench, generated: FeatureSet, real: FeatureSet, samples: DataSet, reference: DataSet | PublishedReference
) -> None:
    """Every metric of samples."""
    scores, of_reference = bench.scores, reference_facts(reference)
    compute = _computations(generated, real, bench.config.kid_subset_size, bench.config.seed)
    facts = sample_facts(generated.n, samples.manifest.transform) | extractor_facts(bench.extractor)
    for key in scores.pending(compute):
        alone = key == "inception_score"  # needs no reference
        standing = judge(key, facts if alone else facts | of_reference, bench.config.protocol)
        about = None if alone else reference.describe()
        value, error = compute[key]
        scores.put(key, score_or_null(value, generated.n, about, bench.extractor, standing, error))


def _computations(
    generated: FeatureSet, real: FeatureSet, kid_subset_size: int, seed: int
) -> dict[str, tuple[Callable[[], float], Callable[[], float] | None]]:
    """(value, standard error) of every metric of samples, none of them computed yet."""
    ours, theirs = generated.features, real.features
    manifold = functools.cache(lambda: metrics.precision_recall(ours, theirs))
    density = functools.cache(lambda: metrics.density_coverage(ours, theirs))
    kid = functools.cache(lambda: metrics.kid_and_error_of_subsets(ours, theirs, kid_subset_size))
    halves = functools.cache(lambda: errors_by_halves(_neighbourhoods, ours, theirs, seed))

    def share(values: Callable[[], tuple[float, float]], which: int, error: int, n: int) -> Any:
        return lambda: values()[which], lambda: max(halves()[error], error_of_share(values()[which], n))

    distance = lambda: metrics.frechet(generated, real), lambda: frechet_error(generated, real)
    return {
        "fid": distance,
        "fd_lite0": distance,
        "fd_lite2": distance,
        "sfid": (lambda: metrics.frechet(generated, real, "spatial"), None),  # of single images these are not kept
        "kid": (lambda: kid()[0], lambda: math.hypot(kid()[1], kid_error(ours, theirs))),
        "inception_score": (
            lambda: metrics.inception_score(generated.logits),
            lambda: inception_score_error(generated.logits),
        ),
        "precision": share(manifold, 0, 0, len(ours)),
        "recall": share(manifold, 1, 1, len(theirs)),
        "density": (lambda: density()[0], lambda: halves()[2]),
        "coverage": share(density, 1, 3, len(theirs)),
    }


def _neighbourhoods(generated: Float[Tensor, "m f"], real: Float[Tensor, "n f"]) -> list[float]:
    """Precision, recall, density and coverage."""
    return [*metrics.precision_recall(generated, real), *metrics.density_coverage(generated, real)]


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_extractor_on_reference(bench: Bench, inputs: Inputs) -> list[str]:
    reference = inputs.reference
    assert reference is not None and bench.extractor is not None
    if isinstance(reference, DataSet):
        first, size = range(min(_CHECKED_IMAGES, reference.n)), inputs.resolution_of(reference)
        images = torch.stack([image for image, _ in reference.images_at(first, size)])
    elif reference.images is not None:
        images = reference.images[:_CHECKED_IMAGES]
    else:
        return []
    return check_extractor(bench.extractor, images.to(bench.topology.device))


def check_extractor(extractor: Extractor, images: UInt8[Tensor, "b 3 h w"]) -> list[str]:
    """Noise moves the features of a few images, more noise moves them further. Raises CheckFailed if not."""
    clean = extractor(images).pooled
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    moved = []
    for amount in NOISE:
        noisy = (images.float() + amount * noise).round().clamp(0, 255).byte()
        moved.append(float((extractor(noisy).pooled - clean).norm(dim=1).mean()))
    again = float((extractor(images).pooled - clean).norm(dim=1).mean())
    ladder = [again, *moved]
    values = ", ".join(f"{value:.3g}" for value in ladder)
    rises = ladder == sorted(ladder) and again < 0.01 * moved[0]
    _require(rises, f"{extractor.name}: noise moves its features by {values}")
    return [f"Noise of 0, {NOISE[0]} and {NOISE[1]} (of 255) moves the features of {len(images)} images by {values}."]


def check_metrics(real: FeatureSet) -> list[str]:
    """The reference against itself, against copies of one of its images, and the other way round.

    Raises CheckFailed where a metric does not give the answer that is known beforehand.
    """
    lines = []
    if (pooled := real.gaussians.get("pooled")) is not None:
        distance, spread = frechet_distance(pooled, pooled), float(pooled.covariance.trace())
        _require(distance <= 1e-6 * spread, f"the reference is at distance {distance:.3g} from itself")
        lines.append(f"The reference is at distance {distance:.2g} from itself (its variance is {spread:.3g}).")
    features = real.features[:_MOST_COMPARED]
    if len(features) < _FEWEST_COMPARED:
        return lines
    itself = precision_recall(features, features)
    _require(itself == (1.0, 1.0), f"precision and recall of the reference against itself are {itself}")
    lines.append("Precision and recall of the reference against itself are 1.")
    row, radius = _typical(features)
    if radius > 0:  # else most images have copies in the set
        copies = features[row].expand(len(features), -1)
        forth, back = precision_recall(copies, features), precision_recall(features, copies)
        collapsed = forth[0] > 0.9 and forth[1] <= max(0.1, 2 / len(features))
        _require(collapsed, f"copies of one image have precision {forth[0]:.3g} and recall {forth[1]:.3g}")
        _require(back == forth[::-1], f"precision and recall are {forth}, with the sets swapped {back}")
        lines.append(f"Copies of one image: precision {forth[0]:.3g}, recall {forth[1]:.3g}; swapped sets swap them.")
    return lines


def _typical(features: Float[Tensor, "n f"]) -> tuple[int, float]:
    """(row, distance of its k-th neighbour): the row of median distance."""
    radii = torch.cdist(features.double(), features.double()).kthvalue(PRC_NEIGHBOURS + 1).values
    row = int(radii.argsort()[len(radii) // 2])
    return row, float(radii[row])


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise CheckFailed(f"self-check: {otherwise}; no score is written")


# --- rejection --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassConfidence:
    """What is known of every sample besides its pixels: the probability of its class, and the class."""

    probability: Float64[Tensor, " n"]
    label: Int64[Tensor, " n"]


def check_independent_judge(data: DataSet, extractor: Extractor) -> None:
    """The network that rejects must not be the one that scores: samples would be chosen for the score itself.

    Raises ValueError naming it.
    """
    judge = data.manifest.extra.get("rejection") or {}
    if judge.get("features_sha256") == extractor.weights_sha256:
        raise ValueError(
            f"samples={data.name}: judged on features of {judge['features']} {extractor.weights_sha256[:12]}, the very "
            f"network that extractor={extractor.name} scores with; choose another, or acceptance=[] for no curve"
        )


def read_confidence(data: DataSet) -> ClassConfidence | None:
    """What `vqscale sample rejection=…` stored with the samples; None where it stored nothing.

    Raises ValueError for a sample that lacks it.
    """
    if not data.manifest.extra.get("rejection"):
        return None
    probabilities, labels = [], []
    for key, label, parts in read_samples(data.folder, ["json"], cache=data.cache):
        try:
            probabilities.append(float(json.loads(parts["json"])[CLASS_PROBABILITY]))
        except (KeyError, ValueError, TypeError):
            raise ValueError(
                f"samples={data.name}: {key} has no {CLASS_PROBABILITY}, though the data set says so"
            ) from None
        labels.append(label)
    return ClassConfidence(torch.tensor(probabilities, dtype=torch.float64), torch.tensor(labels))


def accepted_rows(confidence: ClassConfidence, rate: float, *, seed: int | None = None) -> Int64[Tensor, " k"]:
    """Rows, increasing: of every class the share `rate` (at least one) that is likeliest, or with a `seed` any."""
    order = confidence.probability
    if seed is not None:
        shuffle = mix(seed, key_of("random share"))
        order = torch.tensor([uniform(shuffle, row) for row in range(len(order))], dtype=torch.float64)
    rows = []
    for label in confidence.label.unique():
        of_class = (confidence.label == label).nonzero().flatten()
        count = max(1, round(rate * len(of_class)))
        rows.append(of_class[order[of_class].argsort(descending=True, stable=True)[:count]])
    return torch.cat(rows).sort().values


def _score_rejection(
    bench: Bench, confidence: ClassConfidence, generated: FeatureSet, real: FeatureSet, about: str
) -> None:
    """The samples' metrics at every rate, as `<metric>/accepted_<rate>`, and `<distance>/random_<rate>` beside them."""
    n = len(generated.features)
    confidence = ClassConfidence(confidence.probability[:n], confidence.label[:n])

    def score(part: str, rows: Int64[Tensor, " k"], keys: Iterable[str]) -> None:
        subset = generated.subset(rows)
        compute = _computations(subset, real, bench.config.kid_subset_size, bench.config.seed)
        for key in bench.scores.pending(keys):
            value = score_or_null(compute[key][0], subset.n, about, bench.extractor, _SELECTED)
            bench.scores.put(f"{key}/{part}", value)

    for rate in sorted(bench.config.acceptance, reverse=True):
        score(f"accepted_{rate:.2f}", accepted_rows(confidence, rate), _CURVES)
        if rate < 1:
            score(f"random_{rate:.2f}", accepted_rows(confidence, rate, seed=bench.config.seed), _DISTANCES)


# --- nearest training images ------------------------------------------------------------------------------------------


def _neighbours(bench: Bench, inputs: Inputs, generated: FeatureSet, real: FeatureSet) -> Neighbours | None:
    """On rank 0."""
    assert inputs.samples is not None and inputs.training is not None
    resolution = inputs.resolution_of(inputs.samples)
    training = features_of(bench, inputs.training, resolution)
    if not bench.topology.is_main:
        return None
    return find_neighbours(
        inputs.samples,
        generated.features,
        inputs.training,
        training.features,
        real.features,
        count=bench.config.neighbours,
        resolution=resolution,
    )


def nearest(
    queries: Float[Tensor, "n f"], training: Float[Tensor, "m f"], count: int
) -> tuple[Float64[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """(distances, rows) of the k = `count` nearest training features, nearest first."""
    distances, rows = [], []
    for part in queries.split(_ROWS):
        row = torch.cdist(part, training).topk(count, largest=False).indices
        exact = (part[:, None].double() - training[row].double()).norm(dim=2)  # cdist rounds near 0
        order = exact.argsort(dim=1, stable=True)
        distances.append(exact.gather(1, order))
        rows.append(row.gather(1, order))
    return torch.cat(distances), torch.cat(rows)


def find_neighbours(
    samples: DataSet,
    of_samples: Float[Tensor, "n f"],
    training: DataSet,
    of_training: Float[Tensor, "m f"],
    of_held_out: Float[Tensor, "r f"],
    *,
    count: int,
    resolution: int,
) -> Neighbours:
    """The `count` samples that lie closest to a training image; of_…: features, in stored order."""
    distances, rows = nearest(of_samples, of_training, min(NEAREST, len(of_training)))
    closest = distances[:, 0].argsort(stable=True)[:count]
    images, names = [], []
    for sample in closest.tolist():
        one = samples.images_at([sample], resolution)
        others = training.images_at(rows[sample].tolist(), resolution)
        images.append(torch.stack([image for image, _ in [*one, *others]]))
        names.append([name for _, name in [*one, *others]])
    held_out = nearest(of_held_out, of_training, 1)[0][:, 0] if len(of_held_out) else distances.new_zeros(0)
    summary = _summary(distances[:, 0], held_out, len(of_training))
    return Neighbours(torch.stack(images), distances[closest], names, summary)


def _summary(of_samples: Float64[Tensor, " n"], of_held_out: Float64[Tensor, " r"], training: int) -> str:
    median = f"Median distance to the nearest of {training:,} training images: {of_samples.median():.3g} for "
    if not len(of_held_out):
        return f"{median}{len(of_samples):,} samples; the reference has no images to compare that with."
    share = (of_samples < of_held_out.quantile(_CLOSE)).double().mean()
    return (
        f"{median}{len(of_samples):,} samples, {of_held_out.median():.3g} for {len(of_held_out):,} held-out images. "
        f"{share:.1%} of the samples are closer than the closest {_CLOSE:.0%} of held-out images."
    )
