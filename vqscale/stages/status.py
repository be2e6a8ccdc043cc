"""Run directories -> how each stage stands: a table for people, chosen columns for scripts.

Everything is read from the files of the runs; where there is Slurm, its queue says which jobs are waiting or gone.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vqscale.config import RUNS, Request, peek, read_request
from vqscale.fields import PositiveInt
from vqscale.files import read_json, read_jsonl
from vqscale.rundir import damage_of, is_run, pipeline_order, read_status, runs_in
from vqscale.text import format_duration, printable

USAGE = "[RUNS | RUN | CONFIG | CONFIGS] [key=value ...]"
_ABSENT = "the program did not begin"
_TAIL = 1 << 16  # bytes of metrics.jsonl that are looked at
# The job itself cannot mend these; anything else that ends a run may be the machine's fault.
_MISTAKES = ("ValueError", "FileNotFoundError")


@dataclass(frozen=True)
class StatusConfig:
    """What is asked about the runs."""

    show: str = ""  # columns such as run_dir,state: tab-separated values, - for none, a line per run; "" = a table
    restarts: PositiveInt = 3  # starts in a row without progress after which a run is given up


Config = StatusConfig


def load(words: Sequence[str]) -> Request[StatusConfig]:
    """From `[RUNS] [show=…]`, or `CONFIGS [key=value …] [show=…]` for the runs of a config or of a folder of configs.

    Raises ValueError for an unknown column.
    """
    if not words or "=" in words[0]:
        words = [str(RUNS), *words]
    request = read_request(StatusConfig, words, f"status {USAGE}", paths=1, takes_others=True)
    if unknown := [name for name in _columns(request.config) if name not in COLUMNS]:
        raise ValueError(f"show={unknown[0]}: there is no such column; choose from {', '.join(COLUMNS)}")
    return request


def main(request: Request[StatusConfig]) -> None:
    """Print what was asked for. Raises FileNotFoundError where there is no such folder."""
    columns = _columns(request.config)
    rows = rows_of(request, columns or ("run_dir", *_FOR_PEOPLE, "reason", "log"))
    if columns:
        for row in rows:
            print("\t".join(row[name] or "-" for name in columns))
        return
    Console(width=None if os.isatty(1) else 160).print(_table(rows, request.paths[0]))
    for row in rows:
        if row["state"] in ("failed", "unreadable"):
            print(f"{row['run_dir']} {row['state']}: {row['reason']}; read {row['log']}")


Row = Mapping[str, str]  # column -> what it shows


def rows_of(request: Request[StatusConfig], columns: Sequence[str]) -> list[Row]:
    """In the order of the pipeline; of a config also the run that has not begun."""
    jobs, (path,), status = _queue(), request.paths, request.config
    given = [path] if path.suffix == ".yaml" else [] if is_run(path) else list(path.glob("*.yaml"))
    asked = [(file.stem, peek(file, request.others)) for file in given]
    runs = [(Path(run.run_dir), name, run.total_images) for name, run in asked]
    if request.others and not given:
        raise ValueError(f"{request.others[0]}: {path} has no configs, and only a config can be overridden")
    if not runs and not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}: status takes a folder of runs, a run, or a config")
    runs = _in_order(runs or [(folder, folder.name, 0) for folder in runs_in(path)])
    return [_row(State(run_dir, jobs, status, name, total), columns) for run_dir, name, total in runs]


def _row(run: "State", columns: Sequence[str]) -> Row:
    """A run whose files cannot be read says so, and leaves the others alone."""
    try:
        if damage := damage_of(run.run_dir):
            raise ValueError(damage)
        row = {name: COLUMNS[name](run) for name in columns}
    except (ValueError, TypeError, LookupError, OverflowError, OSError) as error:
        known = {"run_dir": str(run.run_dir), "name": run.name, "state": "unreadable", "verdict": "failed"}
        known |= {"reason": str(error), "why": str(error), "log": str(run.run_dir / "log" / "0.log")}
        row = {name: known.get(name, "") for name in columns}
    return {name: printable(text) for name, text in row.items()}


def _columns(status: StatusConfig) -> list[str]:
    return [name for name in status.show.split(",") if name]


def _in_order(runs: Sequence[tuple[Path, str, int]]) -> list[tuple[Path, str, int]]:
    """Experiments by name, their stages in the order of the pipeline; each run once."""
    once = {run[0]: run for run in runs}.values()
    return sorted(once, key=lambda run: (str(run[0].parent), pipeline_order(run[1]), run[1]))


def _queue() -> Mapping[str, str] | None:
    """This user's jobs in Slurm, id -> PENDING, RUNNING, …; None where there is no Slurm to ask."""
    if not shutil.which("squeue"):
        return None
    command = ["squeue", "--noheader", "--format=%A %T", "--me"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split() for line in answer.splitlines())


