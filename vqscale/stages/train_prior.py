"""Code shards -> a class-conditional prior of one level, conditioned on the codes of all levels above it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from vqscale import runtime
from vqscale.batch import Batch, as_float64, codes_of, to_device
from vqscale.config import as_dict, run_of
from vqscale.data.codes import CodeReader
from vqscale.data.images import to_uint8
from vqscale.data.shards import Manifest, resolve
from vqscale.engine.loop import StepFn
from vqscale.evaluation.training_distance import DistanceConfig, TrainingDistance, open_distance
from vqscale.fields import Choice, NonNegativeInt, PathText, PositiveInt
from vqscale.models.dropout import dropout_key
from vqscale.models.prior import PriorConfig, code_nll, nll
from vqscale.models.sampling import sample_codes
from vqscale.seeding import key_of, mix
from vqscale.sources import build, load_model
from vqscale.training import dry_run_text, held_out_batches, inputs_may_be_away, train


@dataclass(frozen=True)
class TrainPriorConfig(DistanceConfig):
    """One prior's training. K, grids and classes are read from the code shards."""

    data: PathText = run_of("extract_codes")  # code shards
    level: Annotated[str, Choice("top", "middle", "bottom")] = "top"  # that it models
    model: PriorConfig = field(default_factory=PriorConfig)
    flip: bool = True  # choose between the two views of each image, where the code shards have both
    evaluate_images: PositiveInt = 1_024  # held-out images per evaluation
    vqvae: PathText = run_of("train_vqvae")  # for evaluate_fd: the VQ-VAE of the codes, a run or an exported folder
    fd_samples: PositiveInt = 2_048  # for evaluate_fd: samples that are drawn and decoded
    fd_every: NonNegativeInt = 0  # for evaluate_fd: a multiple of evaluate_every; 0 = at each evaluation
    allow_collapsed_codes: bool = False  # train even on codes of perplexity below 2


Config = TrainPriorConfig


def main(config: TrainPriorConfig) -> None:
    """Train, or go on training, in `config.run_dir`. Raises ValueError for anything that does not fit before step 1."""
    with runtime.run(config, "train_prior") as run, inputs_may_be_away(config, run):
        folder = resolve(config.data, "train", made_by="extract_codes")
        manifest = Manifest.load(folder)
        description = model_description(config, manifest)
        drawn = open_drawn_images(config, run, description) if config.evaluate_fd else None
        train(
            config,
            run,
            folder=folder,
            read=reader(config, manifest, flip=config.flip),
            description=description,
            step_fn=training_step(config),
            evaluate=partial(evaluate, config, run, drawn),
            side_work=drawn.distance.cost if drawn else None,
        )


def levels_of(config: TrainPriorConfig, manifest: Manifest) -> dict[str, list[int]]:
    """The grids of this level and all above it by name, top first. Raises ValueError for a level the codes lack."""
    if manifest.kind != "codes":
        raise ValueError(f"data={config.data}: code shards are needed, this is a data set of {manifest.kind}")
    levels = manifest.extra["levels"]
    if config.level not in levels:
        raise ValueError(f"level={config.level}: the codes at {config.data} have {', '.join(levels)}")
    names = list(levels)[: list(levels).index(config.level) + 1]
    return {name: list(levels[name]) for name in names}


def model_description(config: TrainPriorConfig, manifest: Manifest) -> dict[str, Any]:
    """All that is needed to build this prior again. Raises ValueError for collapsed codes, or usage counts that do not
    match num_codes."""
    grids, num_codes = levels_of(config, manifest), manifest.extra["num_codes"]
    for name in grids:
        if (counted := len(manifest.extra["usage"][name])) != num_codes:
            raise ValueError(
                f"data={config.data}: num_codes is {num_codes}, but {counted} different {name} codes were counted: "
                "these are the codes of another tokenizer"
            )
        perplexity = manifest.extra["perplexity"][name]
        if perplexity < 2 and not config.allow_collapsed_codes:
            raise ValueError(
                f"data={config.data}: the {name} codes have collapsed (perplexity {perplexity:.2f} of {num_codes}): "
                "a prior would learn nothing; allow_collapsed_codes=true trains it"
            )
    *upper, grid = grids.values()
    return {
        "kind": "prior",
        "config": as_dict(config.model),
        "level": config.level,
        "num_codes": num_codes,
        "grid": grid,
        "upper_grids": upper,
        "classes": list(manifest.classes),
        "tokenizer": manifest.extra["tokenizer"],
        "data": manifest.fingerprint,
        "transform": manifest.transform,
    }


