"""The whole evaluation on one page that needs nothing else.

In: `Report`.  Out: HTML text. The layout is in report.html, the style in report.css; values and charts are made here.
"""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Int, UInt8
from markupsafe import Markup
from torch import Tensor

from vqscale.evaluation.figures import ERROR_FULL, Chart, chart_svg, error_map, png_bytes, series_of, usage_svg
from vqscale.evaluation.reconstructions import Examples
from vqscale.evaluation.samples import Neighbours
from vqscale.evaluation.scores import Score, is_of_curve, metric_of
from vqscale.text import printable_lines, redact_url

# What the papers state. Grade P: read in the paper or the authors' code; S: transcribed by a secondary source. Values
# known from memory only are not listed. (what, value, grade, our key or "")
_IMAGENET = (
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
)
_CIFAR10 = (
    ("VQ-VAE, CIFAR-10: bits per dimension (how it was computed was never published)", "4.67", "P", "bits_per_dim"),
)
PAPERS = {"ImageNet": _IMAGENET, "CIFAR-10": _CIFAR10}  # by benchmark


@dataclass
class Report:
    """The content of a report. Shapes: k codes, r pixels a side.

    samples: class name -> its images. usage: how often each code occurs, per level. curves: run name ->
    lines of metrics.jsonl. provenance: one mapping per run or data set, with a `name`.
    """

    title: str
    subtitle: str
    scores: dict[str, Score]
    benchmark: str = ""  # of PAPERS, when the data set is one
    left_out: dict[str, str] = field(default_factory=dict)
    samples: Mapping[str, Sequence[UInt8[Tensor, "3 r r"]]] = field(default_factory=dict)
    examples: Examples | None = None
    usage: Mapping[str, Int[np.ndarray, " k"]] = field(default_factory=dict)
    curves: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    neighbours: Neighbours | None = None
    search: tuple[str, Sequence[Chart]] | None = None  # of sampling options: in words, and curves
    checks: Sequence[str] = ()
    provenance: Sequence[Mapping[str, Any]] = ()
    footer: str = ""


def render(report: Report) -> str:
    """The page. Sections without content say so instead of vanishing."""
    return render_page(
        "report.html",
        report=report,
        tiles=_tiles(report.scores),
        families=_families(report.scores),
        left_out=by_reason(report.left_out),
        curves=_curves(report),
        rejection=(rejection := _rejection(report.scores)),
        rate_svg=lambda name: _rate_svg(name, rejection),
        papers=PAPERS.get(report.benchmark, ()),
        error_full=ERROR_FULL,
        error_map=error_map,
        usage_svg=usage_svg,
        chart_svg=chart_svg,
    )


def render_page(name: str, **values: Any) -> str:
    """The page of a template beside this module, which also has the filters below and `metric_of`."""
    filters: dict[str, Any] = {
        "brief": lambda text: text[:19] if text.startswith("sha256:") else shorten(redact_url(text), 300),
        "data_uri": data_uri,
        "label": label_of,
        "png": lambda image: data_uri(png_bytes(image), "image/png"),
        "rate_label": _rate_label,
        "value": lambda value, key: format_value(key, value),
        "with_interval": lambda score, key: format_score(key, score),
        "with_unit": with_unit,
    }
    path = Path(__file__).with_name(name)
    page = template(path, lambda text: printable_lines(redact_url(text)), filters, autoescape=True)
    return page.render(values, metric_of=metric_of)


