"""scores.json: every number with what must be known to trust it.

In: values as they are computed.  Out: one object per metric, in a fixed order; the metrics left out, and why.
"""

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vqscale.evaluation.features import Extractor
from vqscale.evaluation.intervals import interval
from vqscale.evaluation.metrics import TooFew
from vqscale.evaluation.protocols import Standing


@dataclass(frozen=True)
class Metric:
    """A metric's name on the page, what it is measured in, which way is better, and what it needs."""

    key: str
    label: str
    unit: str
    better: str  # lower | higher | ""
    family: str  # samples | reconstruction | codes | nll | cas
    features: str = ""  # the extractor that it is named after, or `any`; "" = it needs no features


_TABLE = (
    ("fid", "FID", "", "lower", "samples", "inception"),
    ("sfid", "sFID (spatial features)", "", "lower", "samples", "inception"),
    ("fd_lite0", "FD-lite0", "", "lower", "samples", "lite0"),
    ("fd_lite2", "FD-lite2", "", "lower", "samples", "lite2"),
    ("kid", "KID", "", "lower", "samples", "any"),
    ("inception_score", "Inception score", "", "higher", "samples", "any"),
    ("precision", "Precision", "", "higher", "samples", "any"),
    ("recall", "Recall", "", "higher", "samples", "any"),
    ("density", "Density", "", "higher", "samples", "any"),
    ("coverage", "Coverage", "", "higher", "samples", "any"),
    ("reconstruction_mse", "Reconstruction MSE", "in [-1, 1] units", "lower", "reconstruction"),
    ("psnr", "Reconstruction PSNR", "dB", "higher", "reconstruction"),
    ("ssim", "Reconstruction SSIM", "", "higher", "reconstruction"),
    ("lpips", "Reconstruction LPIPS", "", "lower", "reconstruction"),
    ("reconstruction_fid", "Reconstruction FID", "", "lower", "reconstruction", "inception"),
    ("reconstruction_fd_lite0", "Reconstruction FD-lite0", "", "lower", "reconstruction", "lite0"),
    ("reconstruction_fd_lite2", "Reconstruction FD-lite2", "", "lower", "reconstruction", "lite2"),
    ("nll", "NLL", "nats per code", "lower", "nll"),
    ("bits_per_code", "NLL", "bits per code", "lower", "nll"),
    ("nll_shuffled_class", "NLL with shuffled classes", "nats per code", "", "nll"),
    ("nll_shuffled_upper", "NLL with shuffled upper codes", "nats per code", "", "nll"),
    ("nll_train", "NLL on training codes", "nats per code", "", "nll"),
    ("order0_entropy", "Order-0 entropy", "nats per code", "", "codes"),
    ("perplexity", "Code perplexity", "codes", "higher", "codes"),
    ("used_codes", "Used codes", "codes", "higher", "codes"),
    ("bits_per_dim", "Bits per dimension, codes only", "bits", "lower", "nll"),
    ("cas_top1", "CAS top-1", "", "higher", "cas"),
    ("cas_top5", "CAS top-5", "", "higher", "cas"),
    ("class_accuracy", "Class accuracy of samples", "", "higher", "cas"),
)
METRICS = {row[0]: Metric(*row) for row in _TABLE}
_RANGES = {  # of values, where it is not 0 and more
    "kid": (-math.inf, math.inf),
    "inception_score": (1, math.inf),
    "ssim": (-1, 1),
    **dict.fromkeys(("precision", "recall", "coverage"), (0, 1)),
}


def keys_of(family: str) -> list[str]:
    """The keys of a family's metrics, in the table's order."""
    return [metric.key for metric in METRICS.values() if metric.family == family]


@dataclass(frozen=True)
class Score:
    """One number. `value` is None where it is not defined, and then `reason` says why.

    n: images it is computed from. reference: the set it is measured against. extractor, weights_sha256, resize: the
    network behind it, None without one. reason: why value is null, or why it can't be compared with papers. protocol:
    the one that decides this, None where papers have none. preparation: of the reference images, in words. interval:
    of 95 %, over other images of the same kind and number; None where it is not computed.
    """

    value: float | None
    n: int
    reference: str | None = None
    extractor: str | None = None
    weights_sha256: str | None = None
    resize: str | None = None
    comparable_with_papers: bool = False
    reason: str = ""
    protocol: str | None = None
    preparation: str | None = None
    interval: tuple[float, float] | None = None


