"""A trainer's config -> what each rank would hold and send, and how long it would take; no GPU and no data needed.
A folder of configs -> what its chain would cost.

Everything is computed on fake tensors, the model's own step included. Where the data set is not there yet, its facts
are taken from the experiment's other configs and said to be assumed.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vqscale import config as configs
from vqscale.config import local_batching
from vqscale.data.shards import Manifest, resolve
from vqscale.engine.footprint import (
    activation_bytes,
    bytes_per_rank,
    checkpoint_bytes,
    gathered_bytes,
    save_interval,
    sent_per_step,
)
from vqscale.engine.loop import StepFn
from vqscale.fields import Choice, NonNegativeFloat, NonNegativeInt, PathText, PositiveFloat, PositiveInt
from vqscale.files import read_json, read_jsonl
from vqscale.stages import cost, extract_codes, pack, sample, train_prior, train_vqvae
from vqscale.text import error_prefix
from vqscale.topology import STRATEGIES
from vqscale.training import blank_batch, build_model, flops_per_image

USAGE = "CONFIG|CONFIG_FOLDER [--world N,N…] [--strategy NAME] [--from RUN_DIR] [key=value ...]"
_GIB, _DAY = 1 << 30, 86_400
_RATE = "tflops_per_second"
# TFLOP/s measured on one H100 80GB with torch 2.11 in bf16, steps of configs/imagenet256. The VQ-VAE, not compiled:
# 3,383 images/s at a batch of 128; the priors, compiled: 99.3 at 48 (top, 523 TFLOP/s) and 36.0 at 16 (bottom, 501).
_H100 = {"train_vqvae": 96.0, "train_prior": 500.0}
# What changes how fast the same network runs.
_HOW = ("precision", "compile", "deterministic", "micro_batch", "global_batch", "model.activation_checkpointing")


@dataclass(frozen=True)
class PlanConfig:
    """What is asked of the plan; every other key is the trainer's own."""

    world: str | list[str] = "8,64,512,1024"  # ranks: a number or several
    strategy: Annotated[str, Choice(*STRATEGIES)] = "fsdp"  # as in launch/
    ranks_per_node: PositiveInt = 8  # hsdp shards within a node
    tflops: NonNegativeFloat = 0.0  # TFLOP/s that a rank computes with; 0 = measured on one H100: VQ-VAE 96, prior 500
    measured_from: PathText = ""  # a run of the same network, whose rate replaces tflops, or their folder; also from=
    gb_per_s: PositiveFloat = 25.0  # GB/s that a rank sends at
    write_gb_per_s: PositiveFloat = 1.0  # GB/s of a checkpoint that a node writes
    failure_days: PositiveFloat = 1_900.0  # from one failure of a rank to its next; Llama 3: 54 days x 16,384 / 466
    resolution: NonNegativeInt = 0  # pixels; 0 = the data set's, or the experiment's pack.yaml's
    classes: PositiveInt = 1000  # where there is no data set yet
    images: PositiveInt = 1_281_167  # to extract codes of, where there is no data set yet: ImageNet's
    read_gb_per_s: PositiveFloat = 2_000.0  # GB/s that a rank reads weights at while it samples
    price_per_gpu_hour: NonNegativeFloat = 0.0  # in any currency: a folder's cost is printed in money too


Config = PlanConfig


@dataclass(frozen=True)
class Request:
    """A plan's own config, the trainer it is for, and that trainer's config; `stage` is "" for a folder of configs."""

    plan: PlanConfig
    stage: str
    trainer: Any  # a FitConfig
    path: Path


def load(words: Sequence[str]) -> Request:
    """From `CONFIG key=value …`: the config of the trainer that the file is for, and the plan's own keys; of a folder
    these alone.

    Raises ValueError for a file of another stage, and as `config.load` does.
    """
    words = [f"measured_{word}" if word.startswith("from=") else word for word in words]
    asked = configs.read_request(PlanConfig, words, f"plan {USAGE}", paths=1, takes_others=True)
    (path,) = asked.paths
    if path.is_dir():
        if asked.others:
            raise ValueError(f"{asked.others[0]}: {path} is a folder, and only a trainer's config can be overridden")
        return Request(asked.config, "", None, path)
    return _trainer_request(asked.config, path, asked.others)


