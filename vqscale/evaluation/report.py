"""report.html: everything an evaluation found, on one page that needs nothing else.

In: `Report`.  Out: HTML text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from torch import Tensor

from vqscale.evaluation import page
from vqscale.evaluation.figures import ERROR_FULL, curves_svg, error_map, png_bytes, usage_svg
from vqscale.evaluation.neighbours import Neighbours
from vqscale.evaluation.reconstructions import Examples
from vqscale.evaluation.scores import Score, is_of_curve, metric_of

# What the papers state. Grade P: read in the paper or the authors' code; S: transcribed by a secondary source. Values
# known from memory only are not listed. (what, value, grade, our key or "")
PAPER = (
    ("VQ-VAE-2, ImageNet 256: NLL top, validation", "3.41 nats per code", "S", "nll/top"),
    ("VQ-VAE-2, ImageNet 256: NLL top, training", "3.40 nats per code", "S", "nll_train/top"),
    ("VQ-VAE-2, ImageNet 256: NLL bottom, validation", "3.45 nats per code", "S", "nll/bottom"),
    ("VQ-VAE-2, ImageNet 256: NLL bottom, training", "3.45 nats per code", "S", "nll_train/bottom"),
    ("VQ-VAE-2, ImageNet 256: FID", "31.11", "S", "fid"),
    ("VQ-VAE-2, ImageNet 256: precision", "0.36", "S", "precision"),
    ("VQ-VAE-2, ImageNet 256: recall", "0.57", "S", "recall"),
    ("VQ-VAE-2, ImageNet 256: FID with classifier rejection", "about 10", "S", ""),
    ("VQ-VAE-2, ImageNet 256: IS with classifier rejection", "about 330", "S", ""),
    ("VQ-VAE-2, ImageNet 256: reconstruction FID", "about 10", "S", "reconstruction_fid"),
    ("VQ-VAE-2, ImageNet 256: CAS top-1", "54.83 %", "S", "cas_top1"),
    ("VQ-VAE-2, ImageNet 256: CAS top-5", "77.59 %", "S", "cas_top5"),
    ("the same, learned from reconstructions: top-1", "58.74 %", "S", "cas_top1/reconstructions"),
    ("the same, learned from reconstructions: top-5", "80.98 %", "S", "cas_top5/reconstructions"),
    ("the same, learned from real images: top-1", "73.09 %", "S", "cas_top1/real"),
    ("the same, learned from real images: top-5", "91.47 %", "S", "cas_top5/real"),
    ("VQ-VAE, CIFAR-10: bits per dimension (how it was computed was never published)", "4.67", "P", "bits_per_dim"),
)
_TILES = ("fid", "fd_lite0", "reconstruction_mse", "psnr", "nll", "used_codes", "precision", "recall")


@dataclass
class Report:
    """The content of a report. Images are uint8 [n, 3, R, R].

    samples: class name -> its images. examples: of reconstructions. usage: counts [K] per level. curves: run name ->
    lines of metrics.jsonl. provenance: one mapping per run or data set, with a `name`.
    """

    title: str
    subtitle: str
    scores: dict[str, Score]
    left_out: dict[str, str] = field(default_factory=dict)
    samples: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    examples: Examples | None = None
    usage: Mapping[str, np.ndarray] = field(default_factory=dict)
    curves: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    neighbours: Neighbours | None = None
    checks: Sequence[str] = ()
    provenance: Sequence[Mapping[str, Any]] = ()
    footer: str = ""


def render(report: Report) -> str:
    """The page. Parts without content say so instead of vanishing."""
    sections = [
        _summary(report),
        _samples(report),
        _reconstructions(report),
        _usage(report),
        _curves(report),
        _rejection(report),
        _neighbours(report),
        _paper(report),
        _provenance(report),
    ]
    return page.page(report.title, report.subtitle, _tiles(report), sections, report.footer)


def label_of(key: str) -> str:
    """A key of scores.json in words: `nll/top` -> `NLL, top`."""
    name, _, level = key.partition("/")
    return metric_of(name).label + (f", {level}" if level else "")


def format_value(key: str, value: float | None) -> str:
    """A value with as many digits as it deserves; a dash for null."""
    if value is None:
        return "–"
    if key.startswith("used_codes"):
        return f"{int(value):,}"
    if key.startswith("cas_"):
        return f"{100 * value:.2f} %"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3 if abs(value) >= 0.1 else 5
    return f"{value:,.{digits}f}"


def _tiles(report: Report) -> str:
    shown = [key for name in _TILES for key in report.scores if key.split("/")[0] == name and not is_of_curve(key)]
    return "".join(
        page.tile(format_value(key, score.value), with_unit(key))
        for key, score in ((key, report.scores[key]) for key in shown)
        if score.value is not None
    )


def with_unit(key: str) -> str:
    """`nll/top` -> `NLL, top, nats per code`."""
    unit = metric_of(key).unit
    return label_of(key) + (f", {unit}" if unit else "")


_FAMILIES = (
    ("samples", "Samples"),
    ("reconstruction", "Reconstructions"),
    ("nll", "Likelihood of the codes"),
    ("codes", "Codes"),
    ("cas", "Classification accuracy score"),
)
_ARROW = {"lower": " ↓", "higher": " ↑", "": ""}


def _summary(report: Report) -> tuple[str, str]:
    columns = ("Metric", "Value", "n", "Measured against", "Comparable with papers")
    body = "" if report.scores else "<p>No metric was computed.</p>"
    for family, title in _FAMILIES:
        shown = {key: s for key, s in report.scores.items() if metric_of(key).family == family and not is_of_curve(key)}
        rows = [_score_row(key, score) for key, score in shown.items()]
        if rows:
            body += f"<h3>{title}</h3>" + page.table(columns, _without_repeats(rows))
    if report.left_out:
        body += "<h3>Left out</h3>" + page.table(("Metrics", "Why"), _left_out_rows(report.left_out), value_column=None)
    note = (
        "Every number with the set it was measured against, the network behind it, and whether a paper's number may "
        "stand beside it; an empty cell says what the one above says. ↓ lower is better, ↑ higher is better."
    )
    if report.checks:
        lines = "".join(f"<li>{escape(line)}</li>" for line in report.checks)
        body += f"<h3>Checked before any number</h3><ul>{lines}</ul>"
    return page.section("Summary", body, note)


def _without_repeats(rows: list[list[str]]) -> list[list[str]]:
    """The long cells emptied where they repeat the row above: on a phone they would be most of the page."""
    shown, above = [], ["", ""]
    for row in rows:
        shown.append(row[:3] + ["" if cell == last else cell for cell, last in zip(row[3:], above, strict=True)])
        above = row[3:]
    return shown


def by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    """{why: the metrics left out for it}."""
    grouped: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


def _left_out_rows(left_out: Mapping[str, str]) -> list[list[str]]:
    return [
        [escape(", ".join(label_of(name) for name in names)), escape(reason)]
        for reason, names in by_reason(left_out).items()
    ]


def _score_row(key: str, score: Score) -> list[str]:
    against = escape(score.reference or "")
    if score.extractor:
        sha = escape((score.weights_sha256 or "")[:12])
        network = f'{escape(score.extractor)} <span class="hash">{sha}</span>'
        network += f", {escape(score.resize)}" if score.resize else ""
        against += f'<span class="note line">{network}</span>'
    verdict = '<span class="yes">yes</span>' if score.comparable_with_papers else '<span class="no">no</span>'
    reason = f'<span class="note">: {escape(score.reason)}</span>' if score.reason else ""
    name = escape(label_of(key)) + _ARROW[metric_of(key).better]
    unit = metric_of(key).unit
    name += f'<span class="note line">{escape(unit)}</span>' if unit else ""
    return [name, escape(format_value(key, score.value)), f"{score.n:,}", against, verdict + reason]


def _samples(report: Report) -> tuple[str, str]:
    rows = "".join(
        f'<div class="class"><h3>{escape(name)}</h3><div class="strip">'
        + "".join(page.zoomable(png_bytes(image), f"{name}, sample {n + 1}") for n, image in enumerate(images))
        + "</div></div>"
        for name, images in report.samples.items()
    )
    note = "The first samples of each class, not chosen. Click one to enlarge it."
    return page.section("Samples", rows or "<p>No samples were given.</p>", note if rows else "")


def _reconstructions(report: Report) -> tuple[str, str]:
    if (shown := report.examples) is None:
        return page.section(
            "Reconstructions", "<p>No VQ-VAE or no reference images were given, or none were to be shown.</p>"
        )
    trios = "".join(
        f'<figure class="trio"><div>{page.zoomable(png_bytes(original), "original")}'
        f"{page.zoomable(png_bytes(picture), 'reconstruction')}"
        f"{page.zoomable(png_bytes(error_map(original, picture)), 'error map')}</div>"
        f"<figcaption>{escape(name)}</figcaption></figure>"
        for original, picture, name in zip(shown.originals, shown.pictures, shown.names, strict=True)
    )
    note = (
        "Held-out images: original, reconstruction, and where they differ (mean absolute difference of the channels; "
        f"black is 0, the brightest is {ERROR_FULL} of 255 or more)."
    )
    return page.section("Reconstructions", f'<div class="trios">{trios}</div>', note)


def _usage(report: Report) -> tuple[str, str]:
    plots = "".join(
        page.plot(usage_svg(f"{name} level", counts), f"use of the {name} level's codes")
        for name, counts in report.usage.items()
    )
    note = "How often each code is used on held-out images, relative to uniform use (dashed)."
    body = f'<div class="plots">{plots}</div>' if plots else "<p>No codes were given.</p>"
    return page.section("Code usage", body, note if plots else "")


_GROUPS = (  # (title, log scale, names: a curve belongs to the first group that takes it)
    ("reconstruction", True, ("reconstruction_mse", "held_out/reconstruction_mse")),
    ("nats per code", False, ("nll/", "held_out/nll/")),
    ("code perplexity", False, ("perplexity/", "held_out/perplexity/")),
    ("accuracy", False, ("accuracy_", "held_out/accuracy_")),
    ("loss", True, ("loss",)),
)


def _curves(report: Report) -> tuple[str, str]:
    plots = []
    for run, lines in report.curves.items():
        keys = sorted({key for line in lines for key in line})
        for title, log, names in _GROUPS:
            series = {key: _series(lines, key) for key in keys if key.startswith(names)}
            if title == "loss" and any("nll/" in key or "reconstruction_mse" in key for key in keys):
                continue  # the loss of a prior is its NLL, that of a VQ-VAE is shown by its parts
            if series:
                level = _order0(report, series) if title == "nats per code" else None
                svg = curves_svg(f"{run}: {title}", series, log=log, level=level)
                plots.append(page.plot(svg, f"{run}: {title} over images seen"))
    body = f'<div class="plots">{"".join(plots)}</div>' if plots else "<p>No training run was given.</p>"
    return page.section("Curves", body, "From each run's metrics.jsonl." if plots else "")


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(line["images_seen"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
    return [float(x) for x, _ in points], [float(y) for _, y in points]


def _order0(report: Report, series: Mapping[str, Any]) -> float | None:
    level = next(iter(series)).rsplit("/", 1)[-1]
    score = report.scores.get(f"order0_entropy/{level}")
    return score.value if score else None


def _rejection(report: Report) -> tuple[str, str]:
    """The samples' metrics over acceptance rates: a plot for each, and all numbers."""
    found: dict[str, dict[float, Score]] = {}  # "<metric>/accepted" -> by rate
    for key in filter(is_of_curve, report.scores):
        name, _, rate = key.rpartition("_")
        found.setdefault(name, {})[float(rate)] = report.scores[key]
    if not found:
        return page.section(
            "Rejection", "<p>The samples were not judged: `vqscale sample rejection=RUN` stores what it needs.</p>"
        )
    plots = "".join(
        page.plot(_rate_svg(name, found), f"{label_of(name.split('/')[0])} over acceptance rates")
        for name in found
        if name.endswith("/accepted")
    )
    rates = sorted({rate for points in found.values() for rate in points}, reverse=True)
    columns = ("Acceptance", "n", *(_curve_label(name) for name in found))
    rows = [
        [f"{rate:.2f}", f"{next(p[rate].n for p in found.values() if rate in p):,}"]
        + [format_value(name, points[rate].value) if rate in points else "" for name, points in found.items()]
        for rate in rates
    ]
    note = (
        "Of every class the samples kept whose class a classifier is surest of (Razavi et al. 2019, section 3.4). A "
        "distance rises as n falls; dashed: as many samples kept at random."
    )
    return page.section("Rejection", f'<div class="plots">{plots}</div>' + page.table(columns, rows), note)


