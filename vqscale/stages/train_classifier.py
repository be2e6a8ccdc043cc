"""Images, samples or reconstructions -> a classifier, tested on real held-out images.

Trained on samples alone and tested on real images it gives the classification accuracy score (Ravuri and Vinyals 2019;
Razavi et al. 2019, section 4.2.2); trained on real images it is what rejection sampling asks (section 3.4).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale import runtime
from vqscale.batch import Batch
from vqscale.config import as_dict, run_of
from vqscale.data.images import ImageReader
from vqscale.data.shards import Manifest, resolve
from vqscale.engine.loop import FitConfig, StepFn
from vqscale.evaluation.classify import accuracy, hits, network_input, reconstructed
from vqscale.evaluation.features import EXTRACTORS, WIDTHS, Extractor, load_extractor
from vqscale.fields import Choice, NonNegativeInt, PathText, Range
from vqscale.models.classifier import ClassifierConfig
from vqscale.sources import Source, build, load_model
from vqscale.training import dry_run_text, held_out_batches, inputs_may_be_away, train


@dataclass(frozen=True)
class TrainClassifierConfig(FitConfig):
    """One classifier's training. Image size and classes are read from the data set."""

    data: PathText = run_of("pack")  # what it learns from: packed images or sample shards
    vqvae: PathText = "none"  # a VQ-VAE: learn from its reconstructions of `data` instead
    test: PathText = run_of("pack")  # real held-out images
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    features: Annotated[str, Choice("", *EXTRACTORS)] = ""  # the frozen network below network=linear
    weights: PathText = ""  # path of that network's weights, where it needs one
    crop: Annotated[str, Choice("center", "random")] = "center"  # of training images
    flip: bool = True  # mirror half of the images
    label_smoothing: Annotated[float, Range(ge=0, lt=1)] = 0.0  # probability mass spread over all classes
    evaluate_images: NonNegativeInt = 0  # held-out images per evaluation; 0 = all


Config = TrainClassifierConfig


def main(config: TrainClassifierConfig) -> None:
    """Train, or go on training, in `config.run_dir`. Raises ValueError for anything that does not fit before step 1."""
    with runtime.run(config, "train_classifier") as run, inputs_may_be_away(config, run):
        device = run.topology.device
        folder = resolve(config.data, "train", made_by="pack or sample")
        extractor = _extractor(config, device)
        vqvae = None
        if config.vqvae != "none":
            vqvae = load_model(config.vqvae, "vqvae", device=device, topology=run.topology)
        description = model_description(config, Manifest.load(folder), extractor, vqvae)
        test = _test_images(config, description["classes"])
        train(
            config,
            run,
            folder=folder,
            read=ImageReader(description["resolution"], config.flip, config.crop, config.seed, config.max_pixels),
            description=description,
            step_fn=training_step(config, extractor, vqvae),
            evaluate=partial(held_out_accuracy, config, run, test, description["resolution"], extractor),
        )


def _extractor(config: TrainClassifierConfig, device: torch.device) -> Extractor | None:
    linear = config.model.network == "linear"
    if linear != bool(config.features):
        needed = "needs features=lite0, lite2 or inception" if linear else "takes images, not features; leave it out"
        raise ValueError(f"features={config.features}: model.network={config.model.network} {needed}")
    if not linear:
        return None
    return load_extractor(config.features, weights=config.weights, allow_unverified_weights=True, device=device)


def model_description(
    config: TrainClassifierConfig, manifest: Manifest, extractor: Extractor | None, vqvae: Source | None
) -> dict[str, Any]:
    """All that is needed to build this classifier again, and what it learned from."""
    resolution = manifest.transform.get("resolution")
    if manifest.kind not in ("images", "samples") or not resolution:
        raise ValueError(f"data={config.data}: images or samples of one size are needed, this is {manifest.kind}")
    if len(manifest.classes) < 2:
        raise ValueError(f"data={config.data}: a classifier needs 2 classes, there are {len(manifest.classes)}")
    if vqvae is not None and vqvae.description["resolution"] != resolution:
        theirs = vqvae.description["resolution"]
        raise ValueError(f"vqvae={config.vqvae}: takes images of {theirs} px, data={config.data} has {resolution} px")
    return {
        "kind": "classifier",
        "config": as_dict(config.model),
        "resolution": resolution,
        "classes": list(manifest.classes),
        "learned_from": manifest.kind if vqvae is None else "reconstructions",
        "data": manifest.fingerprint,
        "vqvae": vqvae.fingerprint if vqvae is not None else "",
        "features": config.features,
        "features_sha256": extractor.weights_sha256 if extractor is not None else "",
        "feature_width": WIDTHS[config.features] if config.features else 0,
    }


def training_step(config: TrainClassifierConfig, extractor: Extractor | None, vqvae: Source | None) -> StepFn:
    """Cross-entropy in nats, and how often the likeliest class is the right one."""

    def step(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        image = batch["image"] if vqvae is None else reconstructed(vqvae.model, batch["image"])
        logits = model(network_input(image, extractor))
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=config.label_smoothing)
        return loss, {"accuracy_top1": hits(logits.detach(), batch["label"])[:, 0].mean()}

    return step


def _test_images(config: TrainClassifierConfig, classes: list[str]) -> Path:
    """Their data set. Raises ValueError if it has other classes than the training images."""
    folder = resolve(config.test, "holdout")
    theirs = list(Manifest.load(folder).classes)
    if theirs != classes:
        raise ValueError(
            f"test={config.test}: its {len(theirs)} classes are not the {len(classes)} classes of data={config.data}"
        )
    return folder


def held_out_accuracy(
    config: TrainClassifierConfig,
    run: runtime.Run,
    test: Path,
    resolution: int,
    extractor: Extractor | None,
    model: nn.Module,
    images_seen: int,
) -> Iterator[tuple[str, float]]:
    """Yields held_out/accuracy_top1 and _top5, on the real images in the folder `test`."""
    read = ImageReader(resolution, max_pixels=config.max_pixels)
    batches = held_out_batches(config, run, test, read, config.evaluate_images)
    top_1, top_5, _ = accuracy(lambda images: model(network_input(images, extractor)), batches, run.topology)
    yield "held_out/accuracy_top1", top_1
    yield "held_out/accuracy_top5", top_5


def plan(config: TrainClassifierConfig) -> str:
    """Sizes and steps, for --dry-run."""
    manifest = Manifest.load(resolve(config.data, "train", made_by="pack or sample"))
    vqvae = None if config.vqvae == "none" else load_model(config.vqvae, "vqvae")
    description = model_description(config, manifest, _extractor(config, torch.device("cpu")), vqvae)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(description).parameters())
    line = f"{config.model.network}, {parameters:,} parameters"
    return dry_run_text(config, manifest, description["learned_from"], line)
