"""One user of a run directory at a time, on one machine or on several that share it.

In: the path of a lock file.  Out: the lock, kept until `release` or the end of the process, or a ValueError that names
its holder.  Where the kernel's lock is free and the last holder was on this machine, the lock is ours. Between machines
the kernel's lock may not reach, or may outlive a machine that died: there the holder's heartbeat decides.
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

from vqscale.files import open_own, read_json
from vqscale.rundir import process_exists
from vqscale.text import printable

log = logging.getLogger("vqscale")
BEAT = 5.0  # seconds between heartbeats
LEASE = 30.0  # seconds without a heartbeat after which a holder counts as dead
_RECORD = 256  # bytes; of constant length, so that a reader never finds half a record


class FolderLock:
    """`take` it before writing to the folder, `release` it at the end. The file names host, pid and Slurm job."""

    def __init__(self, path: Path):
        self._path = path
        self._file = -1
        self._held = False
        self._released = threading.Event()
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "job_id": os.environ.get("SLURM_JOB_ID", "")}

    def take(self) -> None:
        """Raises ValueError when another process holds it; OSError when the file cannot be written."""
        locked, holder = self._lock(), read_json(self._path)
        elsewhere = holder.get("host", self._me["host"]) != self._me["host"]
        if not locked and not elsewhere and process_exists(holder.get("pid")):
            raise ValueError(self._in_use_by(holder))
        if elsewhere or not locked:
            self._outlast(holder, locked)
        self._write(0)
        if elsewhere and self._lost_to_another():
            raise ValueError(self._in_use_by(read_json(self._path)))
        self._held = True
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

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
        """Whether the kernel granted it: not when another process holds it, nor on a file system without locks."""
        earlier, self._file = self._file, open_own(self._path, os.O_RDWR | os.O_CREAT)
        if earlier >= 0:
            os.close(earlier)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _outlast(self, holder: dict[str, Any], locked: bool) -> None:
        """Wait until the holder's processes are gone, or for LEASE seconds without a heartbeat. Raises ValueError on a
        heartbeat, which changes the file. The clocks of two machines are never compared."""
        last, until = self._snapshot(), time.monotonic() + LEASE
        while time.monotonic() < until:
            time.sleep(min(0.2, LEASE / 4))
            if self._snapshot() != last:
                raise ValueError(self._in_use_by(read_json(self._path) or holder))
            if not locked and self._lock():
                return
        log.warning("%s: taken over from %s: no sign of life for %g s", self._path.parent, _name(holder), LEASE)
        if not locked:  # held by a machine that is gone, or there are no locks here
            self._path.unlink(missing_ok=True)
            self._lock()

    def _snapshot(self) -> tuple[bytes, int]:
        """The file's content and time of change."""
        # Opened anew: NFS then asks the server.
        with contextlib.suppress(OSError, ValueError), open(self._path, "rb", opener=open_own) as file:
            return file.read(4 * _RECORD), os.fstat(file.fileno()).st_mtime_ns
        return b"", 0

    def _write(self, beat: int) -> None:
        os.pwrite(self._file, json.dumps({**self._me, "beat": beat}).ljust(_RECORD).encode(), 0)

    def _lost_to_another(self) -> bool:
        """Where locks do not reach, two may take over at once: it belongs to the later writer."""
        time.sleep(min(1.0, LEASE / 4))
        return {**read_json(self._path), "beat": 0} != {**self._me, "beat": 0}

    def _beat(self) -> None:
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
    return printable(f"pid {holder.get('pid')} on {holder.get('host')}{job}")
