"""Memory that runs out, told in one line: where, and which key of the config makes a stage need less.

In: errors of torch, of CUDA's libraries and of Python.  Out: ValueError.
"""

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator

from vqscale.config import StageConfig, local_batching
from vqscale.topology import Topology

_SIGNS = re.compile(r"OutOfMemoryError|MemoryError|out of memory|not enough memory|can't allocate memory|_ALLOC_FAILED")
_AMOUNT = re.compile(r"ried to allocate (\d[\d.]* \w+)")
_PLANNED = ("train_vqvae", "train_prior")  # the stages that `vqscale plan` knows


@contextlib.contextmanager
def memory_errors_explained(config: StageConfig, stage: str, topology: Topology) -> Iterator[None]:
    """Inside, an error for lack of memory becomes a ValueError that names the batch; other errors stay."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = f"{type(error).__name__}: {error}"
        if not _SIGNS.search(words):
            raise
        amount = _AMOUNT.search(words)
        tried = f" (tried to allocate {amount[1]})" if amount else ""
        raise ValueError(f"out of memory on {topology.device}{tried}: {_remedy(config, stage, topology)}") from error


def _remedy(config: StageConfig, stage: str, topology: Topology) -> str:
    key = config.batch_key
    if not key:
        return "free memory, or start fewer processes on this machine"
    value = getattr(config, key)
    if key != "micro_batch":
        return f"{key}={value} does not fit, choose a smaller one"
    images = local_batching(getattr(config, "global_batch"), topology.world_size, value)[1]  # noqa: B009
    remedy = f"micro_batch={value} ({images} images at a time) does not fit; a smaller one trains the same"
    return f"{remedy}; `{_plan_command(topology)}` says what fits" if stage in _PLANNED else remedy


def _plan_command(topology: Topology) -> str:
    """For this run, from the words that it was started with."""
    words = [word for word in sys.argv[2:] if not word.startswith(("-", "strategy="))]
    return f"vqscale plan {shlex.join(words)} world={topology.world_size} strategy={topology.strategy}"
