"""A run directory -> how it stands, its curves and its latest pictures, in the terminal, kept up to date; or a PNG.

Reads status.json, command.json, config.yaml and metrics.jsonl, so that it works on any machine that sees the folder,
on a finished run as well, and never touches the run.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vqscale.config import Request, peek, read_request
from vqscale.evaluation.figures import LOGARITHMIC, Chart, charts_png, is_number, metrics_of_run, series_of
from vqscale.fields import PathText, PositiveFloat
from vqscale.files import read_json
from vqscale.rundir import damage_of, read_status
from vqscale.text import format_duration, printable

USAGE = "RUN_DIR [--once] [--png FILE] [key=value ...]"
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # characters of a curve
_LAST_ROWS = "learning_rate gradient_norm images_per_second data_wait_fraction peak_gpu_bytes fd_seconds fd_fraction"
_COLOURS = {"running": "cyan", "done": "green", "stopped": "yellow", "failed": "red"}

Curves = dict[str, tuple[list[float], list[float]]]  # metric -> (images seen, values)


@dataclass(frozen=True)
class WatchConfig:
    """How to look."""

    once: bool = False  # show it once and end; without, until the run is done or has failed
    png: PathText = ""  # write the curves to this file, and end
    seconds: PositiveFloat = 2.0  # between two looks


Config = WatchConfig


def load(words: Sequence[str]) -> Request[WatchConfig]:
    """From `RUN_DIR key=value …`; see `read_request`."""
    return read_request(WatchConfig, words, f"watch {USAGE}", paths=1)


def main(
    request: Request[WatchConfig], console: Console | None = None, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Show the run. Raises FileNotFoundError where there is none, ValueError for a picture of a run without metrics."""
    config, (run_dir,) = request.config, request.paths
    if not (run_dir / "status.json").is_file():
        raise FileNotFoundError(
            f"{run_dir}: no run there (no status.json); a run directory is runs/<experiment>/<stage>"
        )
    if config.png:
        _write_png(run_dir, Path(config.png))
        return
    console = console or Console()
    if config.once:
        console.print(view(run_dir))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(view(run_dir), console=console, auto_refresh=False) as live:
        while read_status(run_dir).get("state") not in ("done", "failed"):
            sleep(config.seconds)
            live.update(view(run_dir), refresh=True)


def _write_png(run_dir: Path, path: Path) -> None:
    drawn = curves(metrics_of_run(run_dir))
    if not drawn:
        raise ValueError(f"{run_dir / 'metrics.jsonl'}: no metrics to draw yet")
    panels: dict[str, Curves] = {}
    for name, curve in drawn.items():
        family = name.removeprefix("held_out/").split("/")[0]  # held_out/nll/top -> nll
        panels.setdefault(family, {})[name] = curve
    charts = [Chart(family, series, log=family in LOGARITHMIC) for family, series in panels.items()]
    path.write_bytes(charts_png(charts))
    print(printable(f"{path}: {len(drawn)} curves of {run_dir}"))


def curves(lines: Iterable[Mapping[str, Any]]) -> Curves:
    """By metric, in the order in which to show them: what is trained, then what is held out, then how it runs."""
    series = series_of(lines, lambda value: is_number(value) or value != value)  # NaN is worth showing
    return dict(sorted(series.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[bool, bool, bool, str]:
    return name in _LAST_ROWS.split(), name.startswith("held_out/"), name != "loss", name


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """At most `width` characters, each the mean of its share of the values; lowest to highest, × for NaN."""
    count = min(width, len(values))
    edges = [n * len(values) // count for n in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = _extremes(means)
    steps = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join("×" if math.isnan(mean) else _BLOCKS[round((mean - low) * steps)] for mean in means)


def _extremes(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest of what is not NaN."""
    numbers = [value for value in values if not math.isnan(value)] or [math.nan]
    return min(numbers), max(numbers)


def view(run_dir: Path) -> RenderableType:
    """Everything, once."""
    lines = metrics_of_run(run_dir)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "over images seen"):
        table.add_column(column, no_wrap=True)
    for column in ("lowest", "highest", "last"):
        table.add_column(column, justify="right")
    for name, (_, y) in curves(lines).items():
        cells = [printable(name), sparkline(y), *(f"{value:.4g}" for value in (*_extremes(y), y[-1]))]
        table.add_row(*map(Text, cells))  # names are no markup
    return Group(_head(run_dir, lines), Text(), table, Text(), *_files(run_dir))


def _head(run_dir: Path, lines: Sequence[Mapping[str, Any]]) -> Text:
    head = Text(f"{printable(str(run_dir))}  ", style="bold")
    try:
        if damage := damage_of(run_dir):
            raise ValueError(damage)
        state, facts = _facts(run_dir, lines)
    except (ValueError, TypeError, OverflowError) as error:
        state, facts = "unreadable", [str(error)]
    head.append(printable(state), style=_COLOURS.get(state, ""))
    for fact in facts:
        head.append(f"\n{printable(fact)}", style="not bold")
    return head


def _facts(run_dir: Path, lines: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """(the state, lines about it). Raises ValueError or TypeError for entries of another kind."""
    status, command = read_status(run_dir), read_json(run_dir / "command.json")
    state, seen = str(status.get("state")), int(status.get("images_seen", 0))
    total = _total_images(run_dir)
    parts = [f"{seen:,} of {total:,} images ({seen / total:.0%})" if total else f"{seen:,} images"]
    speeds = (line.get("images_per_second") for line in reversed(lines))
    speed = next((speed for speed in speeds if is_number(speed) and speed > 0), 0.0)
    if speed:
        parts.append(f"{speed:,.4g} images/s")
    if speed and state == "running" and total > seen:
        parts.append(f"{format_duration((total - seen) / speed)} to go")
    if command:
        parts.append(f"{command.get('strategy')}, {command.get('world_size')} x {command.get('device')}")
    return state, [" · ".join(parts), *filter(None, [str(status.get("reason", ""))])]


def _total_images(run_dir: Path) -> int:
    path = run_dir / "config.yaml"
    return peek(path).total_images if path.is_file() else 0


def _files(run_dir: Path) -> list[Text]:
    """Where to look further: the latest picture, the report, the metrics."""
    pictures = sorted([*run_dir.glob("samples/*.png"), *run_dir.glob("*.png")], key=lambda path: path.stat().st_mtime)
    files = [("latest picture", pictures[-1])] if pictures else []
    files += [(what, run_dir / name) for what, name in (("report", "report.html"), ("metrics", "metrics.jsonl"))]
    return [Text(printable(f"{what}: {path}"), style="dim") for what, path in files if path.exists()]
