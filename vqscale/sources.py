"""Where models come from: a run directory, an exported folder, or a folder of either -> `Source`.

A *description* is what it takes to build a model, as plain JSON; trainers save it in every checkpoint and `export` in
config.json:  {"kind": "vqvae", "config": …, "resolution": 256, "classes": […], "data": "sha256:…", "transform": {…}}
or  {"kind": "prior", "config": …, "level": "top", "num_codes": 512, "grid": [32, 32], "upper_grids": [], "classes": …,
"tokenizer": "sha256:…", "data": "sha256:…", "transform": {…}}  or
{"kind": "classifier", "config": …, "resolution": 256, "classes": […], "learned_from": "samples", "data": "sha256:…",
"vqvae": "", "features": "", "features_sha256": "", "feature_width": 0}.
`transform` is the training images', as their dataset.json has it. `init`: the fingerprint of the weights that the
training started from. A VQ-VAE that kept its encoder and codebooks has `tokenizer`, the fingerprint that its codes are
known by, and `encoding`, that of the tensors which they depend on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from vqscale.config import from_dict, level_names
from vqscale.engine.checkpoint import Checkpoint, find_latest, verify
from vqscale.engine.tensors import Tensors, fill_together
from vqscale.models.classifier import Classifier, ClassifierConfig
from vqscale.models.pixelcnn import PixelCNN
from vqscale.models.pretrained import WEIGHTS, check_fits, fingerprint, load_into, read_folder
from vqscale.models.prior import LevelPrior, PriorConfig
from vqscale.models.transformer import Transformer
from vqscale.models.vqvae import VQVAE, VQVAEConfig
from vqscale.rundir import read_status
from vqscale.text import printable
from vqscale.topology import ALONE, Topology

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

    @property
    def role(self) -> str:
        """vqvae | prior_<level> | classifier."""
        return role_of(self.description)

    @property
    def tokenizer(self) -> str:
        """The fingerprint that stands for a VQ-VAE's codes: its own, or that of the one whose encoder and codebooks it
        has kept; of a prior that of its codes."""
        return self.description.get("tokenizer", self.fingerprint)


def role_of(description: Mapping[str, Any]) -> str:
    """vqvae | prior_<level> | classifier."""
    kind = description["kind"]
    return f"prior_{description['level']}" if kind == "prior" else kind


def encoding_fingerprint(vqvae: Any) -> str:
    """Of all that its codes depend on."""
    tensors = vqvae.state_dict()
    return fingerprint({name: tensors[name] for name in vqvae.encoding_names()})


def build(description: Mapping[str, Any]) -> nn.Module:
    """The uninitialised model of a description. Raises ValueError for one that this program cannot build."""
    where = f"description of a {description.get('kind')} model"
    check_description(description, where)
    try:
        if description["kind"] == "vqvae":
            config = from_dict(VQVAEConfig, description["config"], where)
            return VQVAE(config, resolution=description["resolution"])
        if description["kind"] == "prior":
            config = from_dict(PriorConfig, description["config"], where)
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


_LARGEST = 1 << 16  # of a resolution, a grid's side, K


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(of, value))


def _is_grid(value: Any) -> bool:
    return _is_list(_is_size)(value) and len(value) == 2


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value == printable(value)


_FACTS: dict[str, tuple[Callable[[Any], bool], str]] = {  # of descriptions: what each may be
    **{key: (lambda value: isinstance(value, dict), "an object") for key in ("config", "transform")},
    "resolution": (_is_size, f"an integer from 1 to {_LARGEST}"),
    "num_codes": (_is_size, f"an integer from 1 to {_LARGEST}"),
    "grid": (_is_grid, "two integers [height, width]"),
    "upper_grids": (_is_list(_is_grid), "a list of grids"),
    "classes": (_is_list(_is_name), "a list of printable names"),
    "level": (lambda value: value in level_names(3), f"one of {', '.join(level_names(3))}"),
    **{key: (_is_count, "an integer of at least 0") for key in ("feature_width", "images_seen")},
    **{
        key: (_is_name, "text")
        for key in ("tokenizer", "encoding", "init", "data", "learned_from", "vqvae", "features", "features_sha256")
    },
}
_REQUIRED = {  # by kind: what stages read of a model, besides what `build` reads
    "vqvae": ("classes",),
    "prior": ("level", "classes", "tokenizer"),
    "classifier": ("resolution", "classes", "learned_from", "features", "features_sha256"),
}


def check_description(description: Mapping[str, Any], where: str) -> None:
    """Raises ValueError naming the key for a fact of another kind than this program writes."""
    for key, (fits, expected) in _FACTS.items():
        if key in description and not fits(description[key]):
            raise ValueError(f"{where}: {key} must be {expected}, not {printable(repr(description[key]))[:80]}")


def check_model(description: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Compare the model of a description with tensors, on the meta device, before memory is taken for it.

    Raises ValueError as `check_fits` does, and for a model of far more parameters than there are tensors, before all of
    them are made.
    """
    made, most = 0, 10 * len(tensors) + 1000

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter) -> None:
        nonlocal made
        made += parameter.is_meta
        if made > most:
            raise ValueError(
                f"{where}: its config asks for more than {most} parameters, where it has {len(tensors)} tensors"
            )

    try:
        with torch.device("meta"), register_module_parameter_registration_hook(count):
            model = build(description)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{where}: its config describes no model: {error}") from None
    check_fits(model, tensors, where)


