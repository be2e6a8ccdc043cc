"""What an evaluation leaves behind: scores.json, the labelled grid, report.html, and a table on the terminal.

In: scores, inputs, what is to be content.  Out: files in the run directory, each whole or not at all; the report last.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vqscale import runtime
from vqscale.data.cache import Cache
from vqscale.data.shards import Manifest
from vqscale.evaluation import report
from vqscale.evaluation.figures import grid_png, label_of_class, metrics_of_run
from vqscale.evaluation.gallery import first_of_each_class
from vqscale.evaluation.inputs import DataSet, EvaluateConfig, Inputs
from vqscale.evaluation.reconstructions import Examples
from vqscale.evaluation.samples import Neighbours
from vqscale.evaluation.scores import Score, Scores, is_of_curve
from vqscale.files import read_json, write_atomically, write_json
from vqscale.sources import Source
from vqscale.text import printable, redact_url


@dataclass
class Content:
    """What the report shows besides the scores."""

    examples: Examples | None = None
    usage: dict[str, np.ndarray] = field(default_factory=dict)
    nll_by_class: dict[str, dict[str, float]] = field(default_factory=dict)  # level -> class -> nats per code
    neighbours: Neighbours | None = None
    checks: list[str] = field(default_factory=list)


def write_results(
    config: EvaluateConfig, run: runtime.Run, scores: Scores, inputs: Inputs, content: Content, cache: Cache
) -> None:
    """scores.json, samples.png, the picture and report.html."""
    write_json(run.run_dir / "scores.json", scores.as_json())
    samples = _first_samples(config, inputs, cache)
    columns = (content.examples.originals, content.examples.pictures) if content.examples else ((), ())
    originals, pictures = (list(column[: config.samples_shown]) for column in columns)
    if samples or originals:
        labelled = _labelled(samples, inputs)
        for path in filter(None, (str(run.run_dir / "samples.png"), config.picture)):
            grid_png(path, originals=originals, reconstructions=pictures, samples=labelled)
    text = report.render(
        report.Report(
            title=_title(config, inputs),
            subtitle=f"{config.run_dir} · {time.strftime('%Y-%m-%d')} · {_subtitle(inputs)}",
            benchmark=benchmark_of(_classes(inputs)),
            scores={key: Score(**value) for key, value in scores.as_json().items()},
            left_out=scores.left_out,
            samples=samples,
            examples=content.examples,
            usage=content.usage,
            neighbours=content.neighbours,
            checks=content.checks,
            curves={source.path.name: metrics_of_run(source.path) for source in inputs.sources()},
            provenance=_provenance(run, inputs),
            footer=f"Written by vqscale evaluate · {run.run_dir / 'scores.json'} has the same numbers.",
        )
    )
    write_atomically(run.run_dir / "report.html", text.encode())


def _title(config: EvaluateConfig, inputs: Inputs) -> str:
    """The experiment, and the folder that its images came from."""
    experiment = Path(config.run_dir).resolve().parent.name
    extra = inputs.reference.manifest.extra if isinstance(inputs.reference, DataSet) else {}
    source = Path(str(extra.get("source", ""))).name
    return f"{experiment}: evaluation" + (f" on {source}" if source else "")


_CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


def benchmark_of(classes: Sequence[str]) -> str:
    """Whose data set has these classes: ImageNet | CIFAR-10 | "" for any other."""
    if len(classes) == 1000 and any(name.startswith(("n01440764", "tench")) for name in classes):
        return "ImageNet"
    return "CIFAR-10" if set(classes) == _CIFAR10 else ""


def _labelled(samples: Mapping[str, list[Tensor]], inputs: Inputs) -> dict[str, list[Tensor]]:
    """With the classes' names, or their numbers where a name cannot be drawn."""
    classes = _classes(inputs)
    numbers = {name: classes.index(name) if name in classes else 0 for name in samples}
    return {label_of_class(name, numbers[name]): images for name, images in samples.items()}


def _classes(inputs: Inputs) -> Sequence[str]:
    for data in (inputs.samples, inputs.reference):
        if isinstance(data, DataSet):
            return data.manifest.classes
    return inputs.vqvae.description["classes"] if inputs.vqvae else ()


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


def _first_samples(config: EvaluateConfig, inputs: Inputs, cache: Cache) -> dict[str, list[Tensor]]:
    if inputs.samples is None or not (config.samples_shown and config.classes_shown):
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
        table.add_row(key, report.format_value(key, score.value), f"{score.n:,}", score.extractor or "")
    console = Console()
    console.print(table)
    for reason, names in report.by_reason(scores.left_out).items():
        line = printable(redact_url(f"left out: {', '.join(names)}: {reason}"))
        console.print(line, soft_wrap=True, markup=False, highlight=False)
