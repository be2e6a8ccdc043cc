"""Image shards -> a trained VQ-VAE (1 level: 2017; 2 or 3 levels: VQ-VAE-2), in checkpoints."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from vqscale import runtime
from vqscale.batch import Batch, as_float64
from vqscale.config import as_dict, level_names, run_of
from vqscale.data.cache import Cache
from vqscale.data.images import ImageReader, to_float, to_uint8
from vqscale.data.loader import TarDataset
from vqscale.data.shards import Manifest, resolve
from vqscale.engine.loop import StepFn
from vqscale.engine.parallel import assert_same_everywhere
from vqscale.evaluation.metrics import psnr_of
from vqscale.evaluation.training_distance import DistanceConfig, TrainingDistance, open_distance
from vqscale.fields import Choice, NonNegativeFloat, PathText, PositiveInt
from vqscale.models.codebook import perplexity
from vqscale.models.vqvae import VQVAE, VQVAEConfig
from vqscale.sources import build
from vqscale.stopping import Leave
from vqscale.training import dry_run_text, held_out_batches, inputs_may_be_away, train

_INIT_BATCH = 64  # images encoded at once for the first codebooks


@dataclass(frozen=True)
class TrainVQVAEConfig(DistanceConfig):
    """The VQ-VAE's training. Image size and classes are read from the data set."""

    knobs: ClassVar[frozenset[str]] = DistanceConfig.knobs | {"upper_weight"}

    data: PathText = run_of("pack")  # images: packed or indexed
    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    crop: Annotated[str, Choice("center", "random")] = "center"  # of training images
    flip: bool = True  # mirror half of the images
    init_images: PositiveInt = 2_048  # images whose encodings the codebooks start from
    evaluate_images: PositiveInt = 1_024  # held-out images per evaluation
    upper_weight: NonNegativeFloat = 0.0  # of the error of what upper levels' codes decode to alone: docs/learning.md
    freeze: list[Annotated[str, Choice("encoder", "quantizer")]] = field(
        default_factory=list
    )  # parts kept as in `init`
    grid_images: PositiveInt = 8  # originals and reconstructions in the picture of an evaluation


Config = TrainVQVAEConfig


def main(config: TrainVQVAEConfig) -> None:
    """Train, or go on training, in `config.run_dir`. Raises ValueError for anything that does not fit before step 1."""
    with runtime.run(config, "train_vqvae") as run, inputs_may_be_away(config, run):
        folder = resolve(config.data, "train")
        description = model_description(config, Manifest.load(folder))
        reader = ImageReader(description["resolution"], config.flip, config.crop, config.seed, config.max_pixels)
        distance = reconstruction_distance(config, run, description) if config.evaluate_fd else None
        train(
            config,
            run,
            folder=folder,
            read=reader,
            description=description,
            step_fn=training_step(config),
            evaluate=partial(held_out_reconstruction, config, run, distance),
            prepare=lambda model: _init_codebooks(model, folder, reader, config, run),
            after_step=lambda model, **step: model.update_codebooks(run.topology, seed=config.seed, **step),
            side_work=distance.cost if distance else None,
            freeze=config.freeze,
        )


def model_description(config: TrainVQVAEConfig, manifest: Manifest) -> dict[str, Any]:
    """All that is needed to build this model again. Raises ValueError for a data set without a fixed image size."""
    resolution = manifest.transform.get("resolution")
    if manifest.kind != "images":
        raise ValueError(f"data={config.data}: a data set of images is needed, this is one of {manifest.kind}")
    if not resolution:
        raise ValueError(f"data={config.data}: does not say the size of its images; `vqscale index … resolution=` does")
    return {
        "kind": "vqvae",
        "config": as_dict(config.model),
        "resolution": resolution,
        "classes": list(manifest.classes),
        "data": manifest.fingerprint,
        "transform": manifest.transform,
    }


