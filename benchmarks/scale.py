"""What more ranks cost: training steps at 1, 2 and 4 ranks with the same batch per rank, one thread each.

    python benchmarks/scale.py [--json FILE] [--quick] [--rounds N] [--worlds 1 2 4] [--strategies ddp fsdp]

In: nothing. Out: seconds per step, and with --json {"<strategy>/<ranks>": {"value", "goal", "limit"}}: value = images
per second of all ranks over `min(ranks, cores)` times those of one rank. Ranks beyond the cores share them, so 4 ranks
on 2 cores can reach 1.0 at best by taking twice as long; what is lost below 1.0 is communication and waiting. Ranks of
one machine talk through gloo and memory: this says nothing about a network. The worlds take turns.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from measure import arguments, median, print_rows, timed, write
from train_step import VQVAESteps, Way

from vqscale.config import StageConfig
from vqscale.engine.parallel import TorchEngine
from vqscale.topology import bring_up, take_down

WARM_UP = 2


def _rank(rank: int, world: int, strategy: str, port: int, steps: int, quick: bool, answers: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    place = bring_up(StageConfig(run_dir="", strategy=strategy if world > 1 else "single", device="cpu", threads=1))
    task = VQVAESteps(Way("fp32"), quick)
    task.model.train()
    optimizer = {"betas": (0.9, 0.999), "weight_decay": 0.0}
    engine = TorchEngine(task.model, place, precision="fp32", accumulation=1, optimizer=optimizer)

    def step(number: int) -> None:
        engine.begin(last=True)
        engine.backward(task.loss(engine.model, number))
        engine.step(3e-4, 1.0)
        place.all_reduce_(torch.zeros(1))  # the step ends when the last rank's ends

    seconds = [timed(lambda number=number: step(number)) for number in range(WARM_UP + steps)]  # type: ignore[misc]
    if place.is_main:
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
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="how often each number of ranks is started")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each start")
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--port", type=int, default=29_541)
    args = parser.parse_args(argv)
    cores = len(os.sched_getaffinity(0))
    seconds: dict[tuple[str, int], list[float]] = {}
    cells = [(strategy, world) for strategy in args.strategies for world in args.worlds]
    for number in range(args.rounds):
        for index, (strategy, world) in enumerate(cells):
            port = args.port + number * len(cells) + index
            seconds.setdefault((strategy, world), []).extend(run_world(strategy, world, port, args))
    rows: dict[str, Any] = {}
    for (strategy, world), measured in seconds.items():
        alone = median(seconds[strategy, args.worlds[0]]) / args.worlds[0]
        value = world * alone / median(measured) / min(world, cores)
        print(f"{strategy} on {world} ranks: {median(measured):.3f} s per step of {VQVAESteps.batch} images per rank")
        rows[f"{strategy}/{world}"] = {"value": value, "goal": None, "limit": 1.0, "step_seconds": median(measured)}
    print(f"{cores} cores are shared by all ranks")
    print_rows(rows)
    write(args.json, rows)
    return rows


if __name__ == "__main__":
    main()
