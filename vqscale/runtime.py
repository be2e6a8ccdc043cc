"""One run of one stage: its folder, status, log, lock, stop requests and trackers.

In: a stage's config.  Out: `Run`, inside `with runtime.run(config, stage) as run`, and on disk the run directory's
config.yaml, command.json, status.json and log/<rank>.log.
"""

import contextlib
import copy
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vqscale import config as configs
from vqscale import progress, rundir, streams
from vqscale.config import StageConfig
from vqscale.files import open_to_append, read_json, sealed, write_json
from vqscale.lock import FolderLock
from vqscale.memory import memory_errors_explained
from vqscale.rollcall import RollCall
from vqscale.stopping import Stoppable, Stopped
from vqscale.text import one_line, printable, redact_url
from vqscale.topology import Topology, bring_up, env_int, slower_than_asked, take_down
from vqscale.trackers import Trackers
from vqscale.versions import git_commit, versions
from vqscale.waiting import adapted
from vqscale.watchdog import Watchdog

log = logging.getLogger("vqscale")
_ANSWERS_SECONDS = 2.0  # between the time-outs of ranks that wait in the same collective
STATUS_SECONDS = 5.0  # status.json of a run that makes progress is at most this old


class _LogFile(logging.StreamHandler):
    """A full disk loses lines, and nothing else."""

    def __init__(self, path: Path):
        super().__init__(open_to_append(path))
        self.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: the same line is on the screen, if it matters."""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.close()
        super().close()


class _Screen(logging.StreamHandler):
    """Lines above the progress bar, not in it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setLevel(logging.INFO)
        self.setFormatter(_OneLine())
        self._pid = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        # A forked worker has no bar, and the bar's lock may have been held when it was forked.
        bar_away = tqdm.external_write_mode(self.stream) if os.getpid() == self._pid else contextlib.nullcontext()
        with bar_away:
            super().emit(record)