def metric_of(key: str) -> Metric:
    """The metric behind a key of scores.json, without its level."""
    return METRICS[key.split("/")[0]]


def is_of_curve(key: str) -> bool:
    """Whether a key is a point of the curve over acceptance rates, which the report shows in a plot."""
    return key.partition("/")[2].startswith(("accepted_", "random_"))


class Scores:
    """Collects scores; knows which metrics were asked for by name, so that a missing input is an error for those."""

    def __init__(self, asked: Sequence[str] = ()):
        """asked: the names to compute; none = all of them. Raises ValueError naming the nearest known one."""
        for name in asked:
            if name not in METRICS:
                near = difflib.get_close_matches(name.split("/")[0], METRICS, n=1, cutoff=0.0)[0]
                raise ValueError(f"metrics: unknown metric {name}; did you mean {near}?")
        self._chosen = set(asked or METRICS)
        self._by_name = bool(asked)
        self.by_key: dict[str, Score] = {}
        self.left_out: dict[str, str] = {}

    def wants(self, *names: str) -> bool:
        """Whether any of these metrics is to be computed."""
        return any(name in self._chosen for name in names)

    def pending(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are to be computed and have not been left out."""
        return [name for name in names if name in self._chosen and name not in self.left_out]

    def put(self, key: str, score: Score) -> None:
        """Record a score if it is to be computed; `key` may end in a level. A value that is no number becomes null."""
        if score.value is not None and not math.isfinite(score.value):
            why = f"the computed value is {score.value}"
            score = dataclasses.replace(score, value=None, comparable_with_papers=False, reason=why)
        score = dataclasses.replace(score, interval=_possible_part(key, score))
        if self.wants(key.split("/")[0]):
            self.by_key[key] = score

    def leave_out(self, names: Iterable[str], reason: str) -> None:
        """These can't be computed; the first reason stays. Raises ValueError if one of them was asked for by name."""
        for name in self.pending(names):
            if self._by_name:
                raise ValueError(f"metrics={name} cannot be computed: {reason}")
            self.left_out[name] = reason

    def leave_out_level(self, name: str, level: str, reason: str) -> None:
        """One level of a metric can't be computed, while others can: never an error."""
        if self.wants(name):
            self.left_out[f"{name}/{level}"] = reason

    def in_order(self) -> dict[str, Score]:
        """The scores in the order of the table of metrics."""
        order = list(METRICS)
        keys = sorted(self.by_key, key=lambda key: order.index(key.split("/")[0]))  # stable: levels stay top first
        return {key: self.by_key[key] for key in keys}

    def as_json(self) -> dict[str, Any]:
        """The content of scores.json."""
        return {key: dataclasses.asdict(score) for key, score in self.in_order().items()}


def _possible_part(key: str, score: Score) -> tuple[float, float] | None:
    """The interval without what lies outside the metric's range; None if it or the value is not finite."""
    if score.value is None or score.interval is None or not all(map(math.isfinite, score.interval)):
        return None
    least, most = _RANGES.get(key.split("/")[0], (0, math.inf))
    return max(least, score.interval[0]), min(most, score.interval[1])


def score_or_null(
    compute: Callable[[], float],
    n: int,
    reference: str | None,
    extractor: Extractor | None,
    standing: Standing,
    error: Callable[[], float] | None = None,
) -> Score:
    """A score; where there are too few images, one without a value. error: the standard error, for the interval."""
    value, reason = None, standing.reason
    try:
        value = float(compute())
    except TooFew as few:
        reason = str(few)
    name, sha256, resize = (extractor.name, extractor.weights_sha256, extractor.resize) if extractor else (None,) * 3
    rest = standing.protocol, standing.preparation
    between = None
    if value is not None and error is not None:
        with contextlib.suppress(TooFew):
            between = interval(value, error())
    return Score(value, n, reference, name, sha256, resize, not reason, reason, *rest, interval=between)
