"""One run of one stage: its folder, status, log, lock, stop requests and trackers.

In: a stage's config.  Out: `Run`, inside `with runtime.run(config, stage) as run`, and on disk the run directory's
config.yaml, command.json, status.json and log/<rank>.log.  The only importer of accelerate.
"""

import contextlib
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from vqscale import config as configs
from vqscale.config import StageConfig
from vqscale.files import read_json, write_json
from vqscale.lock import FolderLock
from vqscale.stopping import Leave, Stoppable, Stopped
from vqscale.topology import Topology, bring_up, is_first_rank, take_down, under_launcher, world_size
from vqscale.versions import git_commit, versions
from vqscale.watchdog import Watchdog

__all__ = [
    "Leave",
    "Run",
    "Stopped",
    "Topology",
    "is_first_rank",
    "leave",
    "read_status",
    "run",
    "under_launcher",
]

log = logging.getLogger("vqscale")
_BOOKKEEPING = {"config.yaml", "command.json", "status.json", "log", ".lock", "metrics.jsonl", "tensorboard", "STOP"}


class _LogFile(logging.FileHandler):
    """A full disk loses lines, and nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: the same line is on the screen, if it matters."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class Run(Stoppable):
    """A stage's run directory, and what this process does for it.

    `was_done`: an earlier run of the same config finished here. `resumed`: there was an earlier run.
    """

    def __init__(self, config: StageConfig, stage: str, topology: Topology):
        super().__init__(Path(config.run_dir), topology)
        self.config = config
        self.stage = stage
        self.images_seen = 0
        self._lock: FolderLock | None = None
        self._watchdog: Watchdog | None = None
        self._changes: list[tuple[str, str]] = []  # (warned | allowed, what), since the last start
        self._facts: dict[str, Any] = {}
        self.was_done = False
        self.resumed = False
        self.trackers: list[Any] = []
        self.at_exit = contextlib.ExitStack()  # what must still be done, however the run ends, in the process group
        self._handlers: list[logging.Handler] = []

    # --- the folder -------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Take the folder: lock it, refuse another config's run, write config.yaml and command.json."""
        failure = ""
        if self.topology.is_main:
            try:
                self._take_folder()
            except (ValueError, OSError) as error:
                failure = str(error)
        failure, self.was_done, self.resumed = self.topology.gather((failure, self.was_done, self.resumed))[0]
        if failure:
            raise ValueError(failure)
        self._start_log()
        for kind, change in self._changes:
            level = logging.WARNING if kind == "warned" else logging.INFO
            log.log(level, "the config has changed since the last start: %s", change)
        if seconds := self.config.watchdog_seconds:
            log_file = self.run_dir / "log" / f"{self.topology.rank}.log"
            self._watchdog = Watchdog(seconds, log_file, self.topology, lambda: self._beats, self._report_standstill)
        self.record_facts()
        self.write_status("running")

    def _take_folder(self) -> None:
        try:
            (self.run_dir / "log").mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.run_dir / ".lock")
            self._lock.take()
        except OSError as error:
            raise ValueError(f"run directory {self.run_dir} cannot be written: {error.strerror}") from None
        saved = self.run_dir / "config.yaml"
        if saved.is_file():
            changes = configs.changes(self.config, saved)
            if changes["refused"]:
                raise ValueError(
                    f"{saved}: this run was started with another config ({'; '.join(changes['refused'])}); "
                    "use those values again, or another run_dir"
                )
            self._changes = [(kind, change) for kind in ("warned", "allowed") for change in changes[kind]]
            self.resumed = True
            self.was_done = read_status(self.run_dir).get("state") == "done"
        configs.save(self.config, saved)

    def _give_back(self) -> None:
        """After an error before anything was made: a corrected config may use the folder."""
        if self.topology.is_main and not self.resumed:
            files = (path.relative_to(self.run_dir) for path in self.run_dir.rglob("*") if path.is_file())
            if all(path.parts[0] in _BOOKKEEPING for path in files):
                (self.run_dir / "config.yaml").unlink()

    def _start_log(self) -> None:
        (self.run_dir / "log").mkdir(parents=True, exist_ok=True)
        log.setLevel(logging.DEBUG)
        log.propagate = False
        file = _LogFile(self.run_dir / "log" / f"{self.topology.rank}.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._handlers = [file]
        if self.topology.is_main:
            screen = logging.StreamHandler(sys.stderr)
            screen.setLevel(logging.INFO)
            self._handlers.append(screen)
        for handler in self._handlers:
            log.addHandler(handler)

    def _close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
        with contextlib.suppress(Exception):  # the error that ended the run matters more
            self.at_exit.close()
        for tracker in self.trackers:
            with contextlib.suppress(Exception):  # as in `start_trackers`
                tracker.finish()
        for handler in self._handlers:
            log.removeHandler(handler)
            handler.close()
        if self._lock is not None:
            self._lock.release()

    def record_facts(self, **facts: Any) -> None:
        """Add facts about what really runs to command.json; called by all ranks."""
        self._facts.update(facts)
        if not self.topology.is_main:
            return
        path = self.run_dir / "command.json"
        if "restarts" not in self._facts:
            self._facts["restarts"] = read_json(path).get("restarts", -1) + 1
        topology = self.topology
        write_json(
            path,
            {
                "argv": sys.argv,
                "stage": self.stage,
                "strategy": topology.strategy,
                "engine": topology.engine,
                "world_size": topology.world_size,
                "nodes": topology.nodes,
                "device": str(topology.device),
                "threads": torch.get_num_threads(),
                "git_commit": git_commit(),
                "versions": versions(),
                **self._facts,
            },
        )

    def write_status(self, state: str, reason: str = "") -> None:
        """Atomically, by rank 0 alone: running | stopped | done | failed."""
        if self.topology.is_main:
            self._write_status(state, reason)

    def _write_status(self, state: str, reason: str) -> None:
        status = {
            "state": state,
            "images_seen": self.images_seen,
            "reason": reason,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job_id": os.environ.get("SLURM_JOB_ID", ""),
            "time": time.time(),
        }
        with contextlib.suppress(OSError):  # a full disk must not hide the error that is being reported
            write_json(self.run_dir / "status.json", status)

    def _report_standstill(self, reason: str) -> None:
        """Called by the rank that notices first; rank 0 may be the one that hangs."""
        self._write_status("failed", reason)

    # --- trackers ---------------------------------------------------------------------------------------------------

    def start_trackers(self, names: list[str], resumed_at: int) -> Callable[[dict[str, float], int], None]:
        """accelerate's trackers by name; returns log(values, images_seen). A tracker that fails is dropped, with a
        warning, and never stops the run."""
        trackers = _open_trackers(names, self.run_dir, resumed_at, self.topology) if names else []

        def log_values(values: dict[str, float], images_seen: int) -> None:
            for tracker in list(trackers):
                try:
                    tracker.log(values, step=images_seen)
                except Exception as error:
                    trackers.remove(tracker)
                    log.warning("tracker %s failed and is left out from here on: %s", tracker.name, error)

        self.trackers = trackers
        return log_values

    def log_image(self, name: str, image: torch.Tensor, images_seen: int) -> None:
        """A picture, float [3, h, w] in [0, 1], to the trackers that take pictures."""
        for tracker in self.trackers:
            if hasattr(tracker, "log_images"):
                with contextlib.suppress(Exception):  # as in `start_trackers`: never stops the run
                    tracker.log_images({name: image[None].cpu().numpy()}, step=images_seen)


def _open_trackers(names: list[str], run_dir: Path, resumed_at: int, topology: Topology) -> list[Any]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    _adopt_process_group(topology)
    opened = []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"trackers: there is no tracker {name!r}; accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}"
            )
        try:
            if name == "tensorboard":
                tracker = LOGGER_TYPE_TO_CLASS[name]("tensorboard", run_dir, purge_step=resumed_at + 1)
            else:
                tracker = LOGGER_TYPE_TO_CLASS[name](run_dir.name)
            tracker.start()
            opened.append(tracker)
        except Exception as error:
            log.warning("tracker %s could not start and is left out: %s", name, error)
    return opened