def _curve_label(name: str) -> str:
    metric, _, kind = name.partition("/")
    return label_of(metric) + (", at random" if kind == "random" else "")


def _rate_svg(name: str, found: Mapping[str, Mapping[float, Score]]) -> bytes:
    """One metric over the rates, its random twin dashed."""
    metric = name.split("/")[0]
    series = {}
    label = label_of(metric)
    for shown, key in ((label, name), (f"at random: {label}", f"{metric}/random")):
        points = [(rate, score.value) for rate, score in sorted(found.get(key, {}).items()) if score.value is not None]
        if points:
            series[shown] = ([rate for rate, _ in points], [value for _, value in points])
    return curves_svg(label, series, x_label="acceptance rate", twin="at random: ")


def _neighbours(report: Report) -> tuple[str, str]:
    title = "Nearest training images"
    if report.neighbours is None:
        return page.section(title, "<p>Not asked for: `vqscale evaluate … neighbours=12` looks for them.</p>")
    rows = "".join(
        '<figure class="near"><div>'
        + "".join(page.zoomable(png_bytes(image), name) for image, name in zip(images, names, strict=True))
        + f"</div><figcaption>{escape(names[0])}: {', '.join(f'{d:.3g}' for d in distances)}</figcaption></figure>"
        for images, names, distances in zip(
            report.neighbours.images,
            report.neighbours.names,
            report.neighbours.distances.tolist(),
            strict=True,
        )
    )
    note = (
        report.neighbours.summary + " Below, the samples that are closest: first the sample, then its nearest training "
        "images in feature space. A sample that was learned by heart would show its own twin."
    )
    return page.section(title, f'<div class="trios">{rows}</div>', note)


