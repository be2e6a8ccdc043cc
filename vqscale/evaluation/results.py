"""What an evaluation leaves behind: scores.json, the labelled grid, report.html, and a table on the terminal.

In: scores, inputs, what is to be shown.  Out: files in the run directory, each whole or not at all; the report last.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vqscale import runtime
from vqscale.data.cache import Cache
from vqscale.data.shards import Manifest
from vqscale.evaluation import report
from vqscale.evaluation.figures import grid_png, metrics_of_run
from vqscale.evaluation.gallery import first_of_each_class
from vqscale.evaluation.inputs import DataSet, EvaluateConfig, Inputs
from vqscale.evaluation.reconstructions import Examples
from vqscale.evaluation.samples import Neighbours
from vqscale.evaluation.scores import Score, Scores, is_of_curve
from vqscale.files import read_json, write_atomically, write_json
from vqscale.sources import Source


@dataclass
class Shown:
    """What the report shows besides the scores."""

    examples: Examples | None = None
    usage: dict[str, np.ndarray] = field(default_factory=dict)
    nll_by_class: dict[str, dict[str, float]] = field(default_factory=dict)  # level -> class -> nats per code
    neighbours: Neighbours | None = None
    checks: list[str] = field(default_factory=list)


def write_results(
    config: EvaluateConfig, run: runtime.Run, scores: Scores, inputs: Inputs, shown: Shown, cache: Cache
) -> None:
    """scores.json, samples.png, the picture and report.html."""
    write_json(run.run_dir / "scores.json", scores.as_json())
    samples = _shown_samples(config, inputs, cache)
    if samples or shown.examples:
        columns = (shown.examples.originals, shown.examples.pictures) if shown.examples else ((), ())
        originals, pictures = (list(column[: config.samples_shown]) for column in columns)
        for path in filter(None, (str(run.run_dir / "samples.png"), config.picture)):
            grid_png(path, originals=originals, reconstructions=pictures, samples=samples)
    name = Path(config.run_dir).resolve().parent.name
    text = report.render(
        report.Report(
            title=f"{name}: evaluation",
            subtitle=f"{time.strftime('%Y-%m-%d')} · {_subtitle(inputs)}",
            scores={key: Score(**value) for key, value in scores.as_json().items()},
            left_out=scores.left_out,
            samples=samples,
            examples=shown.examples,
            usage=shown.usage,
            neighbours=shown.neighbours,
            checks=shown.checks,
            curves={source.path.name: metrics_of_run(source.path) for source in inputs.sources()},
            provenance=_provenance(run, inputs),
            footer=f"Written by vqscale evaluate · {run.run_dir / 'scores.json'} has the same numbers.",
        )
    )
    write_atomically(run.run_dir / "report.html", text.encode())


def _subtitle(inputs: Inputs) -> str:
    parts = []
    if inputs.samples is not None:
        parts.append(f"{inputs.samples.n:,} samples of {len(inputs.samples.manifest.classes)} classes")
    if isinstance(inputs.reference, DataSet):
        parts.append(f"{inputs.reference.n:,} reference images")
    if inputs.vqvae is not None:
        grids = ", ".join(f"{name} {h}×{w}" for name, (h, w) in _grids(inputs.vqvae))
        parts.append(f"{inputs.vqvae.description['resolution']} px, K = {inputs.vqvae.model.num_codes}, {grids}")
    return " · ".join(parts) or "no inputs"


def _grids(source: Source) -> list[tuple[str, tuple[int, int]]]:
    return list(zip(source.model.level_names, source.model.grids, strict=True))


def _shown_samples(config: EvaluateConfig, inputs: Inputs, cache: Cache) -> dict[str, list[Tensor]]:
    if inputs.samples is None:
        return {}
    return first_of_each_class(
        inputs.samples.folder,
        inputs.samples.manifest,
        resolution=inputs.resolution_of(inputs.samples),
        per_class=config.samples_shown,
        most_classes=config.classes_shown,
        cache=cache,
    )


def _provenance(run: runtime.Run, inputs: Inputs) -> list[dict[str, Any]]:
    """Where everything came from: one mapping per run or data set."""
    facts = [_about_run(run.run_dir, "this evaluation")]
    for source in inputs.sources():
        about = {"fingerprint": source.fingerprint, "weights": source.weights, "images seen": source.images_seen}
        facts.append(_about_run(source.path, f"{source.description['kind']}: {source.path}", **about))
    for name, data in (("samples", inputs.samples), ("reference", inputs.reference), ("codes", inputs.codes)):
        if isinstance(data, DataSet):
            facts.append(_about_data(data.manifest, f"{name}: {data.folder}"))
    return facts


_OF_COMMAND = ("argv", "strategy", "world_size", "device", "precision", "git_commit", "versions")


def _about_run(path: Path, name: str, **facts: Any) -> dict[str, Any]:
    """What the files of a run, or of an exported folder, say; missing files are skipped."""
    command, status = read_json(path / "command.json"), runtime.read_status(path)
    about = {"name": name, "path": str(path), **facts}
    about |= {key.replace("_", " "): command[key] for key in _OF_COMMAND if command.get(key)}
    if status:
        about["state"] = status.get("state")
    config = path / "config.yaml"
    if config.is_file():
        about["config"] = config.read_text(errors="replace")
    return about


def _about_data(manifest: Manifest, name: str) -> dict[str, Any]:
    """What a data set says of itself; long parts of its description are left to dataset.json."""
    about: dict[str, Any] = {
        "name": name,
        "fingerprint": manifest.fingerprint,
        "kind": manifest.kind,
        "samples": manifest.num_samples,
        "shards": len(manifest.shards),
        "classes": len(manifest.classes),
        "transform": manifest.transform,
    }
    return about | {key: value for key, value in manifest.extra.items() if len(str(value)) < 400}


def print_table(scores: Scores) -> None:
    """The scores on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="scores", title_justify="left")
    for column, justify in (("metric", "left"), ("value", "right"), ("n", "right"), ("extractor", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for key, value in scores.as_json().items():
        if is_of_curve(key):
            continue
        score = Score(**value)
        shown = report.format_value(key, score.value)
        table.add_row(key, shown, f"{score.n:,}", score.extractor or "")
    console = Console()
    console.print(table)
    for reason, names in report.by_reason(scores.left_out).items():
        console.print(f"left out: {', '.join(names)}: {reason}", soft_wrap=True, markup=False, highlight=False)
