"""Code shards -> a class-conditional prior of one level, conditioned on the codes of all levels above it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from vqscale import runtime
from vqscale.batch import Batch, codes_of, to_device
from vqscale.config import as_dict, run_of
from vqscale.data.codes import CodeReader
from vqscale.data.shards import Manifest, resolve
from vqscale.engine.loop import FitConfig, StepFn
from vqscale.fields import Choice, PathText, PositiveInt
from vqscale.models.dropout import dropout_key
from vqscale.models.prior import PriorConfig, code_nll, nll
from vqscale.sources import build
from vqscale.training import dry_run_text, held_out_batches, inputs_may_be_away, train


@dataclass(frozen=True)
class TrainPriorConfig(FitConfig):
    """One prior's training. K, grids and classes are read from the code shards."""

    data: PathText = run_of("extract_codes")  # code shards
    level: Annotated[str, Choice("top", "middle", "bottom")] = "top"  # that it models
    model: PriorConfig = field(default_factory=PriorConfig)
    flip: bool = True  # choose between the two views of each image, where the code shards have both
    evaluate_images: PositiveInt = 1_024  # held-out images per evaluation
    allow_collapsed_codes: bool = False  # train even on codes of perplexity below 2


Config = TrainPriorConfig


def main(config: TrainPriorConfig) -> None:
    """Train, or go on training, in `config.run_dir`. Raises ValueError for anything that does not fit before step 1."""
    with runtime.run(config, "train_prior") as run, inputs_may_be_away(config, run):
        folder = resolve(config.data, "train", made_by="extract_codes")
        manifest = Manifest.load(folder)
        train(
            config,
            run,
            folder=folder,
            read=reader(config, manifest, flip=config.flip),
            description=model_description(config, manifest),
            step_fn=training_step(config),
            evaluate=partial(held_out_nll, config, run),
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


def held_out_nll(
    config: TrainPriorConfig, run: runtime.Run, model: nn.Module, images_seen: int
) -> Iterator[tuple[str, float]]:
    """Yields held_out/nll/<level>: nats per code on held-out codes."""
    topology = run.topology
    folder = resolve(config.data, "holdout", made_by="extract_codes")
    read = reader(config, Manifest.load(folder), flip=False)
    sums = torch.zeros(2, dtype=torch.float64, device=topology.device)
    for batch in held_out_batches(config, run, folder, read, config.evaluate_images):
        moved = to_device(batch, topology.device)
        codes, above = inputs(moved, config.level)
        each = code_nll(model(codes, moved["label"], above), codes).flatten(1).mean(1).double()
        weight = moved["weight"].double()
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
