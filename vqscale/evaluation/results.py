"""What an evaluation leaves behind: scores.json, the labelled grid, report.html, and a table on the terminal.

In: a `Bench`, the inputs, what the families of metrics found.  Out: files in the run directory, each whole or not at
all; the report last.  Shapes: r pixels a side.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from vqscale.data.shards import Manifest
from vqscale.evaluation import report
from vqscale.evaluation.codes import CodeResults
from vqscale.evaluation.figures import grid_png, label_of_class, metrics_of_run
from vqscale.evaluation.inputs import DataSet, EvaluateConfig, Inputs
from vqscale.evaluation.passes import Bench
from vqscale.evaluation.protocols import benchmark_of
from vqscale.evaluation.reconstructions import Examples, ReconstructionResults
from vqscale.evaluation.samples import SampleResults
from vqscale.evaluation.scores import Scores, is_of_curve
from vqscale.evaluation.search import read_result
from vqscale.files import read_json, write_atomically, write_json
from vqscale.rundir import read_status
from vqscale.text import printable, redact_url

_MOST_SHARDS = 1000  # whose labels are read to choose the samples that the report shows


@dataclass(frozen=True)
class Results:
    """What the families of metrics leave for the report, besides scores."""

    samples: SampleResults
    reconstructions: ReconstructionResults
    codes: CodeResults


def write_results(bench: Bench, inputs: Inputs, results: Results) -> None:
    """scores.json, nll_by_class.json, samples.png, the picture and report.html."""
    config, run_dir, scores = bench.config, bench.run.run_dir, bench.scores
    write_json(run_dir / "scores.json", scores.as_json())
    if results.codes.nll_by_class:
        write_json(run_dir / "nll_by_class.json", results.codes.nll_by_class)
    else:
        (run_dir / "nll_by_class.json").unlink(missing_ok=True)
    samples, examples = _first_samples(bench, inputs), results.reconstructions.examples
    _write_pictures(bench, inputs, samples, examples)
    page = report.render(
        report.Report(
            title=_title(config, inputs),
            subtitle=f"{config.run_dir} · {time.strftime('%Y-%m-%d')} · {_subtitle(inputs)}",
            benchmark=benchmark_of(_classes(inputs)),
            scores=scores.in_order(),
            left_out=scores.left_out,
            samples=samples,
            examples=examples,
            usage=results.codes.usage,
            neighbours=results.samples.neighbours,
            search=read_result(Path(config.tuning)),
            checks=results.samples.checks,
            curves={model.path.name: metrics_of_run(model.path) for model in inputs.models.values()},
            provenance=_provenance(run_dir, inputs),
            footer=f"Written by vqscale evaluate · {run_dir / 'scores.json'} has the same numbers.",
        )
    )
    write_atomically(run_dir / "report.html", page)


def _title(config: EvaluateConfig, inputs: Inputs) -> str:
    """The experiment, and the folder that its images came from."""
    experiment = Path(config.run_dir).resolve().parent.name
    extra = inputs.reference.manifest.extra if isinstance(inputs.reference, DataSet) else {}
    source = Path(str(extra.get("source", ""))).name
    return f"{experiment}: evaluation" + (f" on {source}" if source else "")


def _first_samples(bench: Bench, inputs: Inputs) -> dict[str, list[Tensor]]:
    config = bench.config
    if inputs.samples is None or not (config.samples_shown and config.classes_shown):
        return {}
    return first_of_each_class(
        inputs.samples,
        inputs.resolution_of(inputs.samples),
        per_class=config.samples_shown,
        most_classes=config.classes_shown,
    )


def first_of_each_class(
    data: DataSet, resolution: int, *, per_class: int, most_classes: int
) -> dict[str, list[UInt8[Tensor, "3 r r"]]]:
    """The first `per_class` images of classes spread evenly over all that occur, at most `most_classes`, by name.

    Of more than 1,000 shards, 1,000 spread evenly are looked at. Raises ValueError for an image that is damaged.
    """
    if not per_class or not most_classes:
        return {}
    count = len(data.manifest.shards)
    shards = np.linspace(0, count - 1, min(count, _MOST_SHARDS)).astype(int).tolist()
    positions = np.concatenate([np.asarray(run) for run in data.manifest.runs(shards)])
    labels = data.labels(shards)
    present = np.unique(labels).tolist()
    step = max(1.0, len(present) / most_classes)
    chosen = [present[int(n * step)] for n in range(min(len(present), most_classes))]
    images: dict[str, list[Tensor]] = {}
    for label in chosen:
        firsts = positions[np.flatnonzero(labels == label)[:per_class]].tolist()
        images[data.manifest.classes[label]] = [image for image, _ in data.images_at(firsts, resolution)]
    return images


def _write_pictures(
    bench: Bench, inputs: Inputs, samples: Mapping[str, list[Tensor]], examples: Examples | None
) -> None:
    """samples.png and the picture, if there is anything to show; a class whose name cannot be drawn has its number."""
    columns = (examples.originals, examples.pictures) if examples else ((), ())
    originals, decoded = (list(column[: bench.config.samples_shown]) for column in columns)
    classes = _classes(inputs)
    labelled = {label_of_class(name, classes.index(name)): images for name, images in samples.items()}
    if samples or originals:
        for path in filter(None, (str(bench.run.run_dir / "samples.png"), bench.config.picture)):
            grid_png(path, originals=originals, reconstructions=decoded, samples=labelled)


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
        model = inputs.vqvae.model
        grids = ", ".join(f"{name} {h}×{w}" for name, (h, w) in zip(model.level_names, model.grids, strict=True))
        parts.append(f"{inputs.vqvae.description['resolution']} px, K = {model.num_codes}, {grids}")
    return " · ".join(parts) or "no inputs"


def _provenance(run_dir: Path, inputs: Inputs) -> list[dict[str, Any]]:
    """Where everything came from: one mapping per run or data set."""
    facts = [_about_run(run_dir, "this evaluation")]
    for source in inputs.models.values():
        about = {"fingerprint": source.fingerprint, "weights": source.weights, "images seen": source.images_seen}
        facts.append(_about_run(source.path, f"{source.description['kind']}: {source.path}", **about))
    for name, data in (("samples", inputs.samples), ("reference", inputs.reference), ("codes", inputs.codes)):
        if isinstance(data, DataSet):
            facts.append(_about_data(data.manifest, f"{name}: {data.folder}"))
    return facts


_OF_COMMAND = ("argv", "strategy", "world_size", "device", "precision", "git_commit", "versions")


def _about_run(path: Path, name: str, **facts: Any) -> dict[str, Any]:
    """What the files of a run, or of an exported folder, say; missing files are skipped."""
    command, status = read_json(path / "command.json"), read_status(path)
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
    from rich.table import Column, Table

    columns = ("metric", Column("value", justify="right"), Column("n", justify="right"), "extractor")
    table = Table(*columns, title="scores", title_justify="left")
    for key, score in scores.in_order().items():
        if not is_of_curve(key):
            table.add_row(key, report.format_score(key, score), f"{score.n:,}", score.extractor or "")
    console = Console()
    console.print(table)
    for reason, names in report.by_reason(scores.left_out).items():
        line = printable(redact_url(f"left out: {', '.join(names)}: {reason}"))
        console.print(line, soft_wrap=True, markup=False, highlight=False)