def reader(config: TrainPriorConfig, manifest: Manifest, *, flip: bool) -> CodeReader:
    """Reads this level's codes and those of all levels above."""
    levels, views, num_codes = levels_of(config, manifest), manifest.extra["views"], manifest.extra["num_codes"]
    return CodeReader(levels, views=views, flip=flip, seed=config.seed, num_codes=num_codes)


def inputs(batch: Batch, level: str) -> tuple[Tensor, list[Tensor]]:
    """(codes of `level`, codes of the levels above, top first) of a batch of codes."""
    above = [codes_of(batch, name).long() for name in ("top", "middle", "bottom") if name in batch and name != level]
    return codes_of(batch, level).long(), above


def training_step(config: TrainPriorConfig) -> StepFn:
    """Teacher forcing: mean negative log-likelihood in nats per code."""

    def step(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        codes, above = inputs(batch, config.level)
        key = dropout_key(config.seed, batch["position"])
        loss = nll(model(codes, batch["label"], above, dropout_key=key), codes)
        return loss, {f"nll/{config.level}": loss}

    return step


@dataclass(frozen=True)
class DrawnImages:
    """What it takes to judge a prior by the images that it draws."""

    distance: TrainingDistance
    vqvae: Any
    description: dict[str, Any]  # of the prior
    held_out: int  # images of the reference


def held_out_codes(config: TrainPriorConfig) -> tuple[Path, Manifest]:
    """Their folder and what it holds."""
    folder = resolve(config.data, "holdout", made_by="extract_codes")
    return folder, Manifest.load(folder)


def open_drawn_images(config: TrainPriorConfig, run: runtime.Run, description: dict[str, Any]) -> DrawnImages:
    """Raises ValueError, before training, for the codes of another VQ-VAE and for options that cannot be followed."""
    if run.topology.strategy == "zero3":
        raise ValueError("strategy=zero3: evaluate_fd=true samples with all weights on a rank: choose fsdp or zero2")
    if config.evaluate_every and config.fd_every % config.evaluate_every:
        raise ValueError(f"fd_every={config.fd_every} is not a multiple of evaluate_every={config.evaluate_every}")
    vqvae = load_model(config.vqvae, "vqvae", device=run.topology.device, topology=run.topology)
    if description["tokenizer"] != vqvae.tokenizer:
        raise ValueError(
            f"evaluate_fd=true: the codes at {config.data} are of {description['tokenizer']}, "
            f"but vqvae={config.vqvae} is {vqvae.tokenizer}"
        )
    folder, manifest = held_out_codes(config)
    n = min(config.fd_samples, manifest.num_samples)
    facts = {"data": manifest.fingerprint, "split": folder.name, "tokenizer": vqvae.fingerprint, "level": config.level}
    distance = open_distance(config, run, f"held_out/{{}}/{config.level}", n=n, **facts)
    return DrawnImages(distance, vqvae.model, description, n)


def evaluate(
    config: TrainPriorConfig, run: runtime.Run, drawn: DrawnImages | None, model: nn.Module, images_seen: int
) -> Iterator[tuple[str, float]]:
    """Yields held_out/… figures: a distance where one is due, and nats per code."""
    if drawn is not None and _distance_is_due(config, images_seen):
        yield from sampled_distance(config, run, drawn, model, images_seen)
    yield from held_out_nll(config, run, model)


def _distance_is_due(config: TrainPriorConfig, seen: int) -> bool:
    """At every evaluation, the last one, or the first in which a multiple of `fd_every` was reached."""
    every = config.fd_every
    return not every or seen >= config.total_images or seen // every > (seen - config.global_batch) // every


def sampled_distance(
    config: TrainPriorConfig, run: runtime.Run, drawn: DrawnImages, model: nn.Module, images_seen: int
) -> Iterator[tuple[str, float]]:
    """Yields held_out/fd_…/<level>, between decoded held-out codes and decoded samples of this level, each drawn given
    the class and the upper codes of a held-out image; levels below are their mean codes.

    Sample i depends on (seed, images seen, i) alone, and is computed in the same batch at any number of ranks.
    """
    distance, device, seed = drawn.distance, run.topology.device, mix(config.seed, key_of("fd"), images_seen)
    folder, manifest = held_out_codes(config)
    read = reader(config, manifest, flip=False)
    distance.begin()
    with distance.cost.timed(), torch.autocast(device.type, enabled=False):
        prior = whole_prior(model, drawn.description)
        weights = prior.sampling_weights(next(prior.parameters()).dtype)
        # Without graphs, as a capture would break what other threads do on the GPU meanwhile.
        draw = partial(sample_codes, prior, seed=seed, weights=weights, graphs=False)
        for first in range(0, config.fd_samples, drawn.held_out):
            count = min(drawn.held_out, config.fd_samples - first)
            for batch in held_out_batches(config, run, folder, read, count):
                moved = to_device(batch, device)
                codes, above = inputs(moved, config.level)
                ids = first + moved["position"]
                sampled = draw(moved["label"], above, sample_ids=ids, progress=lambda *_: run.poll_together())
                distance.add(to_uint8(drawn.vqvae.decode_upper([*above, sampled])), moved["weight"])
                if first == 0 and distance.reference is None:
                    decoded = to_uint8(drawn.vqvae.decode_upper([*above, codes]))
                    distance.add(decoded, moved["weight"], to="reference")
    yield from distance.figures()


def whole_prior(model: nn.Module, description: dict[str, Any]) -> Any:
    """The model, or a copy with all its weights where ranks have only a part of them. Collective."""
    if not isinstance(model, FSDPModule):
        return model
    tensors = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}
    with torch.device("meta"):
        prior = build(description)
    prior.load_state_dict(tensors, assign=True)
    return prior.eval()


