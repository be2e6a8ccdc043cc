"""Several runs side by side on one page that needs nothing else.

In: `ComparedRun`s.  Out: HTML text; the layout is in compare.html. What cannot be read or compared is there with the
reason.  Shapes: r pixels a side.
"""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from vqscale.data.shards import Manifest, resolve
from vqscale.evaluation.classify import reconstructed
from vqscale.evaluation.figures import LOGARITHMIC, Chart, chart_svg, charts_png, colours_of, smoothed
from vqscale.evaluation.inputs import DataSet
from vqscale.evaluation.metrics import psnr
from vqscale.evaluation.reconstructions import spread
from vqscale.evaluation.report import render_page
from vqscale.evaluation.scores import METRICS, is_of_curve, metric_of
from vqscale.rundir import pipeline_order
from vqscale.sources import Source, load_model
from vqscale.text import one_line

_HELD_OUT = "held_out/"
_NOT_EXPORTED = "not exported"  # an exported folder knows little of its run, which is no difference
_ONLY_NAMES = ("run_dir", "experiment")  # facts that differ between any two runs and say nothing
_SAME = ("data", "tokenizer", "reference")  # inputs that runs of one stage share if what they measured compares
# Of a score; the rest says how it was measured.
_RESULTS = ("value", "interval", "comparable_with_papers", "reason", "protocol")


@dataclass(frozen=True)
class ComparedRun:
    """What the files of a run say. problem: why they cannot be read; the rest is empty then.

    stage: with the level of a prior. facts: dotted key -> text, of its config, `command.` and `inputs.` (fingerprints).
    metrics: (images seen, values) by name. scores: the objects of scores.json by key.
    """

    path: Path
    problem: str = ""
    stage: str = ""
    state: str = ""
    images_seen: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


Runs = Mapping[str, ComparedRun]  # of one stage, by the name on the page
Picture = tuple[UInt8[Tensor, "3 r r"], str, str]  # an image, what it is, its caption
Pictures = dict[str, list[Picture]]  # by row
Score = Mapping[str, Any]


def render(runs: Sequence[ComparedRun], *, data: str, images: int, samples: int, classes: int) -> str:
    """The page. data: whose held-out images are reconstructed, "" = those of the first VQ-VAE; images: how many;
    samples: how many of each of at most so many classes."""
    groups = grouped(runs)
    return render_page(
        "compare.html",
        subtitle=f"{len(runs)} runs · {', '.join(filter(None, groups))} · {time.strftime('%Y-%m-%d')}",
        groups=groups,
        warnings=[line for stage, group in groups.items() for line in warnings_of(stage, group)],
        differences=differences,
        curves={stage: plots for stage, group in groups.items() if (plots := _curves(group))},
        colours_of=colours_of,
        is_result=lambda metric: _place(metric) < 99,
        scores={stage: rows for stage, group in groups.items() if (rows := score_rows(group))},
        reconstructions=compare_reconstructions(groups.get("train_vqvae", {}), data, images),
        samples=compare_samples(groups.get("sample", {}), samples, classes),
    )


def held_out_png(runs: Sequence[ComparedRun], metrics: Collection[str]) -> bytes:
    """The held-out curves of these metrics, or of all that are no measure of speed, a chart for each and each stage.

    Raises ValueError where no run has one of them.
    """
    charts, present = [], set()
    for stage, group in grouped(runs).items():
        for metric in _metrics_of(group):
            series = {
                name: run.metrics[key] for name, run in group.items() if (key := _HELD_OUT + metric) in run.metrics
            }
            present |= {metric} if series else set()
            if series and (metric.split("/")[0] in metrics or not metrics):
                charts.append(Chart(f"{stage}: held-out {metric}", series, metric in LOGARITHMIC))
    if not charts:
        raise ValueError(f"metrics={list(metrics)}: no run has such held-out curves, there are {sorted(present)}")
    return charts_png(charts)


def grouped(runs: Sequence[ComparedRun]) -> dict[str, Runs]:
    """By stage in the order of the pipeline ("" where a run cannot be read), then by name: the parts of the paths that
    tell the runs of a stage apart."""
    paths = {run.path: Path(os.path.abspath(run.path)).parts for run in runs}
    head, groups = _common(paths.values()), dict[str, Runs]()
    for stage in sorted(
        {run.stage for run in runs}, key=lambda stage: (pipeline_order(stage.replace(" ", "_")), stage)
    ):
        parts = {paths[run.path][head:]: run for run in runs if run.stage == stage}
        tail = _common([path[::-1] for path in parts]) if len(parts) > 1 else min(1, len(next(iter(parts))) - 1)
        groups[stage] = {"/".join(path[: len(path) - tail]): run for path, run in parts.items()}
    return groups


