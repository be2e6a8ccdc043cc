"""Pictures: tensors and numbers -> PNG and SVG bytes, and the labelled grid as a file.

In: images, histograms, a run's metrics.  Out: bytes that a page can hold inside itself.

Shapes: h, w pixels; k codes.
"""

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vqscale.files import read_jsonl, replacing
from vqscale.text import printable

INK, MUTED, PAPER = "#1f2a37", "#6b7280", "#ffffff"
SERIES = ("#2b5c8a", "#c2703d", "#4d8060", "#8a5a8f", "#9a8430", "#b5485d", "#3f8fa3", "#6b6b6b", "#1d3557", "#e0a030")
LOGARITHMIC = ("loss", "reconstruction_mse", "commitment", "codebook_loss", "gradient_norm")  # metrics of such scale
ERROR_FULL = 64  # mean absolute difference, of 255, at which an error map is brightest
_GAP, _MARGIN = 6, 20


Picture = UInt8[Tensor, "3 h w"]
Pictures = Sequence[Picture] | UInt8[Tensor, "n 3 h w"]


def to_pil(image: Picture, scale: int = 1) -> Image.Image:
    """As a PIL image, each pixel a square of `scale`: crisp, never smoothed."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def png_bytes(image: Picture) -> bytes:
    """As a PNG."""
    out = io.BytesIO()
    to_pil(image).save(out, "PNG", optimize=True)
    return out.getvalue()


def error_map(original: Picture, reconstruction: Picture) -> Picture:
    """Where they differ: dark = equal, bright = off by ERROR_FULL or more."""
    from matplotlib import colormaps

    difference = (original.float() - reconstruction.float()).abs().mean(0) / ERROR_FULL
    colours = colormaps["magma"](difference.clamp(0, 1).numpy())[..., :3]
    return torch.from_numpy((colours * 255).round().astype(np.uint8)).permute(2, 0, 1)


def upscale_for(resolution: int) -> int:
    """How often to enlarge small images: 64 px and below become at least 128."""
    return max(1, 128 // resolution)


@lru_cache(1024)
def font_with(text: str) -> str | None:
    """The file of a font that has all characters of a text: the one that comes with matplotlib, or the machine's."""
    from matplotlib import font_manager, get_data_path
    from matplotlib.ft2font import FT2Font

    own = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    others = sorted({entry.fname for entry in font_manager.fontManager.ttflist if "LastResort" not in entry.fname})
    for path in (str(own), *others):
        with contextlib.suppress(OSError, RuntimeError):  # of a font that cannot be read
            if all(map(FT2Font(path).get_char_index, {ord(character) for character in text})):
                return path
    return None


def label_of_class(name: str, number: int) -> str:
    """The name as it can be drawn here, on one line, or the class's number."""
    name = printable(name)
    return name if font_with(f"{name}…") else f"class {number}"


def font(size: int, text: str = "") -> Any:
    """Sans-serif, the same on every machine unless the text needs another."""
    return ImageFont.truetype(font_with(text) or font_with("") or "", size)


Rows = Mapping[str, Pictures]  # label -> images


def grid_png(
    path: str | Path,
    *,
    originals: Pictures = (),
    reconstructions: Pictures = (),
    samples: Rows | None = None,
) -> None:
    """Write the labelled grid atomically: reconstructions beside originals, then samples, one class per row.

    `samples` maps labels of classes to images, which are square and of one size. Small images are enlarged without
    smoothing. Raises ValueError without any image.
    """
    examples = {"original": originals, "decoded": reconstructions} if len(originals) else {}
    blocks = {"Held-out images and their reconstructions": examples, "Samples by class": samples or {}}
    if not any(blocks.values()):
        raise ValueError(f"{path}: no images for a grid")
    picture = _compose({heading: rows for heading, rows in blocks.items() if rows})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)