def locate(path: str | Path, name: str) -> Path:
    """The folder of the model `name` (vqvae, prior_top, …): `path` itself if it holds a model, else a folder in it,
    `train_<name>` of an experiment's runs or `<name>` of an export."""
    path = Path(path)
    folders = [path, path / f"train_{name}", path / name] if name else [path]
    return next((folder for folder in folders if _has_checkpoints(folder) or _has_export(folder)), path)


def _has_checkpoints(path: Path) -> bool:
    return (path / "checkpoints").is_dir()


def _has_export(path: Path) -> bool:
    return (path / WEIGHTS).is_file()


def load_model(
    path: str | Path,
    name: str = "",
    *,
    device: torch.device | str = "cpu",
    weights_kind: str = "",
    checkpoint: int = 0,
    topology: Topology = ALONE,
) -> Source:
    """A model from a run directory, an exported folder, or a folder of several. A run's checkpoints win over an export.

    name: vqvae, prior, prior_top, …, classifier, "" = anything. weights_kind: "" = the EMA weights if there are any;
    checkpoint: images seen, 0 = the last one of a done run. An export has but one state: another is refused. Several
    ranks give their topology, and call it together: each verifies and reads a share, and all get the whole model.

    Raises FileNotFoundError naming the stage that makes a model; ValueError for an unfinished run, a model of
    another kind or weights that do not fit.
    """
    path, kind = locate(path, name), name.partition("_")[0]
    if weights_kind not in ("", "ema", "raw"):
        raise ValueError(f"weights_kind={weights_kind}: choose ema or raw")

    def check(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if kind and description.get("kind") != kind:
            raise ValueError(f"{path}: holds a {description.get('kind')} model, expected a {kind}")
        for key in _REQUIRED.get(str(description.get("kind")), ()):
            if key not in description:
                raise ValueError(f"{path}: the description of its model has no {key}")
        check_model(description, tensors, path)

    if _has_checkpoints(path):
        chosen = _checkpoint_of(path, checkpoint, topology)
        description, seen = dict(chosen.state.model), chosen.images_seen
        check(description, chosen.header("model."))
        tensors, weights = _weights_of(chosen, weights_kind, topology)
    elif _has_export(path):
        tensors, description = read_folder(path, check, partial(_read_together, topology))
        weights, seen = "exported", int(description.get("images_seen", 0))
        _check_export(path, description, weights_kind=weights_kind, checkpoint=checkpoint)
    else:
        raise FileNotFoundError(
            f"{path}: no run and no exported model there; `vqscale train_{kind or 'vqvae'}` makes one"
        )
    model = build(description)
    load_into(model, tensors, path)
    if description["kind"] == "vqvae" and "tokenizer" in description:
        if description.get("encoding") != encoding_fingerprint(model):
            raise ValueError(
                f"{path}: its encoder or codebooks are not those of the tokenizer that its description names"
            )
    model.requires_grad_(False).eval().to(device)
    return Source(model, description, fingerprint(model.state_dict()), path, weights, seen)


def _check_export(path: Path, description: Mapping[str, Any], *, weights_kind: str, checkpoint: int) -> None:
    asked = {"weights_kind": ("weights", weights_kind), "checkpoint": ("images_seen", checkpoint)}
    for option, (key, value) in asked.items():
        if value and value != (stated := description.get(key)):
            raise ValueError(f"{path}: {option}={value} cannot apply to an exported model, whose {key} is {stated}")


def _read_together(topology: Topology, path: Path, header: Mapping[str, Tensor]) -> Tensors:
    """The tensors of a safetensors file, of which each rank reads a share."""
    if topology.world_size == 1:
        return safetensors.torch.load_file(path)
    tensors = {name: torch.empty_like(one, device="cpu") for name, one in header.items()}

    def fill(share: Tensors) -> None:
        with safetensors.safe_open(path, "pt") as file:
            for name, tensor in share.items():
                tensor.copy_(file.get_tensor(name))

    fill_together(tensors, fill, topology)
    return tensors


def _checkpoint_of(run_dir: Path, images_seen: int, topology: Topology) -> Checkpoint:
    if images_seen:
        folder = run_dir / "checkpoints" / f"{images_seen:012d}"
        if not folder.is_dir():
            have = ", ".join(str(int(p.name)) for p in sorted(folder.parent.glob("[0-9]" * 12)))
            raise FileNotFoundError(f"{run_dir}: no checkpoint at {images_seen} images; there are {have or 'none'}")
        if problem := verify(folder, topology):
            raise ValueError(f"{folder} is damaged: {problem}")
        return Checkpoint(folder)
    status = read_status(run_dir)
    if status.get("state") != "done":
        raise ValueError(
            f"{run_dir}: this run is {status.get('state', 'not started')} at {status.get('images_seen', 0)} images; "
            "finish it, or choose a checkpoint with checkpoint=<images seen>"
        )
    latest = find_latest(run_dir / "checkpoints", set_aside=False, topology=topology)
    if latest is None:
        raise FileNotFoundError(f"{run_dir}: the run is done but has no checkpoint")
    return latest


def _weights_of(checkpoint: Checkpoint, weights_kind: str, topology: Topology) -> tuple[Tensors, str]:
    averages = {} if weights_kind == "raw" else checkpoint.read("ema.", topology)
    if weights_kind == "ema" and not averages:
        raise ValueError(f"{checkpoint.folder}: weights_kind=ema, but the run kept no weight EMA")
    return checkpoint.read("model.", topology, without=averages) | averages, "ema" if averages else "raw"
