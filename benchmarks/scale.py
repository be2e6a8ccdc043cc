"""What more ranks cost: training steps at 1, 2 and 4 ranks with the same batch per rank, one thread each.

    python benchmarks/scale.py [--json FILE] [--quick] [--minutes M] [--worlds 2 4] [--strategies ddp fsdp]

In: nothing. Out: seconds per step, and rows `<strategy>/<ranks>`: images per second of all ranks over
`min(ranks, cores)` times those of one rank. Ranks beyond the cores share them, so 4 ranks
on 2 cores can reach 1.0 at best by taking twice as long; what is lost below 1.0 is communication and waiting. Ranks of
one machine talk through gloo and memory: this says nothing about a network. The worlds take turns.
"""

import itertools
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from measure import arguments, at_least, finish, median, timed
from train_step import VQVAESteps, Way

from vqscale.config import StageConfig
from vqscale.engine.parallel import TorchEngine
from vqscale.topology import bring_up, take_down

WARM_UP = 1
MOST = 24  # measured steps of each


def _rank(rank: int, world: int, strategy: str, port: int, steps: int, quick: bool, answers: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    topology = bring_up(StageConfig(run_dir="", strategy=strategy, device="cpu", threads=1))
    task = VQVAESteps(Way("fp32"), quick)
    task.model.train()
    optimizer = {"betas": (0.9, 0.999), "weight_decay": 0.0}
    engine = TorchEngine(task.model, topology, precision="fp32", accumulation=1, optimizer=optimizer)

    def step(number: int) -> None:
        engine.begin_micro_batch(last=True)
        engine.backward(task.loss(engine.model, number))
        engine.step(3e-4, 1.0)
        topology.all_reduce_(torch.zeros(1))  # the step ends when the last rank's ends

    seconds = [timed(lambda number=number: step(number)) for number in range(WARM_UP + steps)]  # type: ignore[misc]
    if topology.is_main:
        answers.put(seconds[WARM_UP:])
    take_down(orderly=True)


def run_world(strategy: str, world: int, port: int, args: Any) -> list[float]:
    """Seconds of each measured step."""
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.start_processes(
        _rank, (world, strategy, port, args.steps, args.quick, answers), nprocs=world, start_method="spawn"
    )
    return list(answers.get())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, minutes=8)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each start")
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--port", type=int, default=29_541)
    args = parser.parse_args(argv)
    cells = [("single", 1), *itertools.product(args.strategies, args.worlds)]
    seconds: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    ports, end = itertools.count(args.port), time.perf_counter() + 60 * args.minutes
    while not seconds[cells[0]] or (time.perf_counter() < end and len(seconds[cells[0]]) < MOST):
        for strategy, world in cells:
            seconds[strategy, world] += run_world(strategy, world, next(ports), args)
    return finish(args, rows(seconds))


def rows(seconds: dict[tuple[str, int], list[float]]) -> dict[str, Any]:
    """The rows of the measured steps' seconds; those of one rank come first."""
    cores, (alone, *others) = len(os.sched_getaffinity(0)), seconds.items()
    print(f"{cores} cores are shared by all ranks; alone {median(alone[1]):.3f} s per step")
    found = {}
    for (strategy, world), measured in others:
        value = world * median(alone[1]) / median(measured) / min(world, cores)
        print(f"{strategy} on {world} ranks: {median(measured):.3f} s per step, the batch per rank unchanged")
        found[f"{strategy}/{world}"] = at_least(None, value, limit=1.0, step_seconds=median(measured))
    return found


if __name__ == "__main__":
    main()
