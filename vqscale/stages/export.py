"""Trained models -> folders to share: model.safetensors, config.json and a model card, README.md.

In: a run directory, or the folder of an experiment's runs.  Out: one folder for a run; for an experiment one per
model, `vqvae`, `prior_top`, …, and one card for all of them.

The bytes of model.safetensors depend on the weights only, and the fingerprint is the run's own: codes and priors of the
run belong to its export.  What a card says is read from the runs; what is not there is not said.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale import config as configs
from vqscale.evaluation.card import Exported, card
from vqscale.files import read_json
from vqscale.models.pretrained import save_pretrained
from vqscale.sources import Source, load_any

USAGE = "RUN_DIR OUT_DIR [key=value ...]"
_OF_COMMAND = ("stage", "strategy", "world_size", "device", "precision", "git_commit", "versions")
_OF_FOLDER = ("kind", "config", "fingerprint", "weights", "images_seen", "provenance")


@dataclass(frozen=True)
class ExportConfig:
    """Which weights, and what the card cannot know."""

    weights_kind: str = ""  # ema | raw; "" = ema if there is one
    checkpoint: int = 0  # of one run: images seen; 0 = the last checkpoint of a done run
    licence: str = ""  # of the weights, e.g. cc0-1.0; the card says where there is none
    about: str = ""  # a line for the card: what the images are, where they come from


Config = ExportConfig


@dataclass(frozen=True)
class Request:
    run_dir: Path
    out_dir: Path
    config: ExportConfig


def load(words: Sequence[str]) -> Request:
    """From `RUN_DIR OUT_DIR key=value …`. Raises ValueError as `config.from_words` does."""
    (run_dir, out_dir), rest = configs.split_paths(words, f"export {USAGE}", 2)
    return Request(Path(run_dir), Path(out_dir), configs.from_words(ExportConfig, rest))


def main(request: Request) -> None:
    """Write the folders. Raises ValueError for a run that is not done, FileNotFoundError where there is none."""
    config, out = request.config, request.out_dir
    runs = trained_runs(request.run_dir)
    alone = runs == [request.run_dir]
    if config.checkpoint and not alone:
        raise ValueError(f"checkpoint={config.checkpoint} is of one run, but {request.run_dir} holds {len(runs)}")
    sources = [load_any(run, weights_kind=config.weights_kind, checkpoint=config.checkpoint) for run in runs]
    exported = []
    for source in sources:  # every run is known to be whole before the first is written
        folder = out if alone else out / _name(source.description)
        _write(source, folder)
        exported.append(Exported(source, folder.relative_to(out).as_posix()))
        print(f"{folder}: {_name(source.description)}, {source.fingerprint}")
    text = card(exported, runs[0].parent, licence=config.licence, about=config.about)
    (out / "README.md").write_text(text, encoding="utf-8")


def trained_runs(path: Path) -> list[Path]:
    """The run itself, or the runs of models in the folder of an experiment: the VQ-VAE, then priors, top first.

    Raises FileNotFoundError where there is neither.
    """
    if (path / "checkpoints").is_dir():
        return [path]
    names = ["train_vqvae", *(f"train_prior_{level}" for level in configs.level_names(3))]
    found = [path / name for name in names if (path / name / "checkpoints").is_dir()]
    if not found:
        raise FileNotFoundError(f"{path}: no run of train_vqvae or train_prior there, and no experiment with such runs")
    return found


def _name(description: Mapping[str, Any]) -> str:
    return "vqvae" if description["kind"] == "vqvae" else f"prior_{description['level']}"


def _write(source: Source, folder: Path) -> None:
    description = dict(source.description)
    extra = {key: value for key, value in description.items() if key not in _OF_FOLDER}
    extra |= {"weights": source.weights, "images_seen": source.images_seen, "provenance": _provenance(source.path)}
    name = save_pretrained(folder, source.model, kind=description["kind"], config=description["config"], extra=extra)
    assert name == source.fingerprint, f"{folder}: exported as {name}, trained as {source.fingerprint}"


def _provenance(run_dir: Path) -> dict[str, Any]:
    """How the run was made, and when it ended (UTC)."""
    command, status = read_json(run_dir / "command.json"), read_json(run_dir / "status.json")
    found = {key: command[key] for key in _OF_COMMAND if key in command}
    if "time" in status:
        ended = datetime.datetime.fromtimestamp(int(status["time"]), datetime.timezone.utc)
        found["ended"] = ended.isoformat()
    return found