def held_out_nll(config: TrainPriorConfig, run: runtime.Run, model: nn.Module) -> Iterator[tuple[str, float]]:
    """Yields held_out/nll/<level>: nats per code on held-out codes."""
    topology = run.topology
    folder, manifest = held_out_codes(config)
    read = reader(config, manifest, flip=False)
    sums = as_float64(torch.zeros(2, device=topology.device))
    for batch in held_out_batches(config, run, folder, read, config.evaluate_images):
        moved = to_device(batch, topology.device)
        codes, above = inputs(moved, config.level)
        each = as_float64(code_nll(model(codes, moved["label"], above), codes).flatten(1).mean(1))
        weight = as_float64(moved["weight"])
        sums += torch.stack([(each * weight).sum(), weight.sum()])
    topology.all_reduce_(sums)
    yield f"held_out/nll/{config.level}", float(sums[0] / sums[1])


def plan(config: TrainPriorConfig) -> str:
    """Sizes and steps, for --dry-run."""
    manifest = Manifest.load(resolve(config.data, "train", made_by="extract_codes"))
    with torch.device("meta"):
        model: Any = build(model_description(config, manifest))
    counts = model.num_parameters()
    line = (
        f"{config.level} {model.grid[0]}x{model.grid[1]}, K = {model.num_codes}; parameters: "
        f"{counts['layers']:,} in convolutions and linear layers, {counts['embeddings']:,} in embeddings"
    )
    return dry_run_text(config, manifest, "samples", line)
