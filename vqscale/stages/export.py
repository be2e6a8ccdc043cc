"""Trained models -> folders to share: model.safetensors, config.json and a model card, README.md.

In: a run directory, or the folder of an experiment's runs.  Out: one folder for a run; for an experiment one per
model, `vqvae`, `prior_top`, …, and one card for all of them.  With `push`, the same as a repository on the Hugging Face
Hub.

The bytes of model.safetensors depend on the weights only, and the fingerprint is the run's own: codes and priors of the
run belong to its export.  What the card says is read from the runs; facts that are missing are skipped, and scores are
taken from an evaluation of these very weights only.
"""

import contextlib
import datetime
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from markupsafe import Markup

from vqscale import hub
from vqscale.config import Request, level_names, read_request
from vqscale.data.images import preparation
from vqscale.data.shards import Manifest, resolve
from vqscale.evaluation.figures import is_number, metrics_of_run
from vqscale.evaluation.report import format_score, template, with_unit
from vqscale.evaluation.scores import METRICS, Score, is_of_curve, metric_of
from vqscale.fields import Choice, NonNegativeInt
from vqscale.files import read_json, write_atomically
from vqscale.models.pretrained import CONFIG, WEIGHTS, save_pretrained
from vqscale.models.sampling import PER_LEVEL
from vqscale.rundir import recorded_status
from vqscale.sources import Source, load_model
from vqscale.text import markdown, printable, printable_lines, redact_url

USAGE = "RUN_DIR OUT_DIR [key=value ...]"
_OF_COMMAND = ("stage", "strategy", "world_size", "device", "precision", "git_commit", "versions")
_OF_FOLDER = ("kind", "config", "fingerprint", "weights", "images_seen", "provenance")


@dataclass(frozen=True)
class ExportConfig:
    """Which weights, and what the card cannot know."""

    weights_kind: Annotated[str, Choice("", "ema", "raw")] = ""  # "" = ema if there is one
    checkpoint: NonNegativeInt = 0  # of one run: images seen; 0 = the last checkpoint of a done run
    licence: str = ""  # of the weights, e.g. cc0-1.0; the card says where there is none
    push: str = ""  # org/name: a repository on the Hugging Face Hub, made if there is none, which gets the folder too
    private: bool = False  # of push: a new repository is for its owners only
    dataset: str = ""  # org/name of the training images on the Hub, for the card's metadata
    about: str = ""  # a line of Markdown for the card: what the images are, where they come from


Config = ExportConfig


def load(words: Sequence[str]) -> Request[ExportConfig]:
    """From `RUN_DIR OUT_DIR key=value …`; see `read_request`."""
    return read_request(ExportConfig, words, f"export {USAGE}", paths=2)


@dataclass(frozen=True)
class Exported:
    """A model and the folder that holds it, relative to the card's. sampling: of a prior, how samples were drawn."""

    source: Source
    folder: str
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.source.model.parameters())

    @property
    def summary(self) -> str:
        description = self.source.description
        if description["kind"] == "vqvae":
            levels = len(description["config"]["downsample"])
            return f"VQ-VAE, {description['resolution']} px, {levels} level{'s' * (levels > 1)}"
        if description["kind"] == "classifier":
            return f"classifier, {description['resolution']} px, learned from {description['learned_from']}"
        height, width = description["grid"]
        return f"prior of the {description['level']} codes, {height}x{width}, K = {description['num_codes']}"


def main(request: Request[ExportConfig]) -> None:
    """Write the folders. Raises ValueError for a run that is not done, FileNotFoundError where there is none.

    A push comes last: where it fails, the folder is whole, and the same command pushes again.
    """
    config, (run_dir, out) = request.config, request.paths
    if config.push:
        hub.check_push(config.push)
    runs = trained_runs(run_dir)
    alone = runs == [run_dir]
    if config.checkpoint and not alone:
        raise ValueError(f"checkpoint={config.checkpoint} is of one run, but {run_dir} holds {len(runs)}")
    sources = [load_model(run, weights_kind=config.weights_kind, checkpoint=config.checkpoint) for run in runs]
    experiment = runs[0].resolve().parent
    drawn = _samples_of(sources, experiment).get("extra", {})
    models = [Exported(one, "." if alone else one.role, _sampling(one, drawn)) for one in sources]
    for folder in (out, *(out / one.folder for one in models)):  # all is checked before the first is written
        _check_folder(folder)
    for one in models:
        _write(one, out / one.folder)
        print(f"{out / one.folder}: {one.source.role}, {one.source.fingerprint}")
    write_atomically(out / "README.md", card(models, experiment, config))
    if config.push:
        files = [(Path(one.folder) / name).as_posix() for one in models for name in (CONFIG, WEIGHTS)]
        print(hub.push(out, ["README.md", *files], config.push, private=config.private))


