"""One user of a run directory at a time, on one machine or on several that share it.

In: the path of a lock file.  Out: the lock, held until `release` or the end of the process, or a ValueError that names
who holds it.  Where the kernel's lock is free and was last held on this machine, it is ours. Between machines it may
not reach, or outlive a machine that died: there the holder's signs of life decide.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("vqscale")
BEAT = 5.0  # seconds between a holder's signs of life
LEASE = 30.0  # seconds without one after which it counts as dead
_RECORD = 256  # bytes; of one length, so that a reader never finds half of one


class FolderLock:
    """`take` it before writing to the folder, `release` it at the end. The file says host, pid and Slurm job."""

    def __init__(self, path: Path):
        self._path = path
        self._file = -1
        self._held = False
        self._released = threading.Event()
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "job_id": os.environ.get("SLURM_JOB_ID", "")}

    def take(self) -> None:
        """Raises ValueError when another process holds it; OSError when the file cannot be written."""
        locked, holder = self._lock(), self._holder()
        elsewhere = holder.get("host", self._me["host"]) != self._me["host"]
        if not locked and not elsewhere and _exists(holder.get("pid")):
            raise ValueError(self._in_use_by(holder))
        if elsewhere or not locked:
            self._outlast(holder, locked)
        self._write(0)
        if elsewhere and self._lost_to_another():
            raise ValueError(self._in_use_by(self._holder()))
        self._held = True
        threading.Thread(target=self._give_signs_of_life, name="lock", daemon=True).start()

    def release(self) -> None:
        """Give it back; the next user need not wait."""
        self._released.set()
        if self._file >= 0:
            with contextlib.suppress(OSError):
                if self._held:
                    os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1

    def _lock(self) -> bool:
        """Whether the kernel gave it: not when somebody holds it, nor on a file system without locks."""
        if self._file >= 0:
            os.close(self._file)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _outlast(self, holder: dict[str, Any], locked: bool) -> None:
        """Wait until the holder's processes are gone, or for LEASE seconds without a sign of life. Raises ValueError on
        a sign of life: that the file changes. The clocks of two machines are never compared."""
        last, until = self._trace(), time.monotonic() + LEASE
        while time.monotonic() < until:
            time.sleep(min(0.2, LEASE / 4))
            if self._trace() != last:
                raise ValueError(self._in_use_by(self._holder() or holder))
            if not locked and self._lock():
                return
        log.warning("%s: taken over from %s: no sign of life for %g s", self._path.parent, _name(holder), LEASE)
        if not locked:  # held by a machine that is gone, or there are no locks here
            self._path.unlink(missing_ok=True)
            self._lock()

    def _trace(self) -> tuple[str, int]:
        try:
            with open(self._path) as file:  # opened anew: NFS then asks the server
                return file.read(), os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return "", 0

    def _holder(self) -> dict[str, Any]:
        try:
            found = json.loads(self._trace()[0])
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, beat: int) -> None:
        os.pwrite(self._file, json.dumps({**self._me, "beat": beat}).ljust(_RECORD).encode(), 0)

    def _lost_to_another(self) -> bool:
        """Where locks do not reach, two may take over at once: it belongs to the later writer."""
        time.sleep(min(1.0, LEASE / 4))
        return {**self._holder(), "beat": 0} != {**self._me, "beat": 0}

    def _give_signs_of_life(self) -> None:
        beat = 0
        while not self._released.wait(BEAT):
            beat += 1
            with contextlib.suppress(OSError):  # a full disk, or released meanwhile
                self._write(beat)

    def _in_use_by(self, holder: dict[str, Any]) -> str:
        return f"run directory {self._path.parent} is in use by {_name(holder)}"


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    job = f" (job {holder['job_id']})" if holder.get("job_id") else ""
    return f"pid {holder.get('pid')} on {holder.get('host')}{job}"


def _exists(pid: Any) -> bool:
    """Whether a process is there; one without a number is taken to be."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, TypeError, ValueError):
        return True
    return True
