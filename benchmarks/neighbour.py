"""Training and sampling on all cores, alone and beside a busy program, by how long OpenMP's threads look for work.

    python benchmarks/neighbour.py [--json FILE] [--quick] [--minutes M] [--spins N ...]

In: nothing. Threads of torch's OpenMP wait for each other at the end of every operation: they look again and again,
and after so many looks they sleep. Rows, for training the VQ-VAE and the top prior of configs/clipart64 and for
sampling that prior, in fp32: `<work>/alone`, the rate with vqscale's number of looks over the rate with OpenMP's own,
when nothing else runs; `<work>/beside`, the rate beside one busy single-threaded program over the rate alone;
`<work>/beside by default`, the same with OpenMP's own number. With --spins, further numbers of looks get such rows.
Every number of looks has a process of its own; they take turns, alone and beside the neighbour within one round.
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
from measure import Row, arguments, at_least, finish, median
from train_step import Trainer, Way

from vqscale import SPINS
from vqscale.config import load
from vqscale.models.sampling import Options, RowSampler, draw_uniforms
from vqscale.stages.train_prior import TrainPriorConfig
from vqscale.topology import cores, keep_freed_memory

CONFIG = Path(__file__).parents[1] / "configs" / "clipart64" / "train_prior_top.yaml"
BATCH, SIDE, GRID = 64, 64, 8  # of configs/clipart64
DEFAULT = 300_000  # looks of libgomp without a wait policy
ROUNDS = 40
TURN = 0.5  # seconds at least
BUSY = "print(flush=True)\nwhile True: pass"


def vqvae(quick: bool) -> Callable[[], Any]:
    return Trainer("vqvae", Way("fp32"), quick, batch=8 if quick else BATCH, side=SIDE)


def prior(quick: bool) -> Trainer:
    config = load(TrainPriorConfig, CONFIG, []).model
    return Trainer("prior", Way("fp32"), quick, batch=8 if quick else BATCH, side=GRID, config=config)


def sampling(quick: bool) -> Callable[[], Any]:
    """Draws the middle row of codes, again and again."""
    steps = prior(quick).steps
    batch, row = steps.batch, GRID // 2
    state = steps.model.eval().sampling_weights(torch.float32).state(batch)
    sampler, ones = RowSampler(state, Options(1.0, 0, 1.0, 0.0)), torch.ones(GRID, dtype=torch.float64)
    uniforms = draw_uniforms(0, 0, torch.arange(batch), GRID)
    state.reset(torch.arange(batch), [])
    return torch.inference_mode()(functools.partial(sampler.draw, row, uniforms, ones))


WORK: dict[str, Callable[[bool], Callable[[], Any]]] = {"vqvae": vqvae, "prior": prior, "sampling": sampling}


def serve(work: str, quick: bool, pipe: Connection) -> None:
    """In a process of its own: one turn per message, answered by its times per second."""
    torch.set_num_threads(cores())
    keep_freed_memory()
    act = WORK[work](quick)
    act()
    pipe.send(True)
    while pipe.recv():
        start, done = time.perf_counter(), 0
        while not done or time.perf_counter() - start < (0 if quick else TURN):
            act()
            done += 1
        pipe.send(done / (time.perf_counter() - start))


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """One busy thread, wherever the kernel puts it."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as busy:
        assert busy.stdout is not None
        busy.stdout.readline()
        try:
            yield
        finally:
            busy.kill()


@contextlib.contextmanager
def server(work: str, spins: int, quick: bool) -> Iterator[Callable[[], float]]:
    """Asks for a turn of a process whose threads look `spins` times."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    os.environ["GOMP_SPINCOUNT"] = str(spins)  # read when the process loads torch
    process = context.Process(target=serve, args=(work, quick, theirs), daemon=True)
    process.start()
    pipe.recv()  # one after the other: busy threads of one would slow the first step of the next

    def turn() -> float:
        pipe.send(True)
        return float(pipe.recv())

    yield turn
    pipe.send(False)
    process.join()
    os.environ.pop("GOMP_SPINCOUNT", None)


def measure(work: str, counts: Sequence[int], quick: bool, seconds: float) -> dict[str, Row]:
    """The rows of one kind of work; the first of `counts` is OpenMP's own, the second vqscale's."""
    alone: dict[int, list[float]] = {spins: [] for spins in counts}
    beside: dict[int, list[float]] = {spins: [] for spins in counts}
    with contextlib.ExitStack() as stack:
        turns = {spins: stack.enter_context(server(work, spins, quick)) for spins in counts}
        end = time.perf_counter() + seconds
        while len(alone[DEFAULT]) < (2 if quick else ROUNDS) and (not alone[DEFAULT] or time.perf_counter() < end):
            for spins, turn in turns.items():
                alone[spins].append(turn())
            for spins, turn in turns.items():
                with neighbour():
                    beside[spins].append(turn())
    rows = {}
    for spins in counts:
        cost = median([ours / default for ours, default in zip(alone[spins], alone[DEFAULT], strict=True)])
        share = median([with_it / without for with_it, without in zip(beside[spins], alone[spins], strict=True)])
        told = f"{median(alone[spins]):.3g} a second, {cost:.3f} of the default; beside {share:.3f}"
        print(f"{work}, {spins:6} looks: {told}", flush=True)
        name = {SPINS: "", DEFAULT: " by default"}.get(spins, f" {spins} looks")
        if spins != DEFAULT:
            rows[f"{work}/alone{name}"] = at_least(0.97 if spins == SPINS else None, cost)
        rows[f"{work}/beside{name}"] = at_least(0.5 if spins == SPINS else None, share, rounds=len(alone[spins]))
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, minutes=1.5, devices=("cpu",))
    parser.add_argument("--spins", nargs="+", type=int, default=[], help="further numbers of looks")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    args = parser.parse_args(argv)
    counts = list(dict.fromkeys([DEFAULT, SPINS, *args.spins]))
    tree: dict[str, Any] = {}
    for work in args.work:
        tree |= measure(work, counts, args.quick, 60 * args.minutes / len(args.work))
    return finish(args, tree)


if __name__ == "__main__":
    main()
