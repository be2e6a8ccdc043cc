"""AdamW with state from the start, and the learning rate as a function of images seen."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vqscale.engine.tensors import Tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate_at(images_seen: int, *, peak: float, warmup: int, schedule: str, total: int, final: float) -> float:
    """Learning rate of the step that begins at `images_seen`: linear warm-up, then constant or cosine.

    All positions are counted in images; a cosine ends at `final` · `peak`. Raises ValueError for an unknown schedule.
    """
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"schedule={schedule}: choose constant or cosine")
    if images_seen < warmup:
        return peak * (images_seen + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    progress = min(1.0, (images_seen - warmup) / max(1, total - warmup))
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: weight decay acts on matrices and kernels, not on biases and gains."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def fresh_state(parameter: Tensor) -> Tensors:
    """Adam's state of a parameter before the first step."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step} | {moment: torch.zeros_like(parameter) for moment in MOMENTS}


def build_adamw(
    parameters: Iterable[nn.Parameter], *, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) whose two moments exist before the first step.

    So memory runs out at start-up if at all, and a checkpoint has the same tensors at any time.
    """
    groups = adamw_groups(parameters, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    for parameter in (p for group in groups for p in group["params"]):
        optimizer.state[parameter] = fresh_state(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def moments(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> Tensors:
    """The two moments under `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for parameter, name in names.items()
        for moment in MOMENTS
    }
