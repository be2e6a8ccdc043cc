"""How large a model, how long a training and how many samples fit into the time there is; no command of its own.

In: a stage's config, seconds.  Out: `key=value` words for it, from a few steps of the real model on this machine.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqscale.config import load
from vqscale.data.shards import Manifest, resolve
from vqscale.models.init import initialise
from vqscale.stages import evaluate, plan, sample, train_classifier, train_prior, train_vqvae
from vqscale.topology import cores, device_of
from vqscale.training import blank_batch, build_model

TRAINERS: dict[str, Any] = {
    "train_vqvae": train_vqvae,
    "train_prior": train_prior,
    "train_classifier": train_classifier,
}
# Fewer steps teach it hardly anything.
STEPS = {"train_vqvae": 1_500, "train_prior": 2_000, "train_classifier": 100}
_BATCHES = (64, 32, 16)
_NARROWER = (1, 2, 4)  # what the widths are divided by
_LEAST_WIDTHS = {
    "train_vqvae": {"hidden": 32, "residual_hidden": 16},
    "train_prior": {"hidden": 32, "residual": 32},
    "train_classifier": {"hidden": 16},
}
_EPOCHS = {"train_vqvae": 1_000, "train_prior": 200, "train_classifier": 100}  # more would only repeat a small data set
# Of a training step over its forward and backward pass: data, codebooks, EMA, evaluations, checkpoints.
_OVERHEAD = 1.35
_START = 12.0  # seconds until a stage's first step
_SAMPLES = 400  # enough to look at and for a first FID; evaluation takes as long as sampling


@dataclass(frozen=True)
class Size:
    """Words for the stage, the seconds that it will take, and the share of the least useful training that it is.

    in_full: seconds that it would take as its config is.
    """

    words: list[str]
    seconds: float
    share: float = 1.0
    in_full: float = 0.0


def size_trainer(stage: str, path: Path, words: Sequence[str], seconds: float) -> Size:
    """The widest model that `STEPS` steps fit for, and as many images as there is time for.

    Raises ValueError and FileNotFoundError as the stage does.
    """
    seconds = max(seconds - _START, 1.0)
    config = load(TRAINERS[stage].Config, path, words)
    smallest = min(_BATCHES[-1], config.global_batch)
    narrowed, costs = list[str](), list[float]()
    for divisor in _NARROWER:
        narrowed = _narrowed(stage, config.model, divisor)
        costs.append(cost := seconds_per_image(stage, path, [*words, "threads=0", *narrowed]))
        if seconds / cost >= STEPS[stage] * smallest:
            break
    num_images = Manifest.load(resolve(config.data, "train")).num_samples
    images = min(seconds / cost, config.total_images, _EPOCHS[stage] * num_images)
    batch = next((b for b in _BATCHES if b <= config.global_batch and images / b >= STEPS[stage]), smallest)
    total = max(1, int(images / batch)) * batch
    own = {"train_vqvae": _of_vqvae, "train_prior": _of_prior}.get(stage, lambda *_: [])
    chosen = ["threads=0", *narrowed, *_schedule(total, batch, config), *own(config, num_images)]
    share = seconds / (cost * STEPS[stage] * smallest)
    return Size(chosen, total * cost + _START, share, in_full=config.total_images * costs[0])


def _narrowed(stage: str, model: Any, divisor: int) -> list[str]:
    heads, widths = getattr(model, "heads", 1), _LEAST_WIDTHS[stage]
    return [f"model.{key}={_narrow(getattr(model, key), divisor, least, heads)}" for key, least in widths.items()]


def _narrow(width: int, divisor: int, least: int, multiple: int) -> int:
    narrow = min(width, max(least, width // divisor))
    return width if narrow == width else max(1, narrow // multiple) * multiple


def _schedule(total: int, batch: int, config: Any) -> list[str]:
    return [
        f"total_images={total}",
        f"global_batch={batch}",
        "schedule=cosine",
        "final_learning_rate=0.02",
        f"warmup_images={total // 20}",
        f"ema_halflife={max(batch, total // 25)}",
        f"log_every={max(batch, total // 50)}",
        f"save_every={max(batch, total // 4)}",
        f"evaluate_every={max(batch, total // 3)}",
        f"evaluate_images={min(config.evaluate_images or 256, 256)}",
    ]


def _of_vqvae(config: Any, num_images: int) -> list[str]:
    """A small data set fills a small codebook, which is easier to model."""
    codes = 128 if num_images < 1_000 else 256 if num_images < 4_000 else 512
    return [
        f"learning_rate={max(config.learning_rate, 1e-3):g}",
        f"model.quantizer.num_codes={min(codes, config.model.quantizer.num_codes)}",
        f"init_images={min(config.init_images, num_images, 512)}",
    ]


def _of_prior(config: Any, _num_images: int) -> list[str]:
    """A short training of a narrow model takes larger steps, and needs little against overfitting."""
    return [f"learning_rate={max(config.learning_rate, 2e-3):g}", f"model.dropout={min(config.model.dropout, 0.05):g}"]


def seconds_per_image(stage: str, path: Path, words: Sequence[str]) -> float:
    """Of training, measured on this machine with the model of this config; the data set must be there."""
    config: Any = load(TRAINERS[stage].Config, path, words)
    torch.set_num_threads(config.threads or cores())
    batch = min(32, config.global_batch)
    request = plan.Request(plan.PlanConfig(), stage, config, path)
    description = _description(request)
    model = build_model(description, getattr(config, "freeze", ()))
    initialise(model, config.seed)
    model.train().to(device_of(config.device))
    optimizer = torch.optim.AdamW(model.parameters())
    step = _step(request, description, model, batch)

    def train_once() -> None:
        step().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _seconds(train_once, at_least=1.0) / batch * _OVERHEAD


def _seconds(call: Callable[[], object], at_least: float) -> float:
    """Of one call, the first one not counted, from as many as take `at_least` seconds."""

    def once() -> None:
        call()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    once()
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < at_least:
        once()
        calls += 1
    return passed / calls


def _description(request: plan.Request) -> dict[str, Any]:
    if request.stage == "train_classifier":
        manifest = Manifest.load(resolve(request.trainer.data, "train"))
        return train_classifier.model_description(request.trainer, manifest, None, None)
    return plan.describe(request)[0]


def _step(request: plan.Request, description: dict[str, Any], model: Any, batch: int) -> Callable[[], Tensor]:
    if request.stage != "train_classifier":
        return plan.training_loss(request, description, model, batch)
    with next(model.parameters()).device:
        images = blank_batch(description, batch)
    return lambda: train_classifier.training_step(request.trainer, None, None)(model, images)[0]


def size_samples(path: Path, words: Sequence[str], seconds: float) -> Size:
    """As many samples of each class as there is time for."""
    config = load(sample.SampleConfig, path, words)
    torch.set_num_threads(config.threads or cores())
    device = device_of(config.device)
    chain = sample.load_chain(config, device)
    few = 8
    label, ids = (torch.zeros(few, dtype=torch.int64, device=device) for _ in range(2))
    with torch.inference_mode():
        cost = _seconds(lambda: sample.draw(config, chain, label, ids), at_least=0.5) / few
    classes = len(chain.classes)
    fitting = int(min(max(seconds - _START, 1.0) / cost, _SAMPLES) / classes)
    count = max(1, min(config.samples_per_class, fitting))
    words = [f"samples_per_class={count}", f"batch={min(config.batch, count * classes)}"]
    return Size(words, count * classes * cost + _START)


def size_evaluation(path: Path, words: Sequence[str]) -> Size:
    """Bounds on what is read for the figures."""
    config = load(evaluate.Config, path, words)
    limits = {"reference_images": 1_000, "nll_images": 512}
    return Size([f"{key}={min(getattr(config, key) or limit, limit)}" for key, limit in limits.items()], 0.0)
