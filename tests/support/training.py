"""A model, a loader and a run small enough to train in milliseconds, for tests of the engine."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqscale import runtime
from vqscale.config import local_batching
from vqscale.engine.checkpoint import find_latest
from vqscale.engine.loop import FitConfig, fit
from vqscale.engine.parallel import make_engine
from vqscale.seeding import generator

WIDTH = 6


@dataclass(frozen=True)
class TinyConfig(FitConfig):
    """`FitConfig` at a size of nothing; `step_seconds` makes a step last long enough to be interrupted."""

    total_images: int = 160
    global_batch: int = 8
    learning_rate: float = 1e-2
    warmup_images: int = 16
    ema_halflife: int = 32
    log_every: int = 8
    save_every: int = 16
    device: str = "cpu"
    threads: int = 1
    step_seconds: float = 0.0


class TinyModel(nn.Module):
    """Two blocks and a head; a buffer that follows its inputs, as a codebook does."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.head = nn.Linear(WIDTH, 3)
        self.register_buffer("average", torch.zeros(WIDTH))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator(seed, index)) * 0.4)

    public_methods = ("features",)

    def wrap_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def features(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.blocks[0](x)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def sample(position: int, seed: int) -> Tensor:
    """The sample at a position: float32 [WIDTH]."""
    return torch.randn(WIDTH, generator=generator(seed, position))


class MemoryLoader:
    """The loader's protocol over `sample`; micro-batches of the ranks' contiguous parts of each global batch."""

    bad_kinds = ("decode", "io", "crc")

    def __init__(self, global_batch: int, micro_batch: int, rank: int, world_size: int, seed: int, bad: set[int]):
        self.global_batch, self.rank, self.seed, self.bad = global_batch, rank, seed, bad
        self.local, self.micro, self.micro_batches_per_step = local_batching(global_batch, world_size, micro_batch)
        self.consumed = 0
        self.counted: dict[str, int] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start = self.consumed + self.rank * self.local
        while True:
            for first in range(start, start + self.local, self.micro):
                positions = range(first, first + self.micro)
                x = torch.stack([sample(p, self.seed) for p in positions])
                flags = torch.tensor([int(p in self.bad) for p in positions], dtype=torch.uint8)
                yield {"x": x, "position": torch.tensor(list(positions)), "bad": flags}
            start += self.global_batch

    def sample_at(self, position: int) -> dict[str, Any]:
        return {"shard": "memory", "key": f"{position:04d}"}

    def advance(self) -> None:
        self.consumed += self.global_batch

    def count_bad(self, counts: Mapping[str, int]) -> None:
        for kind, count in counts.items():
            self.counted[kind] = self.counted.get(kind, 0) + count

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed, "counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed, self.counted = state["consumed"], dict(state["counted"])


def train(
    config: TinyConfig,
    *,
    nan_at: tuple[int, ...] = (),
    bad: tuple[int, ...] = (),
    on_step: Any = None,
    evaluate: Any = None,
) -> dict[str, Any]:
    """One run of a TinyModel; returns its last tensors (whole), positions seen by this rank, and what each step did.

    `nan_at`: positions whose sample makes the loss NaN, on the rank that holds it. `bad`: positions flagged unreadable.
    `on_step(run, images_seen)` is called after every optimizer step.
    """
    with runtime.run(config, "tiny") as run:
        topology = run.topology
        module = TinyModel(config.seed)
        data = (config.global_batch, config.micro_batch, topology.rank, topology.world_size, config.seed, set(bad))
        loader = MemoryLoader(*data)
        engine = make_engine(module, topology, config, loader.micro_batches_per_step)
        consumed: list[int] = []
        applied_steps: list[bool] = []
        biases: list[Tensor] = []
        inputs = torch.zeros(WIDTH, dtype=torch.float64)

        def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            x = batch["x"].to(next(module.parameters()).dtype)
            consumed.extend(batch["position"].tolist())
            inputs.add_(batch["x"].sum(0, dtype=torch.float64))
            loss = (model(x) - x[:, :3]).square().mean()
            if set(batch["position"].tolist()) & set(nan_at):
                loss = loss * float("nan")
            return loss, {"largest": x.abs().max()}

        def after_step(applied: bool, learning_rate: float, images_seen: int) -> dict[str, Tensor]:
            applied_steps.append(applied)
            biases.append(whole(engine.as_checkpoint_tensors({})["model.head.bias"]))
            topology.all_reduce_(inputs)
            module.average.lerp_(inputs.to(module.average.dtype) / config.global_batch, 0.1)
            module.updates.add_(1)
            inputs.zero_()
            if config.step_seconds:
                time.sleep(config.step_seconds)
            if on_step:
                on_step(run, images_seen)
            return {"average": module.average.mean()}

        fit(
            engine,
            loader,
            step,
            config=config,
            run=run,
            description={"width": WIDTH},
            after_step=after_step,
            evaluate=evaluate,
        )
        tensors = {name: whole(tensor) for name, tensor in engine.as_checkpoint_tensors({}).items()}
        return {
            "tensors": tensors,
            "consumed": consumed,
            "applied": applied_steps,
            "biases": biases,
            "optimizer_steps": engine.optimizer_steps,
            "data": loader.state_dict(),
            "engine": type(engine.model).__name__,
        }


def config(run_dir: Path | str, **changes: Any) -> TinyConfig:
    """A TinyConfig without trackers, changed."""
    return replace(TinyConfig(run_dir=str(run_dir)), **{"trackers": [], **changes})


def saved(run_dir: Path) -> dict[str, Tensor]:
    """All tensors of a run's newest checkpoint."""
    latest = find_latest(run_dir / "checkpoints")
    assert latest is not None
    return latest.read("")


def assert_bit_identical(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, a plain one copied."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def losses(run_dir: Path) -> dict[int, float]:
    """Images seen -> loss, from metrics.jsonl."""
    return {line["images_seen"]: line["loss"] for line in metrics(run_dir) if "loss" in line}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