def trained_runs(path: Path) -> list[Path]:
    """The run itself, or the runs of models in the folder of an experiment: the VQ-VAE, then priors, top first.

    Raises FileNotFoundError where there is neither.
    """
    if (path / "checkpoints").is_dir():
        return [path]
    names = ["train_vqvae", *(f"train_prior_{level}" for level in level_names(3))]
    runs = [path / name for name in names if (path / name / "checkpoints").is_dir()]
    if not runs:
        raise FileNotFoundError(f"{path}: no run of train_vqvae or train_prior there, and no experiment with such runs")
    return runs


_OF_RUN = ("config.yaml", "status.json")
_MARKS = {"README.md": "library_name: vqscale", "config.json": '"fingerprint"'}  # of files that export wrote


def _check_folder(folder: Path) -> None:
    """Raises ValueError for a folder of a run, or with files of others that an export would replace."""
    for parent in (folder.resolve(), *folder.resolve().parents):
        if all((parent / name).exists() for name in _OF_RUN):
            raise ValueError(f"OUT_DIR {folder}: {parent} is a run directory; choose a folder outside it")
    for name, mark in _MARKS.items():
        path = folder / name
        if path.exists() and mark not in path.read_text(errors="replace"):
            raise ValueError(f"OUT_DIR {folder}: {path} was not written by export; choose another folder")


def _write(one: Exported, folder: Path) -> None:
    source, description = one.source, dict(one.source.description)
    extra = {key: value for key, value in description.items() if key not in _OF_FOLDER}
    extra |= {"weights": source.weights, "images_seen": source.images_seen, "provenance": _provenance(source.path)}
    if one.sampling:
        extra["sampling"] = one.sampling
    name = save_pretrained(folder, source.model, kind=description["kind"], config=description["config"], extra=extra)
    assert name == source.fingerprint, f"{folder}: exported as {name}, trained as {source.fingerprint}"


def _provenance(run_dir: Path) -> dict[str, Any]:
    """How the run was made, and when it ended (UTC)."""
    command, status = read_json(run_dir / "command.json"), recorded_status(run_dir)
    facts = {key: command[key] for key in _OF_COMMAND if key in command}
    if "time" in status:
        ended = datetime.datetime.fromtimestamp(int(status["time"]), datetime.timezone.utc)
        facts["ended"] = ended.isoformat()
    return facts


# --- the card ---------------------------------------------------------------------------------------------------------


def card(models: Sequence[Exported], experiment: Path, config: ExportConfig) -> str:
    """Markdown, with the front matter that model hubs read. All that is not ours in it is escaped."""
    commands = _commands(experiment)
    scores = next(filter(None, (_scores(models, path) for path in sorted(experiment.glob("evaluate*")))), {})
    filters: dict[str, Any] = {
        "code": lambda text: Markup(f"`{printable(text).replace('`', chr(39))}`"),
        "with_interval": lambda score, key: Markup(format_score(key, score)),
        "with_unit": with_unit,
        "yaml": lambda text: Markup(text if re.fullmatch(r"[\w.+-]+", text) else json.dumps(text)),
    }
    page = template(Path(__file__).with_name("card.md"), markdown, filters, keep_trailing_newline=True)
    return page.render(
        title=experiment.name,
        licence=config.licence,
        push=config.push,
        dataset=config.dataset,
        metrics=sorted({key.split("/")[0] for key in scores}),
        about=printable_lines(config.about) or "A model trained with vqscale.",
        models=models,
        kinds={one.source.description["kind"] for one in models},
        description=models[0].source.description,
        prepared=preparation(models[0].source.description.get("transform", {})),
        data=_data(models[0].source, experiment),
        commands=[_line_of(path, command) for path, command in commands],
        launches=_launches([command for _, command in commands]),
        scores=scores,
        held_out={} if scores else _last_held_out(models),
    )


