"""Both models under every strategy, in fp32 and bf16, with and without accumulation, equal a single process, on ranks
that hold what `vqscale plan` says; and so do runs that go on under another strategy and at another world size.

20 steps at the debug size, on gloo ranks. That codebooks are bit-identical on all ranks is asserted by the run itself
at every evaluation, the last one after the last step.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.distributed import run_ranks
from support.plans import assert_memory_as_planned
from support.stages import run_stage
from support.ties import agree_until_a_tie

from vqscale.engine.checkpoint import find_latest

STEPS, BATCH = 20, 32
WORLDS = {"ddp": 2, "fsdp": 2, "hsdp": 4, "zero1": 2, "zero2": 2, "zero3": 2}
# Model, precision and micro-batches per step. Under each strategy every two of the three meet: no code looks at all of
# them, and a single micro-batch is the simplest accumulation. The VQ-VAE, which gathers statistics of its codes over
# micro-batches, accumulates in fp32, where the limits are narrow.
CASES = [
    ("train_vqvae", "fp32", 2),
    ("train_vqvae", "bf16", 1),
    ("train_prior_bottom", "fp32", 1),
    ("train_prior_bottom", "bf16", 2),
]
# bf16 keeps 8 bits: another split of a batch moves a loss by some 1e-3 of it, and a VQ-VAE's nearest codes with it.
LOSS = {"fp32": 1e-5, "bf16": 2e-2}
WEIGHTS = 1e-4  # each tensor in norm, with the same codes all along
# Where codes differ, in bf16 or after a tie: all parameters as one vector, because Adam's first steps have the size of
# the learning rate whatever the gradient's, so that a tensor that started at zero may differ by a tenth. Codebooks are
# left out: one count that differs lets a dead code restart from another vector.
OTHER_CODES = 1e-2

Trained = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def _rank(stage: str, name: str, overrides: list[str]) -> int:
    return run_stage(stage, name, *overrides)


def train(
    run_dir: Path, name: str, strategy: str, precision: str, accumulation: int, *, world: int = 0, steps: int = STEPS
) -> Trained:
    """(the metrics of every step, the last checkpoint's weights and codebooks)."""
    stage = "train_prior" if name.startswith("train_prior") else name
    world = world or WORLDS.get(strategy, 1)
    total = steps * BATCH
    overrides = [
        f"run_dir={run_dir}",
        f"strategy={strategy}",
        f"precision={precision}",
        f"micro_batch={BATCH // world // accumulation}",
        f"total_images={total}",
        f"global_batch={BATCH}",
        f"log_every={BATCH}",
        f"evaluate_every={total}",
        f"save_every={total}",
        "workers=0",
    ]
    assert run_ranks(_rank, world, stage, name, overrides, timeout=300) == [0] * world
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    command = json.loads((run_dir / "command.json").read_text())
    assert (command["strategy"], command["world_size"]) == (strategy, world)
    latest = find_latest(run_dir / "checkpoints")
    assert latest is not None and latest.images_seen == total
    return [line for line in lines if "loss" in line], latest.read("model.")


@pytest.fixture(scope="module")
def alone(whole_chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Trained]:
    """What a single process does with the whole batch at once, trained at the first call."""
    done: dict[tuple[str, str], Trained] = {}

    def get(name: str, precision: str) -> Trained:
        if (name, precision) not in done:
            run_dir = tmp_path_factory.mktemp("alone") / name
            done[name, precision] = train(run_dir, name, "single", precision, 1)
        return done[name, precision]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision", "accumulation"), CASES)
@pytest.mark.parametrize("strategy", list(WORLDS))
def test_a_strategy_trains_as_a_single_process(
    chain: Path, alone: Callable[[str, str], Trained], name: str, strategy: str, precision: str, accumulation: int
) -> None:
    run_dir, world = chain.parent / "run", WORLDS[strategy]
    assert_alike(train(run_dir, name, strategy, precision, accumulation), alone(name, precision), precision)
    words = [f"precision={precision}", f"micro_batch={BATCH // world // accumulation}", f"global_batch={BATCH}"]
    assert_memory_as_planned(run_dir, name, strategy, world, *words)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_the_transformer_trains_as_in_a_single_process(
    chain: Path, alone: Callable[[str, str], Trained], strategy: str
) -> None:
    name = "train_prior_bottom_transformer"
    assert_alike(train(chain.parent / "run", name, strategy, "fp32", 2), alone(name, "fp32"), "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "legs",
    [
        [("ddp", 2), ("single", 1), ("ddp", 2)],
        [("fsdp", 2), ("fsdp", 4), ("fsdp", 2)],
        [("fsdp", 2), ("ddp", 2), ("single", 1)],
        [("zero2", 2), ("zero2", 1), ("hsdp", 4)],
    ],
    ids=lambda legs: "-".join(f"{strategy}@{world}" for strategy, world in legs),
)
@pytest.mark.parametrize("name", ["train_vqvae", "train_prior_bottom"])
def test_a_run_goes_on_at_another_world_size_and_strategy(
    chain: Path, alone: Callable[[str, str], Trained], name: str, legs: list[tuple[str, int]]
) -> None:
    for steps, (strategy, world) in zip((7, 13, STEPS), legs, strict=True):
        continued = train(chain.parent / "run", name, strategy, "fp32", 1, world=world, steps=steps)
    assert_alike(continued, alone(name, "fp32"), "fp32")


def assert_alike(trained: Trained, single: Trained, precision: str) -> None:
    (steps, weights), (expected_steps, expected) = trained, single
    assert len(steps) == STEPS
    same_codes = False
    if precision == "fp32":
        same_codes = agree_until_a_tie(steps, expected_steps, LOSS["fp32"])
    else:
        losses, others = ([step["loss"] for step in some] for some in (steps, expected_steps))
        assert losses == pytest.approx(others, rel=LOSS[precision], abs=0)
    assert weights.keys() == expected.keys()
    differences, norms = {}, {}
    for key, weight in expected.items():
        assert weights[key].dtype == weight.dtype == torch.float32 or not weight.is_floating_point()
        differences[key] = float((weights[key].double() - weight.double()).norm())
        norms[key] = float(weight.double().norm())
    if same_codes:
        assert {key for key in norms if differences[key] >= WEIGHTS * max(norms[key], 1e-3)} == set()
    else:
        trained = [key for key in norms if ".quantizer." not in key]
        whole = math.hypot(*(differences[key] for key in trained)) / math.hypot(*(norms[key] for key in trained))
        assert 0 < whole < OTHER_CODES