class State:
    """How one run stands."""

    def __init__(self, run_dir: Path, jobs: Mapping[str, str] | None, status: StatusConfig, name: str, total: int):
        self.run_dir, self.name = run_dir, name
        self._jobs, self._limit, self._asked_total = jobs, status.restarts, total

    @cached_property
    def _written(self) -> dict[str, Any]:
        return read_status(self.run_dir)

    @cached_property
    def total(self) -> int:
        saved = self.run_dir / "config.yaml"
        return self._asked_total or (peek(saved).total_images if saved.is_file() else 0)

    @property
    def images_seen(self) -> int:
        return int(self._written.get("images_seen", 0))

    @property
    def state(self) -> str:
        return self._judged[0]

    @property
    def reason(self) -> str:
        return self._judged[1]

    @cached_property
    def _judged(self) -> tuple[str, str]:
        state, reason = self._written.get("state", ""), str(self._written.get("reason", ""))
        job = (self._jobs or {}).get(self.job, "")
        if self._jobs is not None and not job and not self._began and self._starts:
            return "failed", _ABSENT
        if state == "done" and 0 < self.images_seen < self.total:
            state, reason = "stopped", f"done with {self.images_seen} images, {self.total} are asked for"
        if state != "done" and job == "PENDING":
            return "queued", reason
        if state not in ("done", "running") and job:
            return "starting", reason
        if state == "running" and self._written.get("job_id") and self._jobs is not None and not job:
            return "stopped", "its job is gone"
        return state, reason

    @property
    def job(self) -> str:
        """The Slurm job that was submitted or started last."""
        path = self.run_dir / "log" / "job"
        return path.read_text().strip() if path.is_file() else str(self._written.get("job_id", ""))

    @property
    def log(self) -> Path:
        """Where the last start has left its words: the program's own log, or if it did not come so far the job's."""
        job = self.run_dir / "log" / f"job-{self.job}.log"
        return job if not self._began and job.is_file() else self.run_dir / "log" / "0.log"

    @cached_property
    def _starts(self) -> list[tuple[int, float]]:
        """Every start of a job adds a line to log/launches: the progress that it found, and when it was."""
        path = self.run_dir / "log" / "launches"
        lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
        return [(int(line[0]), float(line[1])) for line in lines if len(line) == 2]  # a torn one is left out

    @property
    def _began(self) -> bool:
        """Whether the last start came as far as writing a status."""
        written = self._written.get("time")
        return written is not None and (not self._starts or written >= self._starts[-1][1])

    @cached_property
    def progress(self) -> int:
        """What a new start would go on from: images of the newest checkpoint, or finished shards."""
        saved = [int(path.name) for path in self.run_dir.glob("checkpoints/*") if path.name.isdigit()]
        return max(saved) if saved else sum(1 for depth in ("*", "*/*") for _ in self.run_dir.glob(f"{depth}.tar"))

    @cached_property
    def stalled(self) -> int:
        """How many of the last starts in a row made no progress."""
        found = [progress for progress, _ in self._starts]
        return next((n for n, one in enumerate(reversed(found)) if one != self.progress), len(found))

    @property
    def verdict(self) -> tuple[str, str]:
        """What to do about a run whose job has ended, and why: done | again | failed | absent (it never began)."""
        state, reason = self._written.get("state", ""), str(self._written.get("reason", ""))
        if self._began and state == "done":
            return "done", ""
        if self._began and state == "failed" and reason.startswith(_MISTAKES):
            return "failed", reason
        if self.stalled >= self._limit:
            return "failed", f"{self.stalled} starts without progress beyond {self.progress}; {reason}"
        return ("again", reason) if self._began else ("absent", _ABSENT)

    @cached_property
    def last(self) -> dict[str, Any]:
        """The newest loss and images_per_second of metrics.jsonl."""
        return {
            key: line[key]
            for line in read_jsonl(self.run_dir / "metrics.jsonl", _TAIL)
            for key in ("loss", "images_per_second")
            if isinstance(line.get(key), (int, float))
        }

    @property
    def eta(self) -> float | None:
        """Seconds left at the last rate."""
        rate, left = self.last.get("images_per_second"), self.total - self.images_seen
        return left / rate if rate and rate > 0 and left > 0 and self.state == "running" else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


COLUMNS: dict[str, Callable[[State], str]] = {
    "name": lambda run: run.name,
    "run_dir": lambda run: str(run.run_dir),
    "state": lambda run: run.state,
    "images_seen": lambda run: str(run.images_seen),
    "total_images": lambda run: str(run.total or ""),
    "images_per_second": lambda run: _number(run.last.get("images_per_second"), ".1f"),
    "eta": lambda run: "" if run.eta is None else format_duration(run.eta),
    "restarts": lambda run: str(read_json(run.run_dir / "command.json").get("restarts", "")),
    "loss": lambda run: _number(run.last.get("loss"), ".4f"),
    "job": lambda run: run.job,
    "reason": lambda run: run.reason,
    "progress": lambda run: str(run.progress),
    "stalled": lambda run: str(run.stalled),
    "verdict": lambda run: run.verdict[0],
    "why": lambda run: run.verdict[1],
    "log": lambda run: str(run.log),
}
_FOR_PEOPLE = ("state", "images_seen", "total_images", "images_per_second", "eta", "restarts", "loss", "job")


def _table(rows: Sequence[Row], folder: Path) -> Table:
    table = Table("run", *(name.replace("_", " ") for name in _FOR_PEOPLE), box=None)
    for row in rows:
        run_dir = Path(row["run_dir"])
        inside = run_dir != folder and run_dir.is_relative_to(folder)
        cells = [str(run_dir.relative_to(folder) if inside else run_dir), *(row[column] for column in _FOR_PEOPLE)]
        table.add_row(*map(Text, cells))  # names are no markup
    return table
