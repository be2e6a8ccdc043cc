"""The search for sampling options, `vqscale tune_sampling`: how settings are measured, its lines on disk, its curves.

In: features; search.jsonl and tuned.json of such a run.  Out: `Line`s, `SettingScores`; charts for the run's own
picture and the report of `evaluate`.  Shapes: m generated and n real images, f features.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vqscale.evaluation import intervals
from vqscale.evaluation.figures import Chart, is_number
from vqscale.evaluation.metrics import frechet, precision_recall
from vqscale.evaluation.statistics import FeatureSet
from vqscale.files import read_json, read_jsonl

SettingScores = dict[str, dict[str, dict[str, float]]]  # metric -> chosen, defaults, difference -> value, low, high
Setting = dict[str, Any]  # "temperature.top" -> its value, of every option and level that is searched


@dataclass(frozen=True)
class Line:
    """One setting, measured on samples 0 … n - 1 against the training images."""

    n: int
    setting: Setting
    fd: float
    precision: float
    recall: float
    f1: float


def read_search(path: Path) -> list[Line]:
    """The lines of search.jsonl in the order in which they were measured; none where there is no file."""
    return [Line(**line) for line in read_jsonl(path) if line.keys() == Line.__dataclass_fields__.keys()]


def shares(generated: Float[Tensor, "m f"], real: Float[Tensor, "n f"]) -> tuple[float, float, float]:
    """Precision, recall, and their harmonic mean F1 (0 where both are 0), of features [m, f] and [n, f]."""
    precision, recall = precision_recall(generated, real)
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)


def compare_settings(chosen: FeatureSet, defaults: FeatureSet, real: FeatureSet, seed: int) -> SettingScores:
    """fd, precision, recall and f1 of both, and chosen less defaults, each with a 95 % interval.

    Both are of the same sample ids and are measured against the same images: what these vary by goes out of the
    difference.
    """
    sets, theirs = (chosen, defaults), real.gaussians["pooled"]
    each = [intervals.frechet_influences(one.gaussians["pooled"], theirs, one.features, real.features) for one in sets]
    each.append((each[0][0] - each[1][0], each[0][1] - each[1][1]))
    errors = [math.hypot(*map(intervals.error_of_mean, pair)) for pair in each]
    scores = {"fd": _three([frechet(one, real) for one in sets], errors)}

    def both(generated: Tensor, images: Tensor) -> list[float]:
        first, second = map(shares, generated.chunk(2, dim=1), images.chunk(2, dim=1))
        return [*first, *second, *(a - b for a, b in zip(first, second, strict=True))]

    pairs = torch.cat((chosen.features, defaults.features), dim=1), real.features.repeat(1, 2)
    values, errors = both(*pairs), intervals.errors_by_halves(both, *pairs, seed)
    names = enumerate(("precision", "recall", "f1"))
    return scores | {name: _three(values[place:6:3], errors[place::3]) for place, name in names}


def _three(values: Sequence[float], errors: Sequence[float]) -> dict[str, dict[str, float]]:
    """Of two values, their difference and the standard errors of all three."""
    three = zip(("chosen", "defaults", "difference"), [*values, values[0] - values[1]], errors, strict=True)
    ends = {name: (value, *intervals.interval(value, error)) for name, value, error in three}
    return {name: {"value": value, "low": low, "high": high} for name, (value, low, high) in ends.items()}


def search_charts(lines: Sequence[Line], objective: str) -> list[Chart]:
    """For each option and level the objective over its values, a curve per number of samples."""
    keys = dict.fromkeys(key for line in lines for key, value in line.setting.items() if is_number(value))
    title = {"fd": "Fréchet distance", "f1": "F1 of precision and recall"}[objective]
    series = {key: _series(lines, key, objective) for key in keys}
    return [Chart(title, curves, x_label=key) for key, curves in series.items() if curves]


def _series(lines: Sequence[Line], key: str, objective: str) -> dict[str, tuple[list[float], list[float]]]:
    curves = {n: _curve(lines, key, n, objective) for n in sorted({line.n for line in lines})}
    return {f"{n:,} samples": (list(curve), list(curve.values())) for n, curve in curves.items() if len(curve) > 1}


def _curve(lines: Iterable[Line], key: str, n: int, objective: str) -> dict[float, float]:
    """Value -> objective, of the settings that are equal in all else; where there are several such, of the most."""
    groups: dict[str, dict[float, float]] = {}
    for line in (line for line in lines if line.n == n):
        groups.setdefault(str({**line.setting, key: None}), {})[line.setting[key]] = getattr(line, objective)
    return dict(sorted(max(groups.values(), key=len, default={}).items()))


def read_result(folder: Path) -> tuple[str, list[Chart]] | None:
    """Of the run in a folder, in words and curves; None where no search has finished."""
    tuned, lines = read_json(folder / "tuned.json"), read_search(folder / "search.jsonl")
    return (result_in_words(tuned), search_charts(lines, tuned["objective"])) if "scores" in tuned else None


def result_in_words(tuned: Mapping[str, Any]) -> str:
    """What tuned.json says of the best setting, against the defaults."""
    changed = [f"{key}={value}" for key, value in tuned["chosen"].items() if value != tuned["defaults"][key]]
    scores = tuned["scores"][tuned["objective"]]
    ours, theirs, difference = ("{value:.4g} ({low:.4g} to {high:.4g})".format(**score) for score in scores.values())
    name = f"{' '.join(changed) or 'the defaults'}: {tuned['objective']}"
    words = f"{name} {ours}, of the defaults {theirs}, difference {difference}; 95 % intervals"
    return f"{words}, {tuned['samples']:,} samples, against {tuned['reference']}"
