"""Optimizer steps of a paper-size prior on this machine: do they fit, is the loss what it must be, does it move?

    python benchmarks/paper_step.py [--json FILE] [--quick] [--device cuda] [--ranks N] [--steps N] [--config FILE]
                                    [key=value ...]

In: a prior's config, by default the paper's top prior (configs/imagenet256), and its overrides. Out: the losses, and
the peak memory of each rank beside what `vqscale plan` expects; with --json the same numbers. One sample of random
codes per rank, the same at every step, in fp32 (or `precision=bf16`) with checkpointing, at the peak learning rate: the
first loss must be near ln K and the later ones below it. With --ranks 2 or more the model is sharded by FSDP2.

    python benchmarks/paper_step.py precision=bf16                     # 875M parameters: some 14 GiB
    python benchmarks/paper_step.py --ranks 2 model.residual=680       # 301M parameters on two ranks

Memory is the high-water mark of the process less what it held before the model was built. It counts what the plan does
not: the allocator's slack, and buffers of oneDNN's convolutions.
"""

import math
import multiprocessing
import os
import resource
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import arguments, timed, write

from vqscale.config import StageConfig
from vqscale.engine.parallel import make_engine
from vqscale.models.init import initialise
from vqscale.sources import build
from vqscale.stages import plan, train_prior
from vqscale.topology import Topology, bring_up, take_down

PAPER = Path(__file__).parents[1] / "configs" / "imagenet256" / "train_prior_top.yaml"
QUICK = ["model.hidden=64", "model.residual=64", "model.layers=5", "model.output_layers=2"]
GIB = 1 << 30


def request_of(args: Any) -> plan.Request:
    """The plan for this config on this many ranks, one sample each."""
    strategy = "fsdp" if args.ranks > 1 else "single"
    batch = [f"global_batch={args.ranks}", "micro_batch=1", f"world={args.ranks}", f"strategy={strategy}"]
    fixed = ["precision=fp32", "warmup_images=0", "ema_halflife=0", "model.activation_checkpointing=true"]
    return plan.load([str(args.config), *batch, *fixed, *(QUICK if args.quick else []), *args.words])


def peak_bytes() -> int:
    """The most that the process has held, on the GPU where there is one in use."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_batch(model: Any, level: str, topology: Topology) -> dict[str, torch.Tensor]:
    """One sample of random codes, another on every rank."""
    rng = torch.Generator().manual_seed(topology.rank)
    names = {1: ["top"], 2: ["top", level], 3: ["top", "middle", "bottom"]}[len(model.upper_grids) + 1]
    grids = zip(names, [*model.upper_grids, model.grid], strict=True)
    batch = {name: torch.randint(model.num_codes, (1, *grid), generator=rng) for name, grid in grids}
    label = torch.randint(model.num_classes, (1,), generator=rng)
    batch |= {"label": label, "position": torch.tensor([topology.rank])}
    return {name: value.to(topology.device) for name, value in batch.items()}


def train(request: plan.Request, description: dict[str, Any], steps: int, topology: Topology) -> dict[str, Any]:
    """Mean losses over all ranks, seconds of each step, this rank's peak memory."""
    config = request.trainer
    assert isinstance(config, train_prior.TrainPriorConfig)
    before = peak_bytes()
    with torch.device("meta"):
        model: Any = build(description)
    engine = make_engine(model, topology, config, 1, partial(initialise, seed=config.seed))
    batch, step_fn = random_batch(model, config.level, topology), train_prior.training_step(config)
    losses, seconds = [], []

    def step() -> None:
        engine.begin_micro_batch(last=True)
        loss, _ = step_fn(engine.model, batch)
        engine.backward(loss)
        losses.append(float(topology.all_reduce_(loss.detach().clone())) / topology.world_size)
        applied, _ = engine.step(config.learning_rate, config.max_norm)
        assert applied, "the gradient is not finite"

    engine.module.train()
    for _ in range(steps):
        seconds.append(timed(step))
    return {"losses": losses, "seconds": seconds, "peak_bytes": topology.gather(peak_bytes() - before)}


def _rank(rank: int, args: Any, answers: Any) -> None:
    if args.ranks > 1:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": args.ranks, "LOCAL_WORLD_SIZE": args.ranks}
        os.environ |= {name: str(value) for name, value in variables.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    request = request_of(args)
    topology = bring_up(StageConfig(device=args.device, strategy=request.plan.strategy))
    found = train(request, plan.describe(request)[0], args.steps, topology)
    if topology.is_main:
        answers.put(found)
    take_down(orderly=True)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__)
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides of the config")
    parser.add_argument("--config", type=Path, default=PAPER)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--port", type=int, default=29_561)
    args = parser.parse_intermixed_args(argv)
    request = request_of(args)
    description, _ = plan.describe(request)
    with torch.device("meta"):
        model: Any = build(description)
    expected = plan.column(request, description, model, args.ranks, flops=1)["total, checkpointed"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, args, answers)) for rank in range(args.ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a rank ended with {process.exitcode}")
    found = answers.get()
    result = found | {"parameters": parameters, "ranks": args.ranks, "ln_k": math.log(model.num_codes)}
    result |= {"planned_gib": expected, "peak_gib": [size / GIB for size in found["peak_bytes"]]}
    print(f"{parameters:,} parameters on {args.ranks} rank(s), {args.config} {' '.join(args.words)}")
    print(f"losses {', '.join(f'{x:.4f}' for x in result['losses'])} (ln K = {result['ln_k']:.4f})")
    print(f"seconds per step {', '.join(f'{x:.1f}' for x in result['seconds'])}")
    print(f"peak GiB per rank {', '.join(f'{x:.2f}' for x in result['peak_gib'])}; planned {expected:.2f}")
    write(args.json, result)
    return result


if __name__ == "__main__":
    main()
