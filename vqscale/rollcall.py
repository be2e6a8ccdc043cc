"""Which rank the others wait for, asked when a job stands still or a collective has timed out.

In: how many collectives each rank has entered, which torch counts, and the store in which the ranks met.  Out: one line
that names the ranks which have entered fewer than the others, or which do not answer.
"""

import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist

from vqscale.topology import BACKGROUND, Topology

log = logging.getLogger("vqscale")
_KEY = "roll call"
_PATIENCE = 1.0  # seconds: the store may be on a machine that is gone


class RollCall:
    """One per rank. Every rank answers; a little later any of them can tell who is missing."""

    def __init__(self, topology: Topology):
        """Collective."""
        self._store, self._rank = topology.store, topology.rank
        self._hosts: list[str] = topology.gather(socket.gethostname())

    def answer(self) -> None:
        """Tell the other ranks how far this one is."""
        _in_time(lambda: self._store.append(_KEY, f"{self._rank} {_collectives_entered()} "))

    def tell_missing(self) -> str:
        """Log and return a line that names the ranks which the others wait for; "" where that cannot be told."""
        answers: list[int] = []
        _in_time(lambda: answers.extend(map(int, self._store.get(_KEY).split())))
        if line := describe(dict(zip(answers[::2], answers[1::2], strict=True)), self._hosts):
            log.error(line)
            if self._rank:  # rank 0 logs to the screen, but may be the one that is missing
                print(f"vqscale: {line}", file=sys.stderr, flush=True)
        return line


def describe(entered: dict[int, int], hosts: list[str]) -> str:
    """What the answers say. entered: collectives by rank, of the ranks that answered; hosts: of all ranks."""
    most = max(entered.values(), default=0)
    behind = [rank for rank in sorted(entered) if entered[rank] < most]
    missing = behind or [rank for rank in range(len(hosts)) if rank not in entered]
    if not entered or not missing:
        return ""
    names = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in missing[:8]) + ", …" * (len(missing) > 8)
    why = f"{min(entered.values()):,} of {most:,} collectives entered" if behind else "no answer"
    return f"the others wait for {names}: {why}"


def _collectives_entered() -> int:
    """By this rank's own work, in all groups; those of a save in the background are left out."""
    groups: Iterable[Any] = dist.distributed_c10d._world.pg_map
    return sum(group._get_sequence_number_for_group() for group in groups if group.group_desc != BACKGROUND)


def _in_time(action: Callable[[], object]) -> None:
    def attempt() -> None:
        with contextlib.suppress(Exception):  # the job ends anyway, without this line
            action()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
