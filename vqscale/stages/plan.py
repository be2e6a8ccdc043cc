"""A trainer's config -> what each rank would hold and send, and how long it would take; no GPU and no data needed.

Everything is computed on fake tensors, the model's own step included. Where the data set is not there yet, its facts
are taken from the experiment's other configs and said to be assumed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vqscale import config as configs
from vqscale.config import local_batching
from vqscale.data.shards import Manifest, resolve
from vqscale.engine.footprint import bytes_per_rank, gathered_bytes, profile_step, sent_per_step
from vqscale.fields import Choice, NonNegativeInt, PositiveFloat, PositiveInt
from vqscale.sources import build
from vqscale.stages import pack, train_prior, train_vqvae
from vqscale.text import error_prefix
from vqscale.topology import STRATEGIES

USAGE = "CONFIG [--world N,N…] [--strategy NAME] [key=value ...]"
_GIB, _DAY = 1 << 30, 86_400


@dataclass(frozen=True)
class PlanConfig:
    """What is asked of the plan; every other key is the trainer's own."""

    world: str | list[str] = "8,64,512,1024"  # ranks: a number or several
    strategy: Annotated[str, Choice(*STRATEGIES)] = "fsdp"  # as in launch/
    ranks_per_node: PositiveInt = 8  # hsdp shards within a node
    tflops: PositiveFloat = 200.0  # TFLOP/s that a rank computes with
    gb_per_s: PositiveFloat = 25.0  # GB/s that a rank sends at
    resolution: NonNegativeInt = 0  # pixels; 0 = the data set's, or the experiment's pack.yaml's
    classes: PositiveInt = 1000  # where there is no data set yet


Config = PlanConfig


@dataclass(frozen=True)
class Request:
    """A plan's own config, the trainer it is for, and that trainer's config."""

    plan: PlanConfig
    stage: str
    trainer: Any  # a FitConfig
    path: Path


def load(words: Sequence[str]) -> Request:
    """From `CONFIG key=value …`: the config of the trainer that the file is for, and the plan's own keys.

    Raises ValueError for a file of another stage, and as `config.load` does.
    """
    asked = configs.read_request(PlanConfig, words, f"plan {USAGE}", paths=1, takes_others=True)
    (path,) = asked.paths
    for stage, module in {"train_vqvae": train_vqvae, "train_prior": train_prior}.items():
        if path.stem.startswith(stage):
            return Request(asked.config, stage, configs.load(module.Config, path, asked.others), path)
    raise ValueError(f"{path}: plan takes a trainer's config, train_vqvae*.yaml or train_prior*.yaml")


def main(request: Request) -> None:
    """Print the plan. Raises ValueError where no number of ranks that was asked for can share the global batch."""
    print("\n".join(lines(request)))