def _paper(report: Report) -> tuple[str, str]:
    rows = []
    for what, value, grade, key in PAPER:
        score = report.scores.get(key)
        ours = format_value(key, score.value) if score and score.value is not None else "not measured here"
        beside = "" if score is None else "yes" if score.comparable_with_papers else f"no: {score.reason}"
        rows.append([escape(what), escape(value), grade, escape(ours), escape(beside)])
    note = (
        "Grades: P, read in the paper's own text or the authors' code; S, transcribed by a secondary source. "
        "Ours stands beside it for orientation; the last column says whether it may be compared."
    )
    columns = ("Paper and metric", "Paper", "Grade", "This run", "Comparable")
    return page.section("The papers", page.table(columns, rows, value_column=3), note)


def _provenance(report: Report) -> tuple[str, str]:
    parts = []
    for about in report.provenance:
        rows = "".join(
            f"<tr><th>{escape(key)}</th><td><code>{escape(str(value))}</code></td></tr>"
            for key, value in about.items()
            if key not in ("name", "config")
        )
        config = f"<pre>{escape(str(about['config']))}</pre>" if about.get("config") else ""
        parts.append(
            f"<details><summary>{escape(str(about['name']))}</summary><table><tbody>{rows}</tbody></table>{config}</details>"
        )
    body = "".join(parts) or "<p>Nothing is known of where the inputs came from.</p>"
    return page.section("Provenance", body, "Configs, commits and fingerprints of everything that went in.")
