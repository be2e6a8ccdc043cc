"""What more ranks and shards cost: training steps at 1, 2 and 4 ranks, file-system calls at 1,024.

    python benchmarks/scale.py [--json FILE] [--quick] [--minutes M] [--worlds 2 4] [--strategies ddp fsdp]
                               [--shards 10000 500000] [--ranks 8 64 1024] [--models 1 4 8]

In: nothing. Out: seconds per step with the same batch per rank, one thread each, and rows `<strategy>/<ranks>`: images
per second of all ranks over `min(ranks, cores)` times those of one rank. Ranks beyond the cores share them, so 4 ranks
on 2 cores can reach 1.0 at best by taking twice as long; what is lost below 1.0 is communication and waiting. Ranks of
one machine talk through gloo and memory: this says nothing about a network. The worlds take turns.

Rows `load/<shards>`: seconds to read a description of so many shards, and the memory that no other process shares. Rows
`calls/<before step 1, or evaluation>/<shards>/<ranks>/<workers>`: what one of so many simulated ranks asks of the data
set's folder; the most of the first and the last one. `--worlds` without a number leaves the steps out, `--shards` the
rest.

Rows `model/<hashed, or read>/<ranks>`, with `--models`: megabytes of a VQ-VAE's checkpoint of as many files that the
busiest rank hashes, or reads as tensors, to have the model; without sharing every rank does what `alone` says.
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from measure import arguments, at_least, at_most, finish, median, timed
from train_step import VQVAESteps, Way

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from support.distributed import run_ranks  # noqa: E402
from support.loads import load_on_ranks, save_run  # noqa: E402
from support.many_shards import calls_before_step_1, calls_of_an_evaluation, make_many_shards  # noqa: E402

from vqscale.config import StageConfig  # noqa: E402
from vqscale.data.shards import Manifest  # noqa: E402
from vqscale.engine.parallel import TorchEngine  # noqa: E402
from vqscale.topology import bring_up, take_down  # noqa: E402

WARM_UP = 1
MOST = 24  # measured steps of each
MOST_CALLS = 2000  # of a rank before step 1
MEASURED = {"before step 1": calls_before_step_1, "evaluation": calls_of_an_evaluation}


def _rank(rank: int, world: int, strategy: str, port: int, args: Any, answers: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    topology = bring_up(StageConfig(run_dir="", strategy=strategy, device=args.device, threads=1))
    task = VQVAESteps(Way("fp32"), args.quick, args.device)
    task.model.train()
    optimizer = {"betas": (0.9, 0.999), "weight_decay": 0.0}
    engine = TorchEngine(task.model, topology, precision="fp32", accumulation=1, optimizer=optimizer)

    def step(number: int) -> None:
        engine.begin_micro_batch(last=True)
        engine.backward(task.loss(engine.model, number))
        engine.step(3e-4, 1.0)
        topology.all_reduce_(torch.zeros(1, device=topology.device))  # the step ends when the last rank's ends

    seconds = [timed(lambda number=number: step(number)) for number in range(WARM_UP + args.steps)]  # type: ignore[misc]
    if topology.is_main:
        answers.put(seconds[WARM_UP:])
    take_down(orderly=True)


def run_world(strategy: str, world: int, port: int, args: Any) -> list[float]:
    """Seconds of each measured step."""
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.start_processes(_rank, (world, strategy, port, args, answers), nprocs=world, start_method="spawn")
    return list(answers.get())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, minutes=8)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each start")
    parser.add_argument("--worlds", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--shards", nargs="*", type=int, default=[10_000, 500_000])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 1024])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 4, 16])
    parser.add_argument("--models", nargs="*", type=int, default=[])
    parser.add_argument("--port", type=int, default=29_541)
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    for shards in args.shards[: 1 if args.quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            merge(found, calls_of_ranks(Path(folder) / "set", shards, args))
    for ranks in args.models:
        with tempfile.TemporaryDirectory() as folder:
            merge(found, {"model": bytes_of_a_model(folder, ranks)})
    if args.worlds:
        found |= steps_of_ranks(args)
    return finish(args, found)


def steps_of_ranks(args: Any) -> dict[str, Any]:
    """The rows of training steps."""
    cells = [("single", 1), *itertools.product(args.strategies, args.worlds)]
    seconds: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    ports, end = itertools.count(args.port), time.perf_counter() + 60 * args.minutes
    while not seconds[cells[0]] or (time.perf_counter() < end and len(seconds[cells[0]]) < MOST):
        for strategy, world in cells:
            seconds[strategy, world] += run_world(strategy, world, next(ports), args)
    return rows(seconds)


def calls_of_ranks(folder: Path, shards: int, args: Any) -> dict[str, Any]:
    """The rows of a made-up data set of so many shards."""
    make_many_shards(folder, shards, max(args.ranks))
    before = private_megabytes()
    loaded: list[Manifest] = []
    seconds = timed(lambda: loaded.append(Manifest.load(folder)))
    memory = private_megabytes() - before
    tree: dict[str, Any] = {"load": {f"{shards}": at_most(0.3, seconds, private_megabytes=memory)}, "calls": {}}
    for (name, measure), ranks, workers in itertools.product(MEASURED.items(), args.ranks, args.workers):
        most = max((measure(folder, rank, ranks, workers) for rank in (0, ranks - 1)), key=lambda calls: calls.total)
        details = {"seconds": most.seconds, "megabytes": most.bytes_read / 1e6, **most.by_kind()}
        row = at_most(MOST_CALLS if ranks >= 64 else None, most.total, **details)
        tree["calls"].setdefault(name, {}).setdefault(f"{shards}", {}).setdefault(f"{ranks}", {})[f"{workers}"] = row
    return tree


def bytes_of_a_model(run_dir: str, ranks: int) -> dict[str, Any]:
    """The rows of a run that so many ranks saved, and that they take a model from."""
    run_ranks(save_run, ranks, run_dir, 256)
    loads = {shared: run_ranks(load_on_ranks, ranks, run_dir, shared, {}) for shared in (True, False)}
    tree: dict[str, Any] = {}
    for what in ("hashed", "read"):
        most, alone = (max(load[what] for load in loads[shared]) / 1e6 for shared in (True, False))
        print(f"{ranks} ranks, megabytes {what} by the busiest: {most:.1f}, not shared {alone:.1f}")
        tree[what] = {f"{ranks}": at_most(None, most, limit=alone / ranks, alone=alone)}
    return tree


def private_megabytes() -> float:
    """Memory of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1e3


def merge(tree: dict[str, Any], more: dict[str, Any]) -> None:
    """Add the leaves of another tree."""
    for key, node in more.items():
        if isinstance(tree.get(key), dict):
            merge(tree[key], node)
        else:
            tree[key] = node


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
