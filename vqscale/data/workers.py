"""Samples read by worker processes, in order.

In: a data set and lists of positions.  Out: batches. A worker ends with the process that started it, leaves signals to
it, and finalizes nothing of what it inherits.
"""

import atexit
import gc
import multiprocessing
import signal
import warnings
from collections.abc import Generator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqscale.batch import Batch
from vqscale.topology import die_with_parent

_INLINE_BYTES = 1 << 16


def run_workers(
    dataset: Dataset[Batch], batches: Any, *, workers: int, pin_memory: bool = False, prefetch: int = 4
) -> Generator[Batch, None, None]:
    """torch's DataLoader over lists of positions, in order. Closing the generator ends the workers; so does the end of
    the process, because one that was left open may outlive its users in a cycle or a traceback."""
    options: dict[str, Any] = {}
    if workers:
        # Forked whatever the default is here, in a spawned rank say: else each imports torch for seconds.
        options = {"prefetch_factor": prefetch, "worker_init_fn": _start_worker, "multiprocessing_context": "fork"}
    with warnings.catch_warnings():
        # Workers mostly wait for storage, so more of them than cores is a choice, not a mistake.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            # the thread that pins memory takes tensors alone, and unpacks them beside the training
            collate_fn=_as_is if pin_memory else _small_as_arrays,
            num_workers=workers,
            pin_memory=pin_memory,
            in_order=True,
            generator=torch.Generator(),  # else every start draws from the global one
            **options,
        )
        gc.freeze()  # a worker must not finalize what it inherits: a process group's end joins threads that it lacks
        try:
            iterator = iter(loader)
        finally:
            gc.unfreeze()
    # multiprocessing would terminate them at the end and wait; but they leave that signal to their parent.
    end = getattr(iterator, "_shutdown_workers", lambda: None)
    atexit.register(end)
    try:
        for batch in iterator:
            arrays_back = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in batch.items()}
            yield cast(Batch, arrays_back)
    finally:
        atexit.unregister(end)
        end()


def _as_is(batch: Any) -> Any:
    return batch


def _small_as_arrays(batch: Any) -> Any:
    """Small tensors as arrays, which a worker sends inside its message: for every tensor it would open a connection to
    pass a file descriptor, about a millisecond each."""
    small = {n for n, v in batch.items() if isinstance(v, Tensor) and v.nbytes <= _INLINE_BYTES}
    return {name: value.numpy() if name in small else value for name, value in batch.items()}


def _start_worker(_worker: int) -> None:
    """Slurm signals every process of a step; stopping is the trainer's decision. A worker ends with its parent."""
    parent = multiprocessing.parent_process()
    die_with_parent(parent.pid or 0 if parent else 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
