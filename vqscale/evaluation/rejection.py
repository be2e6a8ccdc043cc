"""Classifier-based rejection sampling: keep the samples whose class a classifier is surest of, and see what it buys.

In: features of samples, the probability that was stored with each of them.  Out: a curve of metrics over acceptance
rates (Razavi et al. 2019, section 3.4 and figure 7), beside it the distance of as many samples kept at random: a
Fréchet distance of fewer images is larger for that reason alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.data.parts import read_samples
from vqscale.evaluation import metrics
from vqscale.evaluation.classify import CLASS_PROBABILITY
from vqscale.evaluation.families import Bench, once, score_or_null
from vqscale.evaluation.features import Extractor
from vqscale.evaluation.inputs import DataSet
from vqscale.evaluation.moments import Gaussian, frechet_distance, moments_of
from vqscale.evaluation.statistics import FeatureSet
from vqscale.seeding import key_of, mix, uniform

RATES = (1.0, 0.7, 0.5, 0.3, 0.1, 0.05)  # of acceptance
DISTANCES = ("fid", "fd_lite0")
CURVES = (*DISTANCES, "inception_score", "precision", "recall")
_PART = "a part of the samples, chosen by a classifier that papers did not use"


@dataclass(frozen=True)
class Judged:
    """What is known of every sample besides its pixels: probability of its class float64 [n], class int64 [n]."""

    probability: Tensor
    label: Tensor


def check_rates(rates: Sequence[float]) -> None:
    """Raises ValueError for a rate that is no share."""
    for rate in rates:
        if not 0 < rate <= 1:
            raise ValueError(f"acceptance={list(rates)}: {rate} is not above 0 and at most 1")


def check_networks(data: DataSet, extractor: Extractor) -> None:
    """The network that rejects must not be the one that scores: samples would be chosen for the score itself.

    Raises ValueError naming it.
    """
    judge = data.manifest.extra.get("rejection") or {}
    if judge.get("features_sha256") == extractor.weights_sha256:
        raise ValueError(
            f"samples={data.name}: judged on features of {judge['features']} {extractor.weights_sha256[:12]}, the very "
            f"network that extractor={extractor.name} scores with; choose another, or acceptance=[] for no curve"
        )


def read_judged(data: DataSet) -> Judged | None:
    """What `vqscale sample rejection=…` stored with the samples; None where it stored nothing.

    Raises ValueError for a sample that lacks it.
    """
    if not data.manifest.extra.get("rejection"):
        return None
    probabilities, labels = [], []
    for key, label, parts in read_samples(data.folder, ["json"]):
        try:
            probabilities.append(float(json.loads(parts["json"])[CLASS_PROBABILITY]))
        except (KeyError, ValueError, TypeError):
            raise ValueError(
                f"samples={data.name}: {key} has no {CLASS_PROBABILITY}, though the data set says so"
            ) from None
        labels.append(label)
    return Judged(torch.tensor(probabilities, dtype=torch.float64), torch.tensor(labels))


def kept_rows(judged: Judged, rate: float, *, seed: int | None = None) -> Tensor:
    """Rows, increasing: of every class the share `rate` (at least one) that is likeliest, or with a `seed` any."""
    order = judged.probability
    if seed is not None:
        shuffle = mix(seed, key_of("random share"))
        order = torch.tensor([uniform(shuffle, row) for row in range(len(order))], dtype=torch.float64)
    rows = []
    for label in judged.label.unique():
        of_class = (judged.label == label).nonzero().flatten()
        count = max(1, round(rate * len(of_class)))
        rows.append(of_class[order[of_class].argsort(descending=True, stable=True)[:count]])
    return torch.cat(rows).sort().values


def score_rejection(
    bench: Bench,
    judged: Judged,
    generated: FeatureSet,
    real: FeatureSet,
    reference: str,
    rates: Sequence[float],
    seed: int,
) -> None:
    """The samples' metrics at every rate, as `<metric>/accepted_<rate>`, and `<distance>/random_<rate>` beside them."""
    if not bench.topology.is_main:
        return
    judged = Judged(judged.probability[: len(generated.features)], judged.label[: len(generated.features)])
    for rate in sorted(rates, reverse=True):
        _score_rows(bench, f"accepted_{rate:.2f}", kept_rows(judged, rate), generated, real, reference)
        if rate < 1:
            rows = kept_rows(judged, rate, seed=seed)
            _score_rows(bench, f"random_{rate:.2f}", rows, generated, real, reference, only=DISTANCES)


def _score_rows(
    bench: Bench,
    name: str,
    rows: Tensor,
    generated: FeatureSet,
    real: FeatureSet,
    reference: str,
    only: Sequence[str] = CURVES,
) -> None:
    features, logits = generated.features[rows], generated.logits[rows]
    pair = once(lambda: metrics.precision_recall(features, real.features))
    compute = {
        **dict.fromkeys(DISTANCES, lambda: _distance(features, real.gaussian)),
        "inception_score": lambda: metrics.inception_score(logits),
        "precision": lambda: pair()[0],
        "recall": lambda: pair()[1],
    }
    for metric in (m for m in only if bench.scores.wants(m) and m not in bench.scores.left_out):
        score = score_or_null(compute[metric], len(rows), reference, bench.extractor, _PART)
        bench.scores.put(f"{metric}/{name}", score)


def _distance(features: Tensor, real: Gaussian | None) -> float:
    if len(features) < 2 or real is None:
        raise metrics.TooFew(f"a covariance needs at least 2 images, there are {len(features)}")
    return frechet_distance(moments_of(features), real)