def _data(source: Source, experiment: Path) -> dict[str, Manifest]:
    """The data set beside the runs, by split."""
    stage = "extract_codes" if source.description["kind"] == "prior" else "pack"
    manifests = {}
    for split in ("train", "holdout"):
        with contextlib.suppress(ValueError, OSError):
            manifests[split] = Manifest.load(resolve(experiment / stage, split))
    return manifests


_STAGES = (  # in the order in which they run
    *("pack", "index", "train_vqvae", "extract_codes", "train_prior_*"),
    *("train_classifier_re*", "sample*", "train_classifier_samples", "evaluate*"),  # re: real, reconstructions
)


def _commands(experiment: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(file, content) of each run's command.json, in the order of the stages."""
    return [
        (path, read_json(path))
        for pattern in _STAGES
        for path in sorted(experiment.glob(f"{pattern}/command.json"), reverse="prior" in pattern)
    ]


def _line_of(path: Path, command: Mapping[str, Any]) -> str:
    """The command to type, without secrets."""
    words, stage = [str(word) for word in command.get("argv", [])[1:]], str(command.get("stage", ""))
    if words[:1] != [stage]:  # called from a program: what it was given is in its config
        words = [stage, f"{path.parent.name}/config.yaml"]
    return "vqscale " + printable(shlex.join(redact_url(word) for word in words))


def _launches(commands: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How and where they ran, which the command line does not show; each once."""
    launches: list[dict[str, Any]] = []
    for command in commands:
        launch = {key: command.get(key) for key in ("strategy", "world_size", "device")}
        launch["commit"] = str(command.get("git_commit", ""))[:10]
        launch["torch"] = dict(command.get("versions", {})).get("torch")
        if launch not in launches:
            launches.append(launch)
    return sorted(launches, key=lambda launch: str(list(launch.values())))


def _scores(models: Sequence[Exported], evaluation: Path) -> dict[str, Score]:
    """The scores of an evaluation, if it was computed with exactly these models."""
    used, sources = read_json(evaluation / "inputs.json"), [one.source for one in models]
    if any(used.get(source.role) != source.fingerprint for source in sources):
        return {}
    of_these = bool(_samples_of(sources, evaluation.parent, str(used.get("samples"))))
    scores = {}
    for key, value in read_json(evaluation / "scores.json").items():
        if key.split("/")[0] in METRICS and not is_of_curve(key) and (of_these or not _needs_samples(key)):
            scores[key] = Score(**value)
    return {key: score for key, score in scores.items() if score.value is not None}


def _needs_samples(key: str) -> bool:
    return metric_of(key).family == "samples" or key in ("cas_top1", "cas_top5", "class_accuracy")


def _samples_of(sources: Sequence[Source], experiment: Path, fingerprint: str = "") -> dict[str, Any]:
    """dataset.json of samples (with this fingerprint) that were drawn from these models and not from earlier weights,
    those of `sample` before those of `sample_…`; empty where there are none."""
    for about in map(read_json, sorted(experiment.glob("sample*/dataset.json"))):
        facts = about.get("extra", {})
        priors = {f"prior_{level}": name for level, name in facts.get("priors", {}).items()}
        drawn_from = {"vqvae": facts.get("vqvae"), **priors}
        if fingerprint in ("", about.get("fingerprint")):
            if all(drawn_from.get(source.role) == source.fingerprint for source in sources):
                return about
    return {}


def _sampling(source: Source, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a prior's level that samples were drawn with."""
    level = source.description.get("level")
    return {option: drawn[option][level] for option in PER_LEVEL if level in drawn.get(option, {})}


def _last_held_out(models: Sequence[Exported]) -> dict[str, float]:
    last: dict[str, float] = {}
    for source in (one.source for one in models):
        lines = (line for line in metrics_of_run(source.path) if line["images_seen"] <= source.images_seen)
        for key, value in (item for line in lines for item in line.items()):
            if key.startswith("held_out/") and is_number(value):
                last[key.removeprefix("held_out/")] = value
    return last
