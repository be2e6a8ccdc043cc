"""A run that stands still ends, with the stacks of its ranks in their logs, instead of occupying its machines.

In: a count that rises with progress (bytes read, images, steps).  Out: after `seconds` in which it did not rise, every
rank of this machine has written the stacks of its threads to log/<rank>.log and has ended. `kill -QUIT PID` writes a
rank's stacks there too.
"""

import contextlib
import faulthandler
import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vqscale.files import open_to_append
from vqscale.rollcall import RollCall
from vqscale.topology import Topology

log = logging.getLogger("vqscale")
_TICK = 1.0  # seconds between looks at the count
_GRACE = 2 * _TICK  # for the other ranks to see for themselves that they stand still, and to write their stacks
_AT_MOST = 8.0  # seconds that the end itself may take
_START_UP = 600.0  # extra seconds before the first progress: large models are read, verified, compiled


class Watchdog:
    """One per rank. `report(reason)` is called before the end, on each rank whose count stands still."""

    def __init__(
        self,
        seconds: float,
        log_file: Path,
        topology: Topology,
        progress: Callable[[], int],
        report: Callable[[str], None],
        roll_call: RollCall,
    ):
        """Collective. seconds: > 0, without progress; start-up may take ten minutes more."""
        self._seconds, self._progress, self._report = seconds, progress, report
        self._log_file, self._rank = log_file, topology.rank
        self._roll_call = roll_call
        self._file = open_to_append(log_file)  # faulthandler writes to it until `close`
        faulthandler.register(signal.SIGQUIT, self._file)
        here = _ranks_here(topology)
        self._others = [_handle(pid) for _, pid in here if pid != os.getpid()]
        self._lock_file = log_file.parent / f"{min(here)[0]}.log"  # the same for all ranks here
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The run ended by itself."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGQUIT)
        for handle in self._others:
            with contextlib.suppress(OSError):
                os.close(handle)
        self._file.close()

    def _watch(self) -> None:
        tick = min(_TICK, self._seconds / 4)
        last, still = self._progress(), -_START_UP
        while not self._closed.wait(tick):  # counted, not timed: a suspended machine does not stand still
            if (now := self._progress()) != last:
                last, still = now, 0.0
                # Code that hangs with the interpreter's lock stops this thread too: then faulthandler's ends the rank.
                faulthandler.dump_traceback_later(self._seconds + _AT_MOST, exit=True, file=self._file)
            else:
                still += tick
            if still >= self._seconds:
                self._end()

    def _end(self) -> None:
        reason = f"no progress for {self._seconds:g} s: the stacks of all ranks are in {self._log_file.parent}"
        faulthandler.dump_traceback(self._file)
        faulthandler.dump_traceback_later(_AT_MOST, exit=True, file=self._file)  # should anything below hang
        log.error(reason)
        if self._rank:  # rank 0 logs to the screen, but may be the one that hangs
            print(f"vqscale: error on rank {self._rank}: {reason}", file=sys.stderr, flush=True)
        self._report(reason)
        self._roll_call.answer()
        time.sleep(_GRACE)
        if self._is_first():  # it alone: two dumps at a time would mix in one file
            if missing := self._roll_call.tell_missing():
                self._report(f"{reason}; {missing}")
            self._tell_others(signal.SIGCONT)  # a process that was stopped writes nothing
            self._tell_others(signal.SIGQUIT)
            time.sleep(_TICK)
            self._tell_others(signal.SIGKILL)
            os._exit(1)  # at once, before a step fails for want of them and says that instead
        time.sleep(3 * _TICK)  # until the first one ends this one
        os._exit(1)

    def _is_first(self) -> bool:
        """Whether this rank kills the others: one does, else each could be killed before it ends with status 1."""
        try:
            # Kept open to the end, and opened only now: no loader worker has a copy that would outlive this rank.
            self._lock = open_to_append(self._lock_file)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return not isinstance(error, BlockingIOError)  # a file system may have no locks
        return True

    def _tell_others(self, number: signal.Signals) -> None:
        for handle in self._others:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(handle, number)


def _ranks_here(topology: Topology) -> list[tuple[int, int]]:
    """(rank, pid) of those that this rank's launcher started on this machine."""
    ranks = topology.gather((socket.gethostname(), os.getppid(), topology.rank, os.getpid()))
    return [(rank, pid) for *where, rank, pid in ranks if where == [socket.gethostname(), os.getppid()]]


def _handle(pid: int) -> int:
    """A handle of this very process: its number may be another's when the handle is used."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):  # gone already, or a system without handles
        return -1