def _common(paths: Collection[tuple[str, ...]]) -> int:
    """How many parts all paths begin with, fewer than any has."""
    return min(len(os.path.commonprefix(list(paths))), *(len(path) - 1 for path in paths))


def warnings_of(stage: str, runs: Runs) -> Iterator[str]:
    """A line for each input that runs of one stage do not share, so that what they measured does not compare."""
    for key in _SAME:
        users: dict[str, list[str]] = {}
        for name, run in runs.items():
            if fingerprint := run.facts.get(f"inputs.{key}"):
                users.setdefault(fingerprint, []).append(name)
        if len(users) > 1:
            each = "; ".join(f"{fingerprint[:19]} of {', '.join(names)}" for fingerprint, names in users.items())
            yield f"{stage}: not the same {key}: {each}. What these runs measured does not compare."


def differences(runs: Runs) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(facts that differ: key -> the text of each run; facts that all share: key -> text)."""
    keys = dict.fromkeys(key for run in runs.values() for key in run.facts if key not in _ONLY_NAMES)
    absent = {name: _NOT_EXPORTED if run.state == "exported" else "—" for name, run in runs.items()}
    rows = {key: [run.facts.get(key, absent[name]) for name, run in runs.items()] for key in keys}
    known = {key: list(dict.fromkeys(text for text in texts if text != _NOT_EXPORTED)) for key, texts in rows.items()}
    same = {key: texts[0] for key, texts in known.items() if len(texts) == 1}
    return {key: texts for key, texts in rows.items() if key not in same}, same


def _place(metric: str) -> int:
    """Where a metric of a run comes: loss and accuracy first, then in the order of scores; 99 for how the run ran."""
    places = {name: place for place, name in enumerate(METRICS)}
    return places.get(metric.split("/")[0], 0 if metric.startswith(("loss", "accuracy")) else 99)


def _curves(runs: Runs) -> dict[str, bytes]:
    """{metric: SVG}, all runs in each."""
    plots = {}
    for metric in _metrics_of(runs):
        series = {name: smoothed(run.metrics[metric]) for name, run in runs.items() if metric in run.metrics}
        twin = _HELD_OUT + metric
        series |= {_HELD_OUT + name: run.metrics[twin] for name, run in runs.items() if twin in run.metrics}
        plots[metric] = chart_svg(Chart(metric, series, metric in LOGARITHMIC, colours=colours_of(runs)))
    return plots


def _metrics_of(runs: Runs) -> list[str]:
    metrics = {key.removeprefix(_HELD_OUT) for run in runs.values() for key in run.metrics}
    return sorted(metrics, key=lambda metric: (_place(metric), metric))


# --- scores -----------------------------------------------------------------------------------------------------------


def score_rows(runs: Runs) -> dict[str, tuple[list[Score | None], set[int], str]]:
    """By key of scores.json, in the order of the table of metrics: the score of each run, and what `best_of` says."""
    keys = {key for run in runs.values() for key in run.scores if not is_of_curve(key)}
    order = sorted(keys, key=lambda key: (_place(key), key))
    columns = {key: [run.scores.get(key) for run in runs.values()] for key in order}
    return {key: (scores, *best_of(key, scores)) for key, scores in columns.items()}


def best_of(key: str, scores: Sequence[Score | None]) -> tuple[set[int], str]:
    """(which are best, what to know about them). None is, unless all values were measured in the same way."""
    measured = {n: score for n, score in enumerate(scores) if score and score["value"] is not None}
    ways = [_measured_how(score) for score in measured.values()]
    texts = {fact: list(dict.fromkeys(way.get(fact, "—") for way in ways)) for way in ways for fact in way}
    if differing := [f"{fact} {' and '.join(texts[fact])}" for fact in texts if len(texts[fact]) > 1]:
        return set(), f"not compared: {'; '.join(differing)}"
    better = {"lower": min, "higher": max}.get(metric_of(key).better)
    values = {score["value"] for score in measured.values()}
    if better is None or len(values) < 2:
        return set(), ""
    intervals = sorted(score["interval"] for score in measured.values() if score.get("interval"))
    overlap = any(low[1] >= high[0] for low, high in pairwise(intervals))
    best = {n for n, score in measured.items() if score["value"] == better(values)}
    return best, "intervals overlap" if overlap else ""


def _measured_how(score: Score) -> dict[str, str]:
    """Its facts as text. A reference is known by its fingerprint: the same images may lie in two folders."""
    facts = {fact: str(value) for fact, value in score.items() if fact not in _RESULTS and value is not None}
    folder, mark, rest = facts.get("reference", "").partition("sha256:")
    return facts | {"reference": mark + rest or folder}


# --- pictures ---------------------------------------------------------------------------------------------------------


def compare_reconstructions(runs: Runs, data: str, count: int) -> tuple[Pictures, dict[str, str]]:
    """(the first held-out images and what each VQ-VAE makes of them, {run: why it is left out}).

    The first run that can be loaded sets the resolution and, without `data`, the data set.
    """
    shared: list[tuple[Source, Pictures]] = []

    def reconstruct(name: str) -> list[Picture]:
        source = load_model(runs[name].path, "vqvae")
        if not shared:
            shared.append((source, _held_out(data or runs[name].facts.get("data", ""), source, count)))
        first, originals = shared[0]
        for key in ("resolution",) if data else ("resolution", "data"):
            ours, theirs = source.description.get(key), first.description.get(key)
            if ours != theirs:
                raise ValueError(f"its {key} is {ours}, that of {first.path} is {theirs}")
        images = torch.stack([image for image, *_ in originals["original"]])
        pictures = reconstructed(source.model, images)
        captions = [f"{value:.1f} dB" for value in psnr(pictures, images).tolist()]
        return list(zip(pictures, (what for _, what, _ in originals["original"]), captions, strict=True))

    rows, omitted = _each(runs if count else {}, reconstruct)
    return (shared[0][1] | rows if rows else {}), omitted


def _held_out(folder: str, source: Source, count: int) -> Pictures:
    if not folder:
        raise ValueError("an exported model does not say where its images are: data=DATASET does")
    data = _data_set(resolve(folder, "holdout"))
    chosen = dict(list(_positions(data).items())[:count])
    images = data.images_at(list(chosen.values()), source.description["resolution"])
    return {"original": [(image, ", ".join(one), "") for one, (image, _) in zip(chosen, images, strict=True)]}


def compare_samples(runs: Runs, per_class: int, classes: int) -> tuple[dict[str, Pictures], dict[str, str]]:
    """({class: the first samples whose key and class are in all runs}, {run: why it is left out})."""
    positions, omitted = _each(runs, lambda name: _positions(_data_set(runs[name].path)))
    ids: dict[str, list[tuple[str, str]]] = {}
    for one in next(iter(positions.values()), {}):
        if all(one in others for others in positions.values()):
            ids.setdefault(one[0], []).append(one)
    chosen = [list(ids)[n] for n in spread(len(ids), classes if per_class else 0).tolist()]
    asked = [one for label in chosen for one in ids[label][:per_class]]

    def images(name: str) -> list[tuple[str, Picture]]:
        data = _data_set(runs[name].path)
        read = data.images_at([positions[name][one] for one in asked], data.manifest.transform["resolution"])
        return [(label, (image, key, "")) for (label, key), (image, _) in zip(asked, read, strict=True)]

    drawn, damaged = _each(positions, images)
    pictures = {c: {name: [one for label, one in drawn[name] if label == c] for name in drawn} for c in chosen}
    return (pictures if drawn else {}), omitted | damaged


def _each(names: Mapping[str, Any], make: Callable[[str], Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """({name: what is made of it}, {name: why nothing can be})."""
    made, omitted = {}, {}
    for name in names:
        try:
            made[name] = make(name)
        except (OSError, ValueError, LookupError) as error:
            omitted[name] = one_line(error)
    return made, omitted


def _data_set(folder: Path) -> DataSet:
    return DataSet(str(folder), folder, Manifest.load(folder))


def _positions(data: DataSet) -> dict[tuple[str, str], int]:
    """{(class, key): position} in stored order."""
    indexes = [data.manifest.index(data.folder, shard) for shard in range(len(data.manifest.shards))]
    pairs = [(data.manifest.classes[label], key) for i in indexes for label, key in zip(i.labels, i.keys, strict=True)]
    return {pair: position for position, pair in enumerate(pairs)}
