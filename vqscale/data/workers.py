"""Samples read by worker processes, in order.

In: a data set and lists of positions.  Out: batches. A worker ends with the process that started it, leaves signals to
it, and finalizes nothing of what it inherits. What keeps a worker from reading or sending a batch is raised here.
"""

import atexit
import gc
import multiprocessing
import warnings
from collections.abc import Generator, Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vqscale import progress
from vqscale.batch import Batch
from vqscale.data.processes import ignore_stop_signals, start_method, worker_failure
from vqscale.topology import die_with_parent, keep_freed_memory

_INLINE_BYTES = 1 << 16
_AHEAD_OF_EACH, _AHEAD = 4, 32  # batches that a worker reads ahead at most; many workers share the second number


def run_workers(
    dataset: Dataset[Batch], batches: Any, *, workers: int, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """torch's DataLoader over lists of positions, in order. Closing the generator ends the workers; so does the end of
    the process, because one that was left open may outlive its users in a cycle or a traceback."""
    options: dict[str, Any] = {}
    if workers:
        dataset = _InWorker(dataset)
        start = partial(_start_worker, progress.counter())
        options = {"prefetch_factor": batches_ahead(workers), "worker_init_fn": start}
        # Forked whatever the default is here, in a spawned rank say: else each imports torch for seconds.
        options["multiprocessing_context"] = start_method("fork")
    with warnings.catch_warnings():
        # Workers mostly wait for storage, so more of them than cores is a choice, not a mistake.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=pin_memory,
            in_order=True,
            generator=torch.Generator(),  # else every start draws from the global one
            **options,
        )
        gc.freeze()  # a worker must not finalize what it inherits: a process group's end joins threads that it lacks
        try:
            iterator = iter(loader)
        except OSError as error:
            raise _failure("loader workers cannot be started", error) from None
        finally:
            gc.unfreeze()
    # multiprocessing would terminate them at the end and wait; but they leave that signal to their parent.
    end = getattr(iterator, "_shutdown_workers", lambda: None)
    atexit.register(end)
    try:
        for batch in iterator:
            yield batch.unpack() if isinstance(batch, _Sent) else batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _failure("a loader worker has ended", error) from None
    finally:
        atexit.unregister(end)
        end()


def _as_it_is(batch: Any) -> Any:
    """The data set makes whole batches. Not a lambda: a worker that is started afresh is sent this."""
    return batch


def batches_ahead(workers: int) -> int:
    """How many batches each of so many workers reads ahead: 4, of 9 and more workers fewer, but at least 2."""
    return min(_AHEAD_OF_EACH, max(2, _AHEAD // workers))


def _failure(what: str, error: BaseException) -> OSError:
    return worker_failure(what, error, "read without workers (workers=0)")


class _InWorker(Dataset):
    """The data set as a worker reads it: batches are pickled here and not in a queue's thread, which would drop the
    ones that it cannot send."""

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __getitems__(self, positions: Sequence[int]) -> "_Sent":
        try:
            batch = self._dataset.__getitems__(positions)
        except (OSError, ValueError) as error:
            return _Sent(error=error)
        except MemoryError as error:
            return _Sent(error=_failure("a loader worker cannot read a batch", error))
        try:
            return _Sent(bytes(ForkingPickler.dumps(_small_as_arrays(batch))))
        except (OSError, RuntimeError, MemoryError) as error:
            return _Sent(error=_failure("a loader worker cannot send a batch", error))


class _Sent:
    """A pickled batch, or the error in its place."""

    def __init__(self, data: bytes = b"", error: OSError | ValueError | None = None):
        self._data = data
        self._error = (OSError if isinstance(error, OSError) else ValueError, str(error)) if error else None

    def unpack(self) -> Batch:
        """The batch, or raises the error."""
        if self._error:
            raise self._error[0](self._error[1])
        try:
            batch = ForkingPickler.loads(self._data)
        except (OSError, EOFError, RuntimeError) as error:
            raise _failure("a loader worker has ended, or its batch is lost", error) from None
        return cast(Batch, {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in batch.items()})

    def pin_memory(self) -> Any:
        """The batch in pinned memory. torch calls it in a thread, beside the training."""
        try:
            batch = self.unpack()
        except (OSError, ValueError) as error:
            return _Sent(error=error)
        return {name: v.pin_memory() if isinstance(v, Tensor) else v for name, v in batch.items()}


def _small_as_arrays(batch: Batch) -> dict[str, Any]:
    """Small tensors as arrays, which a worker sends inside its message: for every tensor it would open a connection to
    pass a file descriptor, about a millisecond each."""
    small = {n for n, v in batch.items() if isinstance(v, Tensor) and v.nbytes <= _INLINE_BYTES}
    return {name: value.numpy() if name in small else value for name, value in batch.items()}  # type: ignore[attr-defined]


def _start_worker(counter: Any, _worker: int) -> None:
    """A worker ends with its parent, leaves signals to it, and uses its memory again, also where the parent trains on a
    GPU and does not."""
    progress.count_in(counter)
    keep_freed_memory()
    parent = multiprocessing.parent_process()
    die_with_parent(parent.pid or 0 if parent else 0)
    ignore_stop_signals()