def training_step(config: TrainVQVAEConfig) -> StepFn:
    """Reconstruction error + β · commitment (van den Oord et al. 2017, eq. 3); every MSE in [-1, 1] units.

    With `upper_weight` also that much of the error of each reconstruction from upper levels' codes alone, ours.
    """

    def step(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        # The images' layout alone decides the activations'; FSDP2 refuses parameters that are not contiguous.
        image = to_float(batch["image"]).contiguous(memory_format=torch.channels_last)
        output = model(image, position=batch["position"], upper=config.upper_weight > 0)
        error, *upper = [F.mse_loss(y, image.to(y.dtype)) for y in (output.reconstruction, *output.upper)]
        losses = {"reconstruction_mse": error, "commitment": output.commitment, "codebook_loss": output.codebook_loss}
        names = level_names(len(upper) + 1)[:-1]
        losses |= {f"reconstruction_mse/{name}": value for name, value in zip(names, upper, strict=True)}
        return error + output.commitment + config.upper_weight * sum(upper), losses

    return step


def _init_codebooks(
    model: VQVAE, folder: Path, reader: ImageReader, config: TrainVQVAEConfig, run: runtime.Run
) -> None:
    """Codebooks from the first images of the order, which stay unconsumed, but those that `init` brings: rank 0
    computes, all ranks receive."""
    topology = run.topology
    model.to(topology.device)
    stopped, keep = False, _levels_of_init(model, config)
    if topology.is_main and len(keep) < len(model.level_names):
        batches = -(-config.init_images // _INIT_BATCH)
        with tqdm(
            total=batches * (1 + len(model.level_names) - len(keep)), unit="batch", desc="codebook initialisation"
        ) as bar:

            def progress() -> None:
                run.poll_signals()
                bar.update()

            images = _first_images(folder, reader, config, topology.device, progress)
            try:
                model.init_codebooks(images, seed=config.seed, between=progress, keep=keep)
            except Leave:
                stopped = True
    if topology.gather(stopped)[0]:
        run.stop("asked to, before the first step")
    for _, buffer in model.named_buffers():
        topology.broadcast_(buffer)
    assert_same_everywhere(dict(model.named_buffers()), topology)


def _levels_of_init(model: VQVAE, config: TrainVQVAEConfig) -> list[str]:
    """The levels whose codebooks `init` brings."""
    names = {level: f"levels.{index}.quantizer.embedding" for index, level in enumerate(model.level_names)}
    ignored = tuple(config.init_ignore)
    return [level for level, name in names.items() if config.init and not name.startswith(ignored)]


def _first_images(
    folder: Path, reader: ImageReader, config: TrainVQVAEConfig, device: torch.device, progress: Callable[[], None]
) -> Iterator[Tensor]:
    dataset = TarDataset(folder, reader, seed=config.seed, window=config.shuffle_window, cache=Cache.of(config))
    batch = min(_INIT_BATCH, config.init_images)
    for first in range(0, config.init_images, batch):
        progress()
        yield to_float(dataset.__getitems__(range(first, first + batch))["image"].to(device))


def reconstruction_distance(
    config: TrainVQVAEConfig, run: runtime.Run, description: dict[str, Any]
) -> TrainingDistance:
    """Between the held-out images of an evaluation and their reconstructions."""
    folder = resolve(config.data, "holdout")
    manifest = Manifest.load(folder)
    facts = {"data": manifest.fingerprint, "split": folder.name, "resolution": description["resolution"]}
    n = min(config.evaluate_images, manifest.num_samples)
    return open_distance(config, run, "held_out/reconstruction_{}", n=n, **facts)


def held_out_reconstruction(
    config: TrainVQVAEConfig, run: runtime.Run, distance: TrainingDistance | None, model: nn.Module, images_seen: int
) -> Iterator[tuple[str, float]]:
    """Yields held_out/… figures, each over the whole held-out subset: MSE and PSNR of its images, the codes they use,
    MSE of what the upper levels alone decode to (the lower ones at their mean code), and the distance, if there is one,
    with its cost. Draws a picture of some of them."""
    assert isinstance(model, VQVAE)
    if distance is not None:
        distance.begin()
    topology = run.topology
    assert_same_everywhere(dict(model.named_buffers()), topology)  # the codebooks, under any strategy
    used = as_float64(torch.zeros(len(model.grids), model.num_codes, device=topology.device))
    # squared error, PSNR, images, errors of the upper levels alone
    sums = as_float64(torch.zeros(2 + len(model.grids), device=topology.device))
    read = ImageReader(model.resolution, max_pixels=config.max_pixels)
    batches = held_out_batches(config, run, resolve(config.data, "holdout"), read, config.evaluate_images)
    for number, batch in enumerate(batches):
        stored, weight = batch["image"].to(topology.device), batch["weight"].to(topology.device)
        image, real = to_float(stored), weight > 0
        output = model(image, upper=True)
        decoded = [output.reconstruction, *output.upper]
        error, *errors = (as_float64(_squared_error(pictures, image)) for pictures in decoded)
        weight = as_float64(weight)
        psnr = psnr_of(error, peak=2, floor=1e-12)  # the values lie in [-1, 1]
        sums += torch.stack([(figure * weight).sum() for figure in (error, psnr, torch.ones_like(weight), *errors)])
        for level, codes in enumerate(output.codes):
            used[level] += torch.bincount(codes[real].flatten(), minlength=model.num_codes).to(used)
        if distance is not None:
            with distance.cost.timed():
                distance.add(to_uint8(output.reconstruction), weight)
                if distance.reference is None:
                    distance.add(stored, weight, to="reference")
        if number == 0:
            _draw(run, image[: config.grid_images], decoded[:2], images_seen)
    topology.all_reduce_(sums)
    topology.all_reduce_(used)
    yield "held_out/reconstruction_mse", float(sums[0] / sums[2])
    yield "held_out/psnr", float(sums[1] / sums[2])
    for name, counts in zip(model.level_names, used, strict=True):
        yield f"held_out/used_codes/{name}", float((counts > 0).sum())
        yield f"held_out/perplexity/{name}", float(perplexity(counts))
    for name, error in zip(model.level_names[:-1], sums[3:], strict=True):
        yield f"held_out/reconstruction_mse/{name}", float(error / sums[2])
    if distance is not None:
        yield from distance.figures()


def _squared_error(decoded: Tensor, image: Tensor) -> Tensor:
    """[b], the mean over each image."""
    return (decoded.float().clamp(-1, 1) - image).square().flatten(1).mean(1)


def _draw(run: runtime.Run, images: Tensor, decoded: Sequence[Tensor], images_seen: int) -> None:
    """Originals, reconstructions and, below two levels or more, what the top alone decodes to: a row each."""
    count = len(images)
    rows = [images, *(row[:count].float() for row in decoded)]
    if not run.topology.is_main:
        return
    grid = make_grid((torch.cat(rows).clamp(-1, 1) + 1) / 2, nrow=count)
    path = run.run_dir / "samples" / f"{images_seen:012d}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        save_image(grid, path)
    except OSError as error:  # a full disk does not stop the run for a picture
        runtime.log.warning("%s: a picture is lost: %s", path, error.strerror)
    run.log_image("reconstructions", grid, images_seen)


def plan(config: TrainVQVAEConfig) -> str:
    """Sizes and steps, for --dry-run."""
    manifest = Manifest.load(resolve(config.data, "train"))
    with torch.device("meta"):
        model: Any = build(model_description(config, manifest))
    parameters = sum(p.numel() for p in model.parameters())
    grids = ", ".join(f"{name} {h}x{w}" for name, (h, w) in zip(model.level_names, model.grids, strict=True))
    return dry_run_text(config, manifest, "images", f"{parameters:,} parameters; codes: {grids}, K = {model.num_codes}")
