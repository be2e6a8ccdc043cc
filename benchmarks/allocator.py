"""Freed memory kept by the process against glibc's defaults: seconds of a forward and of a training step, peak memory.

    python benchmarks/allocator.py [--json FILE] [--quick] [--minutes M]

In: nothing. Rows: `encoder` and `training step`, the seconds under glibc's defaults over those with
`topology.keep_freed_memory`, as every stage has it on a CPU; `<…>/memory`, its peak over the defaults' peak. The model
is `train_step.py`'s VQ-VAE in fp32. Each has two processes, one per setting, which take turns.
"""

import functools
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measure import Row, arguments, at_least, at_most, finish, in_turns, median, ratio, timed
from train_step import Trainer, Way

from vqscale.topology import keep_freed_memory

ROUNDS = 30


class Encoder:
    """Passes of the encoder over one batch."""

    def __init__(self, quick: bool):
        self.steps = Trainer("vqvae", Way("fp32"), quick).steps
        self.image = self.steps.images(0)

    def __call__(self) -> None:
        with torch.inference_mode():
            self.steps.model.encode(self.image)


WORK: dict[str, Any] = {"encoder": Encoder, "training step": functools.partial(Trainer, "vqvae", Way("fp32"))}


def serve(kept: bool, work: str, quick: bool, pipe: Connection) -> None:
    """In a process of its own: work once per message and answer; to the message False answer the peak in bytes."""
    if kept:
        keep_freed_memory()
    act = WORK[work](quick=quick)
    while pipe.recv():
        pipe.send(timed(act))
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    pipe.send(1024 * int(peak.split()[1]))


def measure(work: str, quick: bool, seconds: float) -> dict[str, Row]:
    """The rows of one kind of work."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name in ("kept", "plain"):
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name == "kept", work, quick, theirs), daemon=True).start()

    def ask(pipe: Connection, question: bool) -> Any:
        pipe.send(question)
        return pipe.recv()

    turns = {name: functools.partial(ask, pipe, True) for name, pipe in pipes.items()}
    in_turns(turns, 2)
    taken = in_turns(turns, ROUNDS, seconds)
    peaks = {name: ask(pipe, False) for name, pipe in pipes.items()}
    print(f"{work}: {median(taken['kept']):.3f} s, by default {median(taken['plain']):.3f}", flush=True)
    return {
        work: at_least(None, ratio(taken["plain"], taken["kept"])),
        f"{work}/memory": at_most(None, peaks["kept"] / peaks["plain"], megabytes=peaks["kept"] / 1e6),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(__doc__, minutes=1.5, devices=("cpu",)).parse_args(argv)
    tree: dict[str, Any] = {}
    for work in WORK:
        tree |= measure(work, args.quick, 60 * args.minutes / len(WORK))
    return finish(args, tree)


if __name__ == "__main__":
    main()
