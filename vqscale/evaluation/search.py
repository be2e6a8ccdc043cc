"""The search for sampling options, as `vqscale tune_sampling` leaves it on disk: its lines, and its curves.

In: search.jsonl and tuned.json of such a run.  Out: `Line`s; charts for its own picture and the report of `evaluate`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale.evaluation.figures import Chart, is_number
from vqscale.files import read_json, read_jsonl

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


def search_charts(lines: Sequence[Line], objective: str) -> list[Chart]:
    """For each option and level the objective over its values, a curve per number of samples."""
    keys = dict.fromkeys(key for line in lines for key, value in line.setting.items() if is_number(value))
    names = {"fd": "Fréchet distance", "f1": "F1 of precision and recall"}
    charts = []
    for key in keys:
        curves = {f"{n:,} samples": _curve(lines, key, n, objective) for n in sorted({line.n for line in lines})}
        series = {name: (list(curve), list(curve.values())) for name, curve in curves.items() if len(curve) > 1}
        if series:
            charts.append(Chart(names[objective], series, x_label=key))
    return charts


def _curve(lines: Iterable[Line], key: str, n: int, objective: str) -> dict[float, float]:
    """Value -> objective, of the settings that are equal in all else; where there are several such, of the most."""
    groups: dict[str, dict[float, float]] = {}
    for line in (line for line in lines if line.n == n):
        rest = str({**line.setting, key: None})
        groups.setdefault(rest, {})[line.setting[key]] = getattr(line, objective)
    return dict(sorted(max(groups.values(), key=len, default={}).items()))


@dataclass(frozen=True)
class SearchResult:
    """For the report."""

    words: str
    charts: list[Chart]


def read_result(folder: Path) -> SearchResult | None:
    """Of the run in a folder; None where no search has finished there, or its tuned.json is damaged."""
    tuned, lines = read_json(folder / "tuned.json"), read_search(folder / "search.jsonl")
    try:
        return SearchResult(result_in_words(tuned), search_charts(lines, tuned["objective"]))
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def result_in_words(tuned: Mapping[str, Any]) -> str:
    """What tuned.json says of the best setting, against the defaults."""
    changed = [f"{key}={value}" for key, value in tuned["chosen"].items() if value != tuned["defaults"][key]]
    scores = tuned["scores"][tuned["objective"]]
    told = {name: "{value:.4g} ({low:.4g} to {high:.4g})".format(**score) for name, score in scores.items()}
    return (
        f"{' '.join(changed) or 'the defaults'}: {tuned['objective']} {told['chosen']}, of the defaults "
        f"{told['defaults']}, difference {told['difference']}; 95 % intervals, {tuned['samples']:,} samples, "
        f"against {tuned['reference']}"
    )