def _trainer_request(plan: PlanConfig, path: Path, words: Sequence[str] = ()) -> Request:
    for stage, module in {"train_vqvae": train_vqvae, "train_prior": train_prior}.items():
        if path.stem.startswith(stage):
            return Request(plan, stage, configs.load(module.Config, path, words), path)
    raise ValueError(f"{path}: plan takes a trainer's config, train_vqvae*.yaml or train_prior*.yaml, or a folder")


def main(request: Request) -> None:
    """Print the plan. Raises ValueError where no number of ranks that was asked for can share the global batch, or the
    measured run is of another network."""
    print("\n".join(lines(request) if request.stage else chain_lines(request)))


def lines(request: Request) -> list[str]:
    description, assumed = describe(request)
    flops, measured = flops_of(request, description), []
    if request.plan.measured_from:
        tflops, note = measured_rate(request, flops)
        request, measured = replace(request, plan=replace(request.plan, tflops=tflops)), [note]
    plan, trainer = request.plan, request.trainer
    with FakeTensorMode():
        model = build_model(description, _freeze(request))
    numel, frozen = _numel(model)
    columns, refused = [], []
    for world in _worlds(plan.world):
        try:
            columns.append(column(request, description, model, world, flops))
        except ValueError as error:
            refused.append(str(error))
    if not columns:
        raise ValueError("; ".join(refused))
    steps = -(-trainer.total_images // trainer.global_batch)
    head = [
        f"{request.path}: {request.stage} under {plan.strategy}",
        *([f"assumed, for want of a data set at {trainer.data}: {assumed}"] if assumed else []),
        f"{numel:,} parameters{f', {frozen:,} of them frozen' if frozen else ''}; "
        f"{flops / 1e12:,.3g} TFLOP per image, forward and backward; {trainer.precision}",
        f"{steps:,} steps of {trainer.global_batch:,} images; "
        f"{_tflops(request):.4g} TFLOP/s, {plan.gb_per_s:g} GB/s a rank",
        *measured,
        f"save_every as if training waited for each save (Daly 2006); {plan.write_gb_per_s:g} GB/s a node, "
        f"{plan.failure_days:g} days to a rank's next failure (write_gb_per_s=, failure_days=)",
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


def column(request: Request, description: dict[str, Any], model: Any, world: int, flops: int) -> dict[str, Any]:
    """One number of ranks; `flops` per image. Raises ValueError when they cannot share the global batch or the strategy
    needs more."""
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
    kept, recomputed = (_activations(request, description, micro, checkpointing=on) for on in (False, True))
    numel, frozen = _numel(model)
    sent = sent_per_step(numel, plan.strategy, world, nodes, frozen=frozen, **how)
    compute = flops * local / (_tflops(request) * 1e12)
    send = sent / (plan.gb_per_s * 1e9)
    steps = -(-trainer.total_images // trainer.global_batch)
    saved = checkpoint_bytes(numel, average=bool(trainer.ema_halflife), frozen=frozen)
    interval = save_interval(saved / (nodes * plan.write_gb_per_s * 1e9), plan.failure_days * _DAY / world)
    steps_between_saves = min(steps, max(1, round(interval / max(compute, send))))
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
        "save_every, recommended": steps_between_saves * trainer.global_batch,
    }


def _tflops(request: Request) -> float:
    return request.plan.tflops or _H100[request.stage]


def _freeze(request: Request) -> list[str]:
    """The parts that are not trained; of a prior none can be."""
    return getattr(request.trainer, "freeze", [])


def flops_of(request: Request, description: dict[str, Any]) -> int:
    """Of a training step, for each image."""
    return flops_per_image(description, _training_step(request), freeze=_freeze(request))


def _numel(model: Any) -> tuple[int, int]:
    """(all parameters, those that are frozen)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if not trained)


def _table(columns: list[dict[str, Any]]) -> list[str]:
    return [f"{row:<28}" + "".join(f"{_cell(column[row]):>14}" for column in columns) for row in columns[0]]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if value < 1_000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _activations(request: Request, description: dict[str, Any], micro: int, *, checkpointing: bool) -> int:
    """Bytes of one micro-batch of training. Autocast is the CPU's: its casts are the GPU's too."""
    settings = {**description["config"], "activation_checkpointing": checkpointing}
    with FakeTensorMode():
        model = build_model({**description, "config": settings}, _freeze(request)).train()
        if gathered_bytes(request.plan.strategy, request.trainer.precision) == 2:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        step = training_loss(request, description, model, micro)

        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=request.trainer.precision == "bf16"):
                return step()

        return activation_bytes(model, forward)


def training_loss(request: Request, description: dict[str, Any], model: Any, micro: int) -> Callable[[], Tensor]:
    """The loss of a micro-batch of zeros, on the model's device."""
    for quantizer in getattr(model, "quantizers", {}).values():
        quantizer.eval()  # the codebooks' statistics look at values, and are small
    with next(model.parameters()).device:
        batch = blank_batch(description, micro)
    step = _training_step(request)
    return lambda: step(model, batch)[0]


def _training_step(request: Request) -> StepFn:
    if request.stage == "train_vqvae":
        return train_vqvae.training_step(request.trainer)
    return train_prior.training_step(request.trainer)


# --- a run that was measured ------------------------------------------------------------------------------------------


def measured_rate(request: Request, flops: int) -> tuple[float, str]:
    """(TFLOP/s of a rank of the run `measured_from`, a line that says where they come from); `flops` per image.

    Raises ValueError for a run of another stage or network, or one without a logged rate, FileNotFoundError for none.
    """
    run_dir = Path(request.plan.measured_from)
    facts = read_json(run_dir / "command.json")
    if not facts:
        raise FileNotFoundError(f"from={run_dir}: there is no run")
    if facts.get("stage") != request.stage:
        raise ValueError(f"from={run_dir}: a run of {facts.get('stage')}, not of {request.stage}")
    changes = [line for lines in configs.changes(request.trainer, run_dir / "config.yaml").values() for line in lines]
    how = [line for line in changes if line.split(":")[0] in _HOW]
    if network := [line for line in changes if line not in how and line.startswith(("model.", "level:", "freeze:"))]:
        raise ValueError(f"from={run_dir}: a run of another network: {'; '.join(network)}")
    if (theirs := facts.get("flops_per_image")) != flops:
        raise ValueError(f"from={run_dir}: {theirs} FLOPs per image there, {flops} here: its data have another shape")
    rates = [line for line in read_jsonl(run_dir / "metrics.jsonl") if line.get(_RATE)]
    if not rates:
        raise ValueError(f"from={run_dir}: metrics.jsonl has no {_RATE} yet")
    steady = rates[1:] or rates  # the first line has the start: compilation, workers
    images, tflops = (statistics.median(line[key] for line in steady) for key in ("images_per_second", _RATE))
    peak = max(line.get("peak_gpu_bytes") or 0 for line in rates) / _GIB
    return tflops, (
        f"measured in {run_dir} on {facts.get('device_name')}, {facts['world_size']} ranks under {facts['strategy']}: "
        f"{images:,.4g} images/s, {tflops:.4g} TFLOP/s a rank, its sending and waiting for data included"
        + (f"; peak {peak:.1f} GiB" if peak else "")
        + (f"; that run differs in {'; '.join(how)}" if how else "")
    )


# --- the cost of a chain ----------------------------------------------------------------------------------------------

_TRAINERS = ("train_vqvae", "train_prior_top", "train_prior_middle", "train_prior_bottom")
_COUNTED = (*_TRAINERS[:1], "extract_codes", *_TRAINERS[1:], "sample")


@dataclass(frozen=True)
class Network:
    """A trainer's network: `flops` of one image, forward and backward, and `forward_flops`; parameters, and those that
    are frozen; where its rate is from."""

    request: Request
    description: dict[str, Any]
    flops: int
    forward_flops: float
    numel: int
    frozen: int
    note: str

    @property
    def forward_seconds(self) -> float:
        """Of one image."""
        return self.forward_flops / (_tflops(self.request) * 1e12)


def chain_lines(request: Request) -> list[str]:
    """Hours, GPU-hours and money of a folder's stages, and what was assumed.

    Raises ValueError for a folder without trainers, or `measured_from` without runs of them.
    """
    plan, folder = request.plan, request.path
    there = [name for name in _COUNTED if (folder / f"{name}.yaml").is_file()]
    networks = {name: _network(plan, folder / f"{name}.yaml") for name in there if name in _TRAINERS}
    if "train_vqvae" not in networks:
        raise ValueError(f"{folder}: there is no train_vqvae.yaml to plan")
    if plan.measured_from and not any(network.note.startswith("measured") for network in networks.values()):
        raise ValueError(f"from={plan.measured_from}: it has no run of {', '.join(networks)}")
    worlds, rows = _worlds(plan.world), dict[str, list[cost.Spent]]()
    for name in there:
        if name in networks:
            rows[name] = [_training(networks[name], world) for world in worlds]
        elif name == "extract_codes":
            rows[name] = cost.shared(_extraction_seconds(networks["train_vqvae"], folder), worlds)
        else:
            rows[name] = cost.shared(_sampling_seconds(plan, folder, networks), worlds)
    left_out = sorted({path.stem for path in folder.glob("*.yaml")} - rows.keys())
    return [
        f"{folder}: the chain under {plan.strategy}, a stage after the other, sending overlapped with computing",
        *cost.lines(worlds, rows, plan.price_per_gpu_hour),
        "",
        *(f"{name}: {network.note}" for name, network in networks.items()),
        "extract_codes, sample: assumed, at least so long: their arithmetic at these rates; sampling also reads a "
        f"PixelCNN's weights once a row, a transformer's once a code, at {plan.read_gb_per_s:,g} GB/s (read_gb_per_s=)",
        *([f"not counted: {', '.join(left_out)}"] if left_out else []),
    ]


def _network(plan: PlanConfig, path: Path) -> Network:
    request = _trainer_request(plan, path)
    description, assumed = describe(request)
    flops, note = flops_of(request, description), "assumed"
    unfrozen = flops_per_image(description, _training_step(request)) if _freeze(request) else flops
    run_dir = Path(plan.measured_from) / path.stem
    if plan.measured_from and run_dir.is_dir():
        request = replace(request, plan=replace(plan, measured_from=str(run_dir)))
        tflops, note = measured_rate(request, flops)
        request = replace(request, plan=replace(request.plan, tflops=tflops))
    elif not plan.tflops:
        note = "assumed, as measured on one H100 for configs/imagenet256"
    note += f": {_tflops(request):.4g} TFLOP/s a rank, {plan.gb_per_s:g} GB/s" if note.startswith("assumed") else ""
    with torch.device("meta"):
        numel, frozen = _numel(build_model(description, _freeze(request)))
    note += f"; no data set: {assumed}" if assumed else ""
    return Network(request, description, flops, unfrozen / 3, numel, frozen, note)


def _training(network: Network, world: int) -> cost.Spent:
    """On as many of the ranks as can share the global batch."""
    plan, trainer = network.request.plan, network.request.trainer
    ranks = math.gcd(trainer.global_batch, world)
    local, _, accumulation = local_batching(trainer.global_batch, ranks, trainer.micro_batch)
    nodes, strategy = -(-ranks // plan.ranks_per_node), plan.strategy if ranks > 1 else "single"
    how: dict[str, Any] = {"precision": trainer.precision, "accumulation": accumulation}
    sent = sent_per_step(network.numel, strategy, ranks, nodes, frozen=network.frozen, **how)
    step = max(network.flops * local / (_tflops(network.request) * 1e12), sent / (plan.gb_per_s * 1e9))
    return cost.Spent(ranks, -(-trainer.total_images // trainer.global_batch) * step)


def _extraction_seconds(vqvae: Network, folder: Path) -> float:
    config = configs.load(extract_codes.Config, folder / "extract_codes.yaml")
    try:
        images = Manifest.load(resolve(config.data, "train")).num_samples
    except FileNotFoundError:
        images = vqvae.request.plan.images
    return images * (2 if config.flips else 1) * vqvae.forward_seconds


def _sampling_seconds(plan: PlanConfig, folder: Path, networks: dict[str, Network]) -> float:
    config = configs.load(sample.Config, folder / "sample.yaml")
    classes = plan.classes if config.classes == "all" else len(config.classes)
    samples = config.samples_per_class * classes
    seconds = samples * networks["train_vqvae"].forward_seconds
    for network in networks.values():
        if network.request.stage == "train_prior":
            passes = 2 if config.guidance.get(network.request.trainer.level) else 1
            height, width = network.description["grid"]
            readings = height * (width if network.description["config"]["kind"] == "transformer" else 1)
            read = readings * network.numel * (4 if config.precision == "fp32" else 2)
            seconds += samples * passes * network.forward_seconds
            seconds += -(-samples // config.batch) * read / (plan.read_gb_per_s * 1e9)
    return seconds


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
        "level": trainer.level,
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