class _OneLine(logging.Formatter):
    """Names and URLs of others neither begin lines of their own, nor act on a terminal, nor tell secrets."""

    def format(self, record: logging.LogRecord) -> str:
        own = copy.copy(record)
        own.exc_text = None  # where another handler's formatter has left the traceback as it is
        return super().format(own)

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(redact_url(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:
        return "\n".join(printable(redact_url(line)) for line in super().formatException(ei).splitlines())


class Run(Stoppable):
    """A stage's run directory, and what this process does for it.

    `previous_status`: the status.json that an earlier run of the same config left here, with `images_seen`; {} where
    this run starts from nothing.
    """

    def __init__(self, config: StageConfig, stage: str, topology: Topology):
        super().__init__(Path(config.run_dir), topology, self._progressed)
        self.config = config
        self.stage = stage
        self.images_seen = 0
        self._lock = FolderLock(self.run_dir / ".lock")
        self._watchdog: Watchdog | None = None
        self._roll_call: RollCall | None = None
        self._changes: list[tuple[int, str]] = []  # (level of the log, what), since the last start
        self._facts: dict[str, Any] = {}
        self.previous_status: dict[str, Any] = {}
        self.trackers = Trackers()
        self.at_exit = contextlib.ExitStack()  # what must still be done, however the run ends, in the process group
        self._handlers: list[logging.Handler] = []
        self._status_due = 0.0

    @property
    def was_done(self) -> bool:
        """Whether an earlier run finished."""
        return self.previous_status.get("state") == "done"

    @property
    def resumed(self) -> bool:
        """Whether there was an earlier run."""
        return bool(self.previous_status)

    def _progressed(self) -> None:
        progress.advance()
        if self.topology.is_main and time.monotonic() >= self._status_due:
            self.write_status("running")

    # --- the folder -------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Take the folder: lock it, refuse another config's run, write config.yaml and command.json."""
        streams.lose_rather_than_wait()
        self.previous_status = self.topology.on_main(self._take_folder)
        self._start_log()
        for level, change in self._changes:
            log.log(level, "the config has changed since the last start: %s", change)
        for line in slower_than_asked(self.config, self.topology.device):
            log.warning(line)
        progress.share()
        self._roll_call = roll_call = RollCall(self.topology)
        if seconds := self.config.watchdog_seconds:
            log_file = self.run_dir / "log" / f"{self.topology.rank}.log"
            report = partial(self._write_status, "failed")  # rank 0, which writes it else, may be the one that hangs
            self._watchdog = Watchdog(seconds, log_file, self.topology, progress.total, report, roll_call)
        self.record_facts()
        self.write_status("running")

    def _take_folder(self) -> dict[str, Any]:
        """Returns `previous_status`."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            rundir.refuse_strange_entries(self.run_dir, self.config.outputs)
            (self.run_dir / "log").mkdir(exist_ok=True)
            self._lock.take()
        except OSError as error:
            raise ValueError(f"run directory {self.run_dir} cannot be written: {error.strerror}") from None
        saved = self.run_dir / "config.yaml"
        changes = configs.changes(self.config, saved) if saved.is_file() else {"refused": []}
        if self.config.fresh and not self._goes_on(changes["refused"]):
            self._remove_outputs()
        elif changes["refused"]:
            raise ValueError(
                f"{saved}: this run was started with another config ({'; '.join(changes['refused'])}); "
                "use those values again, or another run_dir, or fresh=true, which removes this stage's outputs"
            )
        previous: dict[str, Any] = {}
        if saved.is_file():
            self._changes = [(logging.WARNING, change) for change in changes["warned"]]
            self._changes += [(logging.INFO, change) for change in changes["allowed"]]
            previous = {"images_seen": 0, **rundir.recorded_status(self.run_dir)}
            if not isinstance(previous["images_seen"], int):  # a damaged file
                previous = {"images_seen": 0}
        configs.save(self.config, saved)
        return previous

    def _goes_on(self, refused: list[str]) -> bool:
        """Whether a run that was itself begun with `fresh` is to be resumed: it was interrupted, or is restarted by
        Slurm or torchrun, and not started anew by its user."""
        restarted = any(env_int(name, 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
        interrupted = rundir.read_status(self.run_dir).get("state") == "stopped"
        was_fresh = bool(read_json(self.run_dir / "command.json").get("fresh"))
        return was_fresh and not refused and (interrupted or restarted)

    def _remove_outputs(self) -> None:
        try:
            rundir.remove_outputs(self.run_dir, self.stage, self.config.outputs)
        except OSError as error:
            raise ValueError(f"fresh=true: {error.filename} cannot be removed: {error.strerror}") from None

    def check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Hold this run to the inputs of its first start, which are recorded in inputs.json. Collective.

        inputs: config key -> fingerprint. Raises ValueError naming each input that has changed since. With `fresh` the
        stage's outputs are removed instead, and the run starts over: `was_done` and `resumed` are False afterwards.
        """
        was_resumed = self.resumed
        self.previous_status = self.topology.on_main(lambda: self._check_inputs(dict(inputs)))
        if was_resumed and not self.resumed:
            self.images_seen = 0
            self._facts.pop("restarts", None)
            self.record_facts()
            self.write_status("running")

    def _check_inputs(self, inputs: dict[str, str]) -> dict[str, Any]:
        """Returns `previous_status`."""
        has_outputs = self.resumed and rundir.holds_outputs(self.run_dir)
        stale = rundir.stale_inputs(self.run_dir, inputs) if has_outputs else []
        if stale and not self.config.fresh:
            raise ValueError(
                f"{self.run_dir}: made of other inputs: {'; '.join(stale)}; "
                "fresh=true removes this stage's outputs and starts over, another run_dir keeps them"
            )
        if stale:
            log.warning("inputs have changed, starting over: %s", "; ".join(stale))
            self._remove_outputs()
            configs.save(self.config, self.run_dir / "config.yaml")
        if read_json(self.run_dir / rundir.INPUTS) != inputs:
            write_json(self.run_dir / rundir.INPUTS, inputs)
        return {} if stale else self.previous_status

    def _start_log(self) -> None:
        log.setLevel(logging.DEBUG)
        log.propagate = False
        self._handlers = [_LogFile(self.run_dir / "log" / f"{self.topology.rank}.log")]
        if self.topology.is_main:
            self._handlers.append(_Screen())
        for handler in self._handlers:
            log.addHandler(handler)

    def _close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
        with contextlib.suppress(Exception):  # the error that ended the run matters more
            self.at_exit.close()
        self.trackers.finish()
        for handler in self._handlers:
            log.removeHandler(handler)
            handler.close()
        self._lock.release()

    def record_facts(self, **facts: Any) -> None:
        """Add facts about what really runs to command.json; called by all ranks."""
        self._facts.update(facts)
        if not self.topology.is_main:
            return
        path = self.run_dir / "command.json"
        if "restarts" not in self._facts:
            earlier = read_json(path).get("restarts", -1)
            self._facts["restarts"] = earlier + 1 if isinstance(earlier, int) else 0
        always = {
            "argv": [redact_url(word) for word in sys.argv],
            "stage": self.stage,
            "fresh": self.config.fresh,
            "strategy": self.topology.strategy,
            "engine": self.topology.engine,
            "world_size": self.topology.world_size,
            "nodes": self.topology.nodes,
            "device": str(self.topology.device),
            "threads": torch.get_num_threads(),
            "git_commit": git_commit(),
            "versions": versions(),
        }
        write_json(path, always | self._facts)

    def write_status(self, state: str, reason: str = "") -> None:
        """Atomically, by rank 0 alone: running | stopped | done | failed."""
        if self.topology.is_main:
            start = time.monotonic()
            self._write_status(state, reason)
            now = time.monotonic()
            self._status_due = now + max(STATUS_SECONDS, 50 * (now - start))  # a slow disk costs 2 % at most

    def _write_status(self, state: str, reason: str) -> None:
        status = {
            "state": state,
            "images_seen": self.images_seen or self.previous_status.get("images_seen", 0),
            "reason": one_line(reason),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job_id": os.environ.get("SLURM_JOB_ID", ""),
            "time": time.time(),
        }
        with contextlib.suppress(OSError):  # a full disk must not hide the error that is being reported
            write_json(self.run_dir / "status.json", sealed(status))

    def _name_missing(self, error: BaseException) -> str:
        """Where a collective has timed out: a line, told already, that names the ranks which did not come."""
        if self._roll_call is None or "timed out" not in str(error).lower():
            return ""
        self._roll_call.answer()
        time.sleep(_ANSWERS_SECONDS)
        return self._roll_call.tell_missing()

    def _write_failure(self, error: BaseException, missing: str) -> None:
        """A finished run that is started again and cannot begin stays `done`, say where its data are away."""
        larger_total = any(change.startswith("total_images:") for _, change in self._changes)
        asked_for_more = self.config.recomputes or larger_total
        if self.was_done and self.images_seen in (0, self.previous_status["images_seen"]) and not asked_for_more:
            self.images_seen = self.previous_status["images_seen"]
            self.write_status("done", self.previous_status.get("reason", ""))
        else:
            self.write_status("failed", "; ".join(filter(None, [f"{type(error).__name__}: {error}", missing])))
        if self.topology.is_main and not self.resumed and not rundir.holds_outputs(self.run_dir):
            (self.run_dir / "config.yaml").unlink(missing_ok=True)  # nothing was made: a corrected config may be used

    # --- trackers ---------------------------------------------------------------------------------------------------

    def start_trackers(self, names: list[str], resumed_at: int) -> Callable[[dict[str, float], int], None]:
        """Open trackers by name; returns log(values, images_seen). Collective."""
        if names:
            self.trackers.open(names, self.config, resumed_at, self.topology)
        return self.trackers.log

    def log_image(self, name: str, image: torch.Tensor, images_seen: int) -> None:
        """A picture, float [3, h, w] in [0, 1], to the trackers that take pictures."""
        self.trackers.log_image(name, image, images_seen)


@contextlib.contextmanager
def run(config: StageConfig, stage: str) -> Iterator[Run]:
    """The run of `stage` with `config`: brings up the process group, takes the run directory, writes how it ended.

    Raises ValueError when the folder is in use, cannot be written or belongs to another config, and when memory runs
    out; Stopped passes through.
    """
    topology = bring_up(config)
    current = Run(config, stage, topology)
    orderly = False
    try:
        with current.signals_caught():
            current._open()
            try:
                with adapted(topology.device), memory_errors_explained(config, stage, topology):
                    yield current
            except Stopped as stopped:
                current.write_status("stopped", str(stopped))
                orderly = True
                raise
            except BaseException as error:
                current._write_failure(error, current._name_missing(error))
                log.debug("failed", exc_info=True)  # the traceback, for the log file alone
                raise
            current.write_status("done")
            orderly = True
    finally:
        current._close()
        take_down(orderly)


def leave(code: int) -> None:
    """End the process. Ranks of a job skip static destructors, in which a few in a hundred abort after their work."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        logging.shutdown()
        os._exit(code)
    sys.exit(code)