def _adopt_process_group(topology: Topology) -> None:
    """Tell accelerate of the process group, because trackers ask it who is first. Where it takes a CPU's LOCAL_RANK for
    a launcher's, it would also choose a thread count and set RANK and others for whatever starts next here."""
    from accelerate import PartialState

    threads, environment = torch.get_num_threads(), dict(os.environ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset", UserWarning)
        PartialState(cpu=topology.device.type == "cpu")
    torch.set_num_threads(threads)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


@contextlib.contextmanager
def run(config: StageConfig, stage: str) -> Iterator[Run]:
    """The run of `stage` with `config`: brings up the process group, takes the run directory, writes how it ended.

    Raises ValueError when the folder is in use, cannot be written or belongs to another config; Stopped passes through.
    """
    topology = bring_up(config)
    current = Run(config, stage, topology)
    orderly = False
    try:
        with current.signals_caught():
            current._open()
            try:
                yield current
            except Stopped as stopped:
                current.write_status("stopped", str(stopped))
                orderly = True
                raise
            except BaseException as error:
                current.write_status("failed", f"{type(error).__name__}: {' '.join(str(error).split())}")
                current._give_back()
                log.debug("failed", exc_info=True)  # the traceback, for the log file alone
                raise
            current.write_status("done")
            orderly = True
    finally:
        current._close()
        take_down(orderly)


def read_status(run_dir: Path) -> dict[str, Any]:
    """status.json, or {} where there is none. `running` whose process is gone on this host reads as `stopped`."""
    status = read_json(run_dir / "status.json")
    if status.get("state") == "running" and status.get("host") == socket.gethostname():
        try:
            os.kill(int(status["pid"]), 0)
        except ProcessLookupError:
            status.update(state="stopped", reason="its process is gone")
    return status


def leave(code: int) -> None:
    """End the process. Ranks of a job skip static destructors, in which a few in a hundred abort after their work."""
    sys.stdout.flush()
    sys.stderr.flush()
    if world_size() > 1:
        logging.shutdown()
        os._exit(code)
    sys.exit(code)