def lines(request: Request) -> list[str]:
    plan, trainer = request.plan, request.trainer
    description, assumed = describe(request)
    with FakeTensorMode():
        model: Any = build(description)
    numel = sum(parameter.numel() for parameter in model.parameters())
    columns, refused = [], []
    for world in _worlds(plan.world):
        try:
            columns.append(column(request, description, model, world))
        except ValueError as error:
            refused.append(str(error))
    if not columns:
        raise ValueError("; ".join(refused))
    flops = columns[0]["flops per image"] / 1e12
    steps = -(-trainer.total_images // trainer.global_batch)
    head = [
        f"{request.path}: {request.stage} under {plan.strategy}",
        *([f"assumed, for want of a data set at {trainer.data}: {assumed}"] if assumed else []),
        f"{numel:,} parameters; {flops:,.3g} TFLOP per image, forward and backward; {trainer.precision}",
        f"{steps:,} steps of {trainer.global_batch:,} images; {plan.tflops:g} TFLOP/s, {plan.gb_per_s:g} GB/s a rank",
        "",
    ]
    return [*head, *_table(columns), *refused]


def _worlds(asked: str | list[str]) -> list[int]:
    """Raises ValueError for what is no number of ranks."""
    try:
        worlds = [int(part) for part in (asked if isinstance(asked, list) else asked.split(","))]
    except ValueError:
        raise ValueError(f"world={asked}: a number of ranks, or several: world=8,64,512") from None
    if min(worlds) < 1:
        raise ValueError(f"world={asked}: at least 1")
    return worlds


def column(request: Request, description: dict[str, Any], model: Any, world: int) -> dict[str, Any]:
    """One number of ranks. Raises ValueError when they cannot share the global batch or the strategy needs more."""
    plan, trainer = request.plan, request.trainer
    least = {"single": 1, "hsdp": 4}.get(plan.strategy, 2)
    if world < least or (plan.strategy == "single" and world > 1):
        raise ValueError(
            f"{world} ranks: strategy={plan.strategy} needs {'exactly' if least == 1 else 'at least'} {least}"
        )
    nodes = -(-world // plan.ranks_per_node)
    if plan.strategy == "hsdp" and nodes > 1 and world % nodes:
        raise ValueError(f"{world} ranks: hsdp needs nodes that are full, of {plan.ranks_per_node} ranks each")
    with error_prefix(f"{world} ranks"):
        local, micro, accumulation = local_batching(trainer.global_batch, world, trainer.micro_batch)
    how: dict[str, Any] = {"precision": trainer.precision, "accumulation": accumulation}
    held = bytes_per_rank(model, plan.strategy, world, nodes, average=bool(trainer.ema_halflife), **how)
    flops, kept = _profile(request, description, micro, checkpointing=False)
    _, recomputed = _profile(request, description, micro, checkpointing=True)
    numel = sum(parameter.numel() for parameter in model.parameters())
    sent = sent_per_step(numel, plan.strategy, world, nodes, **how)
    compute = flops / micro * local / (plan.tflops * 1e12)
    send = sent / (plan.gb_per_s * 1e9)
    steps = -(-trainer.total_images // trainer.global_batch)
    return {
        "ranks": world,
        "micro-batch x accumulation": f"{micro} x {accumulation}",
        **{f"{what}, GiB": size / _GIB for what, size in held.items()},
        "activations, GiB": kept / _GIB,
        "the same, checkpointed": recomputed / _GIB,
        "total, GiB": (sum(held.values()) + kept) / _GIB,
        "total, checkpointed": (sum(held.values()) + recomputed) / _GIB,
        "sent per step, GB": sent / 1e9,
        "seconds computing": compute,
        "seconds sending": send,
        "days, overlapped": steps * max(compute, send) / _DAY,
        "days, one after the other": steps * (compute + send) / _DAY,
        "flops per image": flops / micro,
    }


def _table(columns: list[dict[str, Any]]) -> list[str]:
    rows = [key for key in columns[0] if key != "flops per image"]
    return [f"{row:<28}" + "".join(f"{_cell(column[row]):>14}" for column in columns) for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if value < 1_000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _profile(request: Request, description: dict[str, Any], micro: int, *, checkpointing: bool) -> tuple[int, int]:
    """(FLOPs, activation bytes) of one micro-batch of training. Autocast is the CPU's: its casts are the GPU's too."""
    settings = {**description["config"], "activation_checkpointing": checkpointing}
    with FakeTensorMode():
        model: Any = build({**description, "config": settings})
        model.train()
        if gathered_bytes(request.plan.strategy, request.trainer.precision) == 2:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        step = training_loss(request, model, micro)

        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=request.trainer.precision == "bf16"):
                return step()

        return profile_step(model, forward)


def training_loss(request: Request, model: Any, micro: int) -> Callable[[], Tensor]:
    """The loss of a micro-batch of zeros, on the model's device."""
    with next(model.parameters()).device:
        return _vqvae_step(model, micro) if request.stage == "train_vqvae" else _prior_step(request, model, micro)


def _vqvae_step(model: Any, micro: int) -> Callable[[], Tensor]:
    for quantizer in model.quantizers.values():
        quantizer.eval()  # the codebooks' statistics look at values, and are small
    side = model.resolution
    batch: Any = {"image": torch.zeros(micro, 3, side, side, dtype=torch.uint8), "position": torch.arange(micro)}
    return lambda: train_vqvae.training_step(model, batch)[0]


def _prior_step(request: Request, model: Any, micro: int) -> Callable[[], Tensor]:
    trainer = request.trainer
    grids = [*model.upper_grids, model.grid]
    names = {1: ["top"], 2: ["top", trainer.level], 3: configs.level_names(3)}[len(grids)]
    batch: Any = {name: torch.zeros(micro, *grid, dtype=torch.int16) for name, grid in zip(names, grids, strict=True)}
    batch |= {"label": torch.zeros(micro, dtype=torch.int64), "position": torch.arange(micro)}
    step = train_prior.training_step(trainer)
    return lambda: step(model, batch)[0]


# --- what the model is built from -------------------------------------------------------------------------------------


def describe(request: Request) -> tuple[dict[str, Any], str]:
    """(a description of the model, what had to be assumed)."""
    trainer = request.trainer
    try:
        if request.stage == "train_vqvae":
            return train_vqvae.model_description(trainer, Manifest.load(resolve(trainer.data, "train"))), ""
        folder = resolve(trainer.data, "train", made_by="extract_codes")
        return train_prior.model_description(trainer, Manifest.load(folder)), ""
    except FileNotFoundError:
        return _assume(request)


def _assume(request: Request) -> tuple[dict[str, Any], str]:
    trainer, plan, folder = request.trainer, request.plan, request.path.parent
    side = plan.resolution or _packed_resolution(folder)
    classes = [str(number) for number in range(plan.classes)]
    if request.stage == "train_vqvae":
        images = Manifest.of("images", [], classes, {"resolution": side})
        return train_vqvae.model_description(trainer, images), f"{side} px"
    vqvae_path = folder / "train_vqvae.yaml"
    tokenizer = configs.load(train_vqvae.Config, vqvae_path)
    with torch.device("meta"):
        vqvae = train_vqvae.VQVAE(tokenizer.model, resolution=side)
    if trainer.level not in vqvae.level_names:
        raise ValueError(f"level={trainer.level}: the model of {vqvae_path} has {', '.join(vqvae.level_names)}")
    grids = vqvae.grids[: vqvae.level_names.index(trainer.level) + 1]
    description = {
        "kind": "prior",
        "config": configs.as_dict(trainer.model),
        "num_codes": vqvae.num_codes,
        "grid": grids[-1],
        "upper_grids": grids[:-1],
        "classes": classes,
    }
    shown = " under ".join(f"{h}x{w}" for h, w in reversed(grids))
    return description, f"{shown} codes, K = {vqvae.num_codes} ({vqvae_path}, {side} px), {plan.classes:,} classes"


def _packed_resolution(folder: Path) -> int:
    path = folder / "pack.yaml"
    if not path.is_file():
        raise ValueError(f"there is no data set and no {path} to tell the image size: add resolution=…")
    return configs.load(pack.Config, path, ["source=drawn", "holdout=0.05"]).resolution
