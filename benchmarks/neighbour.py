"""Training and sampling on all cores, alone and beside a busy program, by how OpenMP's threads wait for each other.

    python benchmarks/neighbour.py [--json FILE] [--quick] [--minutes M] [--spins N ...] [--work NAME ...]

In: nothing. OpenMP's threads look for each other at the end of every operation, and after so many looks they sleep.
Rows, for training the VQ-VAE and the top prior of configs/clipart64 and for sampling that prior, in fp32, as stages do
(`vqscale/waiting.py`) and for the fixed numbers of looks of --spins: `<work>/alone`, the rate over that of OpenMP as it
is; `<work>/beside`, the rate beside one busy single-threaded program over the rate alone; `by default`, of OpenMP as it
is. The stages' way and OpenMP's own take turns in one process, since two processes of the same program differ by some
percent for good; a fixed number needs a process of its own, so all are started anew several times, each first in turn.
"""

import contextlib
import functools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measure import Row, arguments, at_least, finish, median, ratio, timed
from train_step import Trainer, Way

from vqscale.config import load
from vqscale.models.sampling import Options, RowSampler, draw_uniforms
from vqscale.stages.train_prior import TrainPriorConfig
from vqscale.topology import cores, keep_freed_memory
from vqscale.waiting import PERIOD, adapted

CONFIG = Path(__file__).parents[1] / "configs" / "clipart64" / "train_prior_top.yaml"
BATCH, SIDE, GRID = 64, 64, 8  # of configs/clipart64
OURS, DEFAULT = "adapted", "by default"  # ways to wait; others are numbers of looks
STARTS, ROUNDS, TURN = 4, 60, 1.0  # of every process; at most; seconds at least
SETTLING = 3 * PERIOD  # seconds after which threads wait as they will


def vqvae(quick: bool) -> Trainer:
    return Trainer("vqvae", Way("fp32"), quick, batch=8 if quick else BATCH, side=SIDE)


def prior(quick: bool) -> Trainer:
    config = load(TrainPriorConfig, CONFIG, []).model
    return Trainer("prior", Way("fp32"), quick, batch=8 if quick else BATCH, side=GRID, config=config)


def sampling(quick: bool) -> Callable[[], Any]:
    """Draws the middle row of codes, again and again."""
    steps, row = prior(quick).steps, GRID // 2
    batch = steps.batch
    state = steps.model.eval().sampling_weights(torch.float32).state(batch)
    sampler, ones = RowSampler(state, Options(1.0, 0, 1.0, 0.0)), torch.ones(GRID, dtype=torch.float64)
    uniforms = draw_uniforms(0, 0, torch.arange(batch), GRID)
    state.reset(torch.arange(batch), [])
    return torch.inference_mode()(functools.partial(sampler.draw, row, uniforms, ones))


WORK: dict[str, Callable[[bool], Callable[[], Any]]] = {"vqvae": vqvae, "prior": prior, "sampling": sampling}


def serve(work: str, quick: bool, pipe: Connection) -> None:
    """In a process of its own: one turn per message, the way to wait, answered by steps per second."""
    torch.set_num_threads(cores())
    keep_freed_memory()
    act = WORK[work](quick)
    act()
    pipe.send(True)
    while way := pipe.recv():
        with adapted(torch.device("cpu")) if way == OURS else contextlib.nullcontext():
            for length in (SETTLING, TURN):
                end, seconds = time.perf_counter() + (0 if quick else length), [timed(act)]
                while time.perf_counter() < end:
                    seconds.append(timed(act))
        pipe.send(len(seconds) / sum(seconds))


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """One busy thread, wherever the kernel puts it."""
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as busy:
        busy.stdout.readline()
        try:
            yield
        finally:
            busy.kill()


@contextlib.contextmanager
def server(work: str, spins: str, quick: bool) -> Iterator[Callable[[str], float]]:
    """Asks for a turn of a process whose threads look so often, or as OpenMP has it (""), and wait in this way."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):  # read when the process loads torch
        os.environ.pop(name, None)
    if spins:
        os.environ["GOMP_SPINCOUNT"] = spins
    process = context.Process(target=serve, args=(work, quick, theirs), daemon=True)
    process.start()
    pipe.recv()  # one after the other: busy threads of one would slow the first step of the next

    def turn(way: str) -> float:
        pipe.send(way)
        return float(pipe.recv())

    yield turn
    pipe.send("")
    process.join()


def measure(work: str, ways: Sequence[str], args: Any, seconds: float) -> dict[str, Row]:
    """The rows of one kind of work."""
    starts, rounds = (1, 2) if args.quick else (STARTS, ROUNDS)
    alone, beside = ({way: list[float]() for way in ways} for _ in range(2))
    looks = ["", *(way for way in ways if way not in (OURS, DEFAULT))]
    for start in range(starts):
        first, least = start % len(looks), len(alone[DEFAULT]) + 1
        with contextlib.ExitStack() as stack:
            order = [*looks[first:], *looks[:first]]
            turns = {spins: stack.enter_context(server(work, spins, args.quick)) for spins in order}
            end = time.perf_counter() + seconds / starts
            while len(alone[DEFAULT]) < least or (time.perf_counter() < end and len(alone[DEFAULT]) < rounds):
                ways = ways[::-1]
                for way in ways:
                    alone[way].append(turns.get(way, turns[""])(way))
                for way in ways:
                    with neighbour():
                        beside[way].append(turns.get(way, turns[""])(way))
    rows = {}
    for way in ways:
        cost = ratio(alone[way], alone[DEFAULT])
        print(f"{work}, {way}: {median(alone[way]):.3g} a second, {cost:.3f} of the default", flush=True)
        ours, name = way == OURS, {OURS: "", DEFAULT: " by default"}.get(way, f" {way} looks")
        if way != DEFAULT:
            rows[f"{work}/alone{name}"] = at_least(0.97 if ours else None, cost)
        rows[f"{work}/beside{name}"] = at_least(0.5 if ours else None, ratio(beside[way], alone[way]))
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, minutes=1.5, devices=("cpu",))
    parser.add_argument("--spins", nargs="+", type=int, default=[], help="fixed numbers of looks, too")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    args = parser.parse_args(argv)
    ways = [DEFAULT, OURS, *map(str, args.spins)]
    tree: dict[str, Any] = {}
    for work in args.work:
        tree |= measure(work, ways, args, 60 * args.minutes / len(args.work))
    return finish(args, tree)


if __name__ == "__main__":
    main()