def _compose(blocks: Mapping[str, Rows]) -> Image.Image:
    rows = [(_short(label), images) for block in blocks.values() for label, images in block.items()]
    resolution = rows[0][1][0].shape[-1]
    scale = upscale_for(resolution)
    side = resolution * scale
    heading = font(max(16, side // 7))
    fonts = {label: font(max(13, side // 9), label) for label, _ in rows}
    left = _MARGIN + max(int(fonts[label].getlength(label)) for label in fonts) + 14
    columns = max(len(images) for _, images in rows)
    line = 2 * heading.size
    width = left + columns * (side + _GAP) - _GAP + _MARGIN
    width = max(width, 2 * _MARGIN + max(int(heading.getlength(name)) for name in blocks))
    height = 2 * _MARGIN + len(blocks) * line + len(rows) * (side + _GAP) + (len(blocks) - 1) * _MARGIN
    canvas = Image.new("RGB", (width, height), PAPER)
    draw, y = ImageDraw.Draw(canvas), _MARGIN
    for name, block in blocks.items():
        draw.text((_MARGIN, y), name, INK, heading)
        y += line
        for label, images in block.items():
            draw.text((left - 14, y + side // 2), _short(label), MUTED, fonts[_short(label)], anchor="rm")
            for column, image in enumerate(images):
                canvas.paste(to_pil(image, scale), (left + column * (side + _GAP), y))
            y += side + _GAP
        y += _MARGIN
    return canvas


def _short(label: str, most: int = 22) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def usage_svg(name: str, counts: Int[np.ndarray, " k"]) -> bytes:
    """How often each code is used, codes sorted by use."""
    figure, (axes,) = _figure(5.2, 2.6)
    share = np.sort(counts)[::-1] / max(1, counts.sum()) * len(counts)
    # One filled outline: a bar per code would make thousands of shapes at K = 65,536.
    axes.fill_between(np.arange(len(share)), share, step="mid", color=SERIES[0], alpha=0.85, linewidth=0)
    axes.axhline(1, color=MUTED, linewidth=0.8, linestyle="--")
    _set_title(axes, name)
    axes.set(
        xlabel=f"codes, most used first (K = {len(counts)})",
        ylabel="use / uniform use",
        xlim=(0, max(1, len(share) - 1)),
        ylim=(0, None),
    )
    return _svg(figure)


def metrics_of_run(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that say when they were written; an exported model has none."""
    return [line for line in read_jsonl(path / "metrics.jsonl") if is_number(line.get("images_seen"))]


def is_number(value: Any) -> bool:
    """Whether a value from JSON can be drawn."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name -> (x, y)


def series_of(
    lines: Iterable[Mapping[str, Any]], takes: Callable[[Any], bool] = is_number
) -> dict[str, tuple[list[float], list[float]]]:
    """By metric its values over images seen, of the lines of `metrics_of_run`. takes: whether a value can be drawn."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "images_seen" and takes(value):
                x, y = series.setdefault(name, ([], []))
                x.append(float(line["images_seen"]))
                y.append(float(value))
    return series


@dataclass(frozen=True)
class Chart:
    """Curves over the images seen, or another `x_label`.

    log: whether on a logarithmic scale. level: a horizontal line, the order-0 entropy. twin: names that begin so are
    dashed. colours: by name, of curves whose names are shown elsewhere: the chart has no legend then.
    """

    title: str
    series: Series
    log: bool = False
    level: float | None = None
    x_label: str = "images seen"
    twin: str = "held_out/"
    colours: Mapping[str, str] = field(default_factory=dict)


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, as #rrggbb."""
    return {name: SERIES[n % len(SERIES)] for n, name in enumerate(names)}


def smoothed(curve: tuple[Sequence[float], Sequence[float]], most: int = 100) -> tuple[list[float], list[float]]:
    """At most so many points, each the mean of its share of the curve."""
    x, y = (np.array_split(np.asarray(values), min(most, len(values))) for values in curve)
    return [float(share.mean()) for share in x], [float(share.mean()) for share in y]


def chart_svg(chart: Chart) -> bytes:
    """One chart."""
    figure, (axes,) = _figure(5.2, 3.0)
    _plot(axes, chart)
    return _svg(figure)


def charts_png(charts: Sequence[Chart]) -> bytes:
    """Charts side by side, at most three in a row."""
    columns = min(3, len(charts))
    figure, grid = _figure(4.6, 2.8, -(-len(charts) // columns), columns)
    for axes, chart in zip(grid, charts, strict=False):
        _plot(axes, chart)
    for axes in grid[len(charts) :]:
        axes.set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _plot(axes: Any, chart: Chart) -> None:
    series, twin = chart.series, chart.twin
    colours = dict(chart.colours)  # a curve and its twin share a colour
    for name, (x, y) in sorted(series.items(), key=lambda item: item[0].startswith(twin)):
        is_twin = name.startswith(twin)
        colour = colours.setdefault(name.removeprefix(twin), SERIES[len(colours) % len(SERIES)])
        style: dict[str, Any] = {"linestyle": "--", "marker": "o"} if is_twin else {"marker": "o" if len(x) < 9 else ""}
        axes.plot(x, y, color=colour, linewidth=1.5, markersize=3.5, label=name, **style)
    if chart.level is not None:
        axes.axhline(chart.level, color=MUTED, linewidth=0.9, linestyle=":", label="order-0 entropy")
    _set_title(axes, chart.title)
    axes.set(xlabel=chart.x_label)
    values = [value for _, y in series.values() for value in y]
    # Over less than a decade, the ticks of a logarithmic scale only confuse.
    if chart.log and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 5))
    if not chart.colours and (len(series) > 1 or chart.level is not None):
        axes.legend(frameon=False, fontsize=8, loc="upper right")  # "best" may take seconds, and then warns


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of panels of this size in inches, and their axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b6bcc6")
        axes.tick_params(colors=MUTED, labelsize=8, which="both")
        axes.grid(axis="y", color="#e7eaee", linewidth=0.8)
        axes.set_axisbelow(True)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
            text.set_fontsize(9)
    return figure, grid


def _set_title(axes: Any, text: str) -> None:
    """As it is: a run's name may hold a $, or characters that no font here has."""
    from matplotlib.font_manager import FontProperties

    path = font_with(text)
    axes.set_title(text if path else text.encode("ascii", "replace").decode(), parse_math=False)
    if path and path != font_with(""):
        axes.title.set_fontproperties(FontProperties(fname=path, size=9))


def _svg(figure: Any) -> bytes:
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "vqscale"}):  # ids drawn from this, so that the same numbers give the same bytes
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
