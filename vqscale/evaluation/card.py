"""A model card: exported models and the runs around them -> README.md, with data, commands, scores and licence.

In: the exported models and the folder of the experiment's runs.  Out: Markdown.  Every figure is read from a file of a
run; scores are taken from an evaluation of these very weights only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale.data.shards import Manifest, resolve
from vqscale.evaluation.figures import metrics_of_run
from vqscale.evaluation.report import format_value, with_unit
from vqscale.evaluation.scores import is_of_curve
from vqscale.files import read_json
from vqscale.sources import Source

_STAGES = (  # in the order in which they run
    *("pack", "index", "train_vqvae", "extract_codes", "train_prior_*"),
    *("train_classifier_re*", "sample*", "train_classifier_samples", "evaluate*"),  # re: real, reconstructions
)
_NO_LICENCE = "not stated: ask whoever exported this before you use it"


@dataclass(frozen=True)
class Exported:
    """A model and the folder that holds it, relative to the card's."""

    source: Source
    folder: str


def card(models: list[Exported], experiment: Path, *, licence: str = "", about: str = "") -> str:
    """Markdown, with the front matter that model hubs read."""
    sections = [
        _head(experiment.name, licence),
        about or "A model trained with vqscale.",
        "## Models\n\n" + "\n".join(_model_lines(models)),
        "## Use\n\n" + _use(models),
        "## Data\n\n" + "\n".join(_data_lines(models, experiment)),
        "## Commands\n\n" + "\n".join(_commands(experiment)),
        "## Scores\n\n" + "\n".join(_score_lines(models, experiment)),
        f"## Licence\n\nOf the weights: {licence or _NO_LICENCE}.",
    ]
    return "\n\n".join(sections) + "\n"


def _head(name: str, licence: str) -> str:
    front = [f"license: {licence}"] if licence else []
    return "\n".join(["---", *front, "library_name: vqscale", "tags: [vq-vae-2]", "---", "", f"# {name}"])


def _model_lines(models: list[Exported]) -> list[str]:
    lines = ["| folder | model | parameters | images seen | weights | fingerprint |", "|---|---|---|---|---|---|"]
    for one in models:
        source = one.source
        parameters = sum(parameter.numel() for parameter in source.model.parameters())
        row = [f"`{one.folder}`", _what(source.description), f"{parameters:,}", f"{source.images_seen:,}"]
        lines.append("| " + " | ".join([*row, source.weights, f"`{source.fingerprint[:19]}`"]) + " |")
    return lines


def _what(description: dict[str, Any]) -> str:
    if description["kind"] == "vqvae":
        levels = len(description["config"]["downsample"])
        return f"VQ-VAE, {description['resolution']} px, {levels} level{'s' * (levels > 1)}"
    height, width = description["grid"]
    return f"prior of the {description['level']} codes, {height}x{width}, K = {description['num_codes']}"


def _use(models: list[Exported]) -> str:
    kinds = [one.source.description["kind"] for one in models]
    if "prior" in kinds and "vqvae" in kinds:
        lines = ["images = vqscale.sample(FOLDER, samples_per_class=1)  # float [n, 3, R, R] in [-1, 1]"]
    elif "prior" in kinds:
        return "A prior needs the VQ-VAE whose codes it was trained on: `vqscale sample CONFIG prior_…=FOLDER vqvae=…`."
    else:
        lines = []
    if "vqvae" in kinds:
        lines += ["vqvae = vqscale.VQVAE.from_pretrained(FOLDER)", "again = vqvae.decode(vqvae.encode(images))"]
    return "\n".join(["```python", "import vqscale", *lines, "```", "", "FOLDER is where this file lies."])


def _data_lines(models: list[Exported], experiment: Path) -> list[str]:
    description = models[0].source.description
    lines = [f"- fingerprint of the training set: `{description.get('data', '')}`"]
    stage = "pack" if description["kind"] == "vqvae" else "extract_codes"
    for split in ("train", "holdout"):
        try:
            manifest = Manifest.load(resolve(str(experiment / stage), split))
        except (ValueError, OSError):
            continue
        lines.append(f"- {split}: {manifest.num_samples:,} samples, `{manifest.fingerprint}`")
    classes = description["classes"]
    names = ", ".join(classes[:20]) + ", …" * (len(classes) > 20)
    lines.append(f"- {len(classes)} class{'es' * (len(classes) != 1)}: {names}")
    return lines


def _commands(experiment: Path) -> list[str]:
    """The commands of the experiment's runs, in order, indented; with what the command line does not show."""
    lines, shown = [], []
    for pattern in _STAGES:
        for path in sorted(experiment.glob(f"{pattern}/command.json"), reverse="prior" in pattern):
            command = read_json(path)
            words, stage = command.get("argv", [])[1:], command.get("stage", "")
            if words[:1] != [stage]:  # called from a program: what it was given is in its config
                words = [stage, f"{path.parent.name}/config.yaml"]
            lines.append(f"    vqscale {' '.join(words)}")
            place = (command.get("strategy"), command.get("world_size"), command.get("device"))
            commit = command.get("git_commit", "")[:10]
            shown.append((*place, commit, command.get("versions", {}).get("torch")))
    for strategy, world, device, commit, torch in sorted(set(shown), key=str):
        lines += [
            "",
            f"Strategy {strategy}, {world} rank{'s' * (world != 1)}, {device}; torch {torch}; commit {commit}.",
        ]
    return lines or ["Not recorded."]


def _score_lines(models: list[Exported], experiment: Path) -> list[str]:
    tables = [lines for path in sorted(experiment.glob("evaluate*")) if (lines := _scores_of(models, path))]
    if tables:
        return tables[0]
    lines = [line for one in models for line in _last_held_out(one.source)]
    note = "No evaluation of these weights lies beside the runs; the last held-out figures of training were:"
    return [note, "", *lines] if lines else ["None: no evaluation of these weights lies beside the runs."]


def _scores_of(models: list[Exported], evaluation: Path) -> list[str]:
    """A table of scores.json, if it was computed with exactly these models."""
    used = read_json(evaluation / "inputs.json")
    for one in models:
        description = one.source.description
        key = "vqvae" if description["kind"] == "vqvae" else f"prior_{description['level']}"
        if used.get(key) != one.source.fingerprint:
            return []
    lines = ["| score | value | n | comparable with papers |", "|---|---|---|---|"]
    for key, score in read_json(evaluation / "scores.json").items():
        if score.get("value") is not None and not is_of_curve(key):
            comparable = "yes" if score["comparable_with_papers"] else f"no: {score['reason']}"
            lines.append(f"| {with_unit(key)} | {format_value(key, score['value'])} | {score['n']:,} | {comparable} |")
    return lines


def _last_held_out(source: Source) -> list[str]:
    found: dict[str, float] = {}
    for line in metrics_of_run(source.path):
        if line["images_seen"] <= source.images_seen:
            found |= {key: value for key, value in line.items() if key.startswith("held_out/") and value is not None}
    return [f"- {key.removeprefix('held_out/')}: {value:.4g}" for key, value in found.items()]