def template(path: Path, harmless: Callable[[str], str], filters: Mapping[str, Any], **options: Any) -> jinja2.Template:
    """The jinja2 template in a file: what it prints goes through `harmless`, unless it is markup already."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        finalize=lambda value: value if isinstance(value, Markup) else harmless(str(value)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.filters |= filters
    return environment.get_template(path.name)


def data_uri(data: bytes, mime: str) -> Markup:
    """Bytes as an address that needs no network."""
    return Markup(f"data:{mime};base64,{base64.b64encode(data).decode()}")


def label_of(key: str) -> str:
    """A key of scores.json in words: `nll/top` -> `NLL, top`."""
    name, _, level = key.partition("/")
    return metric_of(name).label + (f", {level}" if level else "")


def with_unit(key: str) -> str:
    """`nll/top` -> `NLL, top, nats per code`."""
    unit = metric_of(key).unit
    return label_of(key) + (f", {unit}" if unit else "")


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


def format_score(key: str, score: Score) -> str:
    """Its value and, where there is one, its interval: 123.4 (118.0–128.8)."""
    if score.interval is None:
        return format_value(key, score.value)
    low, high = (format_value(key, bound) for bound in score.interval)
    return f"{format_value(key, score.value)} ({low}{' to ' if '-' in low else '–'}{high})"


def by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    """{why: the metrics left out for it}."""
    grouped: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


_TILES = ("fid", "fd_lite0", "fd_lite2", "reconstruction_mse", "psnr", "nll", "used_codes", "precision", "recall")


def _tiles(scores: Mapping[str, Score]) -> dict[str, Score]:
    keys = [key for name in _TILES for key in scores if key.split("/")[0] == name and not is_of_curve(key)]
    return {key: scores[key] for key in keys if scores[key].value is not None}


_FAMILIES = {
    "samples": "Samples",
    "reconstruction": "Reconstructions",
    "nll": "Likelihood of the codes",
    "codes": "Codes",
    "cas": "Classification accuracy score",
}


def _families(scores: Mapping[str, Score]) -> dict[str, dict[str, Score]]:
    """By title, those that have scores."""
    families: dict[str, dict[str, Score]] = {title: {} for title in _FAMILIES.values()}
    for key, score in scores.items():
        if not is_of_curve(key):
            families[_FAMILIES[metric_of(key).family]][key] = score
    return {title: family for title, family in families.items() if family}


_GROUPS = (  # (title, log scale, names: a curve belongs to the first group that takes it)
    ("reconstruction", True, ("reconstruction_mse", "held_out/reconstruction_mse")),
    ("Fréchet distance", True, ("held_out/reconstruction_f", "held_out/f")),
    ("nats per code", False, ("nll/", "held_out/nll/")),
    ("code perplexity", False, ("perplexity/", "held_out/perplexity/")),
    ("accuracy", False, ("accuracy_", "held_out/accuracy_")),
    ("loss", True, ("loss",)),
)


def _curves(report: Report) -> dict[str, bytes]:
    """{title: SVG}, a plot per run and group."""
    plots = {}
    for run, lines in report.curves.items():
        curves = dict(sorted(series_of(lines).items()))
        for title, log, names in _GROUPS:
            series = {key: curve for key, curve in curves.items() if key.startswith(names)}
            if title == "loss" and any("nll/" in key or "reconstruction_mse" in key for key in curves):
                continue  # the loss of a prior is its NLL, that of a VQ-VAE is shown by its terms
            if series:
                level = _order0(report, series) if title == "nats per code" else None
                plots[f"{run}: {title}"] = chart_svg(Chart(f"{run}: {title}", series, log, level))
    return plots


def _order0(report: Report, series: Iterable[str]) -> float | None:
    level = next(iter(series)).rsplit("/", 1)[-1]
    score = report.scores.get(f"order0_entropy/{level}")
    return score.value if score else None


def _rejection(scores: Mapping[str, Score]) -> dict[str, dict[float, Score]]:
    """`<metric>/accepted` and `<metric>/random` -> scores by acceptance rate."""
    by_name: dict[str, dict[float, Score]] = {}
    for key in filter(is_of_curve, scores):
        name, _, rate = key.rpartition("_")
        by_name.setdefault(name, {})[float(rate)] = scores[key]
    return by_name


def _rate_label(name: str) -> str:
    metric, _, kind = name.partition("/")
    return label_of(metric) + (", at random" if kind == "random" else "")


def _rate_svg(name: str, rejection: Mapping[str, Mapping[float, Score]]) -> bytes:
    """One metric over the rates, its random twin dashed."""
    metric = name.split("/")[0]
    label = label_of(metric)
    series = {}
    for line, key in ((label, name), (f"at random: {label}", f"{metric}/random")):
        points = {rate: s.value for rate, s in sorted(rejection.get(key, {}).items()) if s.value is not None}
        if points:
            series[line] = (list(points), list(points.values()))
    return chart_svg(Chart(label, series, x_label="acceptance rate", twin="at random: "))
