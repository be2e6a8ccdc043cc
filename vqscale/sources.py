"""Where models come from: a run directory or an exported folder -> (model, its description, its fingerprint).

A *description* is what it takes to build a model, as plain JSON; trainers save it in every checkpoint and `export` in
config.json:  {"kind": "vqvae", "config": …, "resolution": 256, "classes": […], "data": "sha256:…"}  or
{"kind": "prior", "config": …, "level": "top", "num_codes": 512, "grid": [32, 32], "upper_grids": [], "classes": […],
"tokenizer": "sha256:…", "data": "sha256:…"}  or
{"kind": "classifier", "config": …, "resolution": 256, "classes": […], "learned_from": "samples", "data": "sha256:…",
"vqvae": "", "features": "", "features_sha256": "", "feature_width": 0}.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqscale.config import from_dict
from vqscale.engine.checkpoint import Checkpoint, find_latest, verify
from vqscale.models.classifier import Classifier, ClassifierConfig
from vqscale.models.pixelcnn import PixelCNN
from vqscale.models.pretrained import fingerprint, load_into, read_folder
from vqscale.models.prior import LevelPrior, PriorConfig
from vqscale.models.transformer import Transformer
from vqscale.models.vqvae import VQVAE, VQVAEConfig
from vqscale.runtime import read_status

PRIORS: dict[str, type[LevelPrior]] = {prior.kind: prior for prior in (PixelCNN, Transformer)}


@dataclass(frozen=True)
class Source:
    """A trained model, in eval mode. `weights`: ema | raw | exported; `images_seen`: how long it was trained."""

    model: Any
    description: dict[str, Any]
    fingerprint: str
    path: Path
    weights: str
    images_seen: int


def build(description: dict[str, Any]) -> nn.Module:
    """The uninitialised model of a description. Raises ValueError for one that this program cannot build."""
    where = f"description of a {description.get('kind')} model"
    try:
        if description["kind"] == "vqvae":
            config = from_dict(VQVAEConfig, description["config"], where)
            return VQVAE(config, resolution=description["resolution"])
        if description["kind"] == "prior":
            config = from_dict(PriorConfig, description["config"], where)
            if config.kind not in PRIORS:
                raise ValueError(f"model.kind={config.kind}: choose from {', '.join(PRIORS)}")
            return PRIORS[config.kind](
                config,
                num_codes=description["num_codes"],
                grid=tuple(description["grid"]),
                num_classes=len(description["classes"]),
                upper_grids=[tuple(grid) for grid in description["upper_grids"]],
            )
        if description["kind"] == "classifier":
            settings = from_dict(ClassifierConfig, description["config"], where)
            return Classifier(settings, len(description["classes"]), description["feature_width"])
    except KeyError as error:
        raise ValueError(f"{where}: the key {error} is missing") from None
    raise ValueError(f"{where}: the kinds are vqvae, prior and classifier")


def load_vqvae(
    path: str | Path, *, device: torch.device | str = "cpu", weights_kind: str = "", checkpoint: int = 0
) -> Source:
    """A VQ-VAE from a run directory or an exported folder; see `load`."""
    return load(path, "vqvae", "train_vqvae", device=device, weights_kind=weights_kind, checkpoint=checkpoint)


def load_prior(
    path: str | Path, *, device: torch.device | str = "cpu", weights_kind: str = "", checkpoint: int = 0
) -> Source:
    """A prior from a run directory or an exported folder; see `load`."""
    return load(path, "prior", "train_prior", device=device, weights_kind=weights_kind, checkpoint=checkpoint)


def load_classifier(
    path: str | Path, *, device: torch.device | str = "cpu", weights_kind: str = "", checkpoint: int = 0
) -> Source:
    """A classifier from a run directory or an exported folder; see `load`."""
    return load(path, "classifier", "train_classifier", device=device, weights_kind=weights_kind, checkpoint=checkpoint)


def load_any(path: str | Path, *, weights_kind: str = "", checkpoint: int = 0) -> Source:
    """A model of any kind, on the CPU; see `load`."""
    return load(path, "", "train_vqvae", device="cpu", weights_kind=weights_kind, checkpoint=checkpoint)


def load(
    path: str | Path, kind: str, made_by: str, *, device: torch.device | str, weights_kind: str, checkpoint: int
) -> Source:
    """`kind`: what it must be, "" = anything; `weights_kind`: "" = the EMA weights if there are any; `checkpoint`:
    images seen, 0 = the last one of a done run.

    Raises FileNotFoundError naming the stage that makes such a folder; ValueError for an unfinished run, a model of
    another kind or weights that do not fit.
    """
    path = Path(path)
    if weights_kind not in ("", "ema", "raw"):
        raise ValueError(f"weights_kind={weights_kind}: choose ema or raw")
    if (path / "model.safetensors").is_file():
        tensors, description = read_folder(path)
        weights, seen = "exported", int(description.get("images_seen", 0))
    elif (path / "checkpoints").is_dir():
        found = _checkpoint_of(path, checkpoint)
        description, seen = dict(found.state.model), found.images_seen
        tensors, weights = _weights_of(found, weights_kind)
    else:
        raise FileNotFoundError(f"{path}: no run and no exported model there; `vqscale {made_by}` makes one")
    if kind and description.get("kind") != kind:
        raise ValueError(f"{path}: holds a {description.get('kind')} model, expected a {kind}")
    model = build(description)
    load_into(model, tensors, str(path))
    model.requires_grad_(False).eval().to(device)
    return Source(model, description, fingerprint(model.state_dict()), path, weights, seen)


def _checkpoint_of(run_dir: Path, images_seen: int) -> Checkpoint:
    if images_seen:
        folder = run_dir / "checkpoints" / f"{images_seen:012d}"
        if not folder.is_dir():
            have = ", ".join(str(int(p.name)) for p in sorted(folder.parent.glob("[0-9]" * 12)))
            raise FileNotFoundError(f"{run_dir}: no checkpoint at {images_seen} images; there are {have or 'none'}")
        if problem := verify(folder):
            raise ValueError(f"{folder} is damaged: {problem}")
        return Checkpoint(folder)
    status = read_status(run_dir)
    if status.get("state") != "done":
        raise ValueError(
            f"{run_dir}: this run is {status.get('state', 'not started')} at {status.get('images_seen', 0)} images; "
            "finish it, or choose a checkpoint with checkpoint=<images seen>"
        )
    found = find_latest(run_dir / "checkpoints", set_aside=False)
    if found is None:
        raise FileNotFoundError(f"{run_dir}: the run is done but has no checkpoint")
    return found


def _weights_of(found: Checkpoint, weights_kind: str) -> tuple[dict[str, Tensor], str]:
    tensors, averages = found.read("model."), found.read("ema.")
    if weights_kind == "ema" and not averages:
        raise ValueError(f"{found.folder}: weights_kind=ema, but the run kept no weight EMA")
    if averages and weights_kind != "raw":
        return tensors | averages, "ema"
    return tensors, "raw"
