"""What a run directory holds: how its run stands, the inputs that it was made of, and which files are its stage's own.

In: a run directory, or a folder of them.  Out: the runs; a run's status; a refusal of entries that lead elsewhere, and
of stale inputs; a clean start.
"""

import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vqscale.config import peek
from vqscale.files import check_seal, read_json

INPUTS = "inputs.json"
INIT = "init.json"  # what is to be known of the weights that a trainer started from
TRACKERS = "trackers.json"  # tracker -> its run's id
_TRACKED = ("metrics.jsonl", *"tensorboard wandb trackio mlflow".split(), TRACKERS)
# What every run writes, besides its stage's `outputs`.
BOOKKEEPING = (INPUTS, INIT, *"config.yaml command.json status.json log .lock STOP".split(), *_TRACKED)
_MARKS = ("status.json", "log/job")  # of a run; one that only waits in the queue has the second alone
_PIPELINE = (
    *("pack", "index", "train_vqvae", "extract_codes"),
    *("train_prior_top", "train_prior_middle", "train_prior_bottom", "sample", "train_classifier", "evaluate"),
)
_START = "sha256:"


def is_run(folder: Path) -> bool:
    """Whether the folder is a run directory."""
    return any((folder / mark).is_file() for mark in _MARKS)


def runs_in(folder: Path) -> list[Path]:
    """The run itself, or the runs up to two levels below; one with both marks may come twice."""
    if is_run(folder):
        return [folder]
    below = (path for mark in _MARKS for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{mark}"))
    return [path.parent.parent if path.name == "job" else path.parent for path in below]


def pipeline_order(name: str) -> int:
    """Where a run comes in the pipeline, by the stage that its name begins with."""
    earlier = [number for number, stage in enumerate(_PIPELINE) if name.startswith(stage)]
    return max(earlier, default=len(_PIPELINE))


def read_status(run_dir: Path) -> dict[str, Any]:
    """status.json, or {} where there is none. `running` whose process is gone on this host reads as `stopped`."""
    status = recorded_status(run_dir)
    if status.get("state") == "running" and status.get("host") == socket.gethostname():
        if not process_exists(status.get("pid")):
            status.update(state="stopped", reason="its process is gone")
    return status


def recorded_status(run_dir: Path) -> dict[str, Any]:
    """status.json as it was written, or {} where there is none, or a damaged one."""
    try:
        return check_seal(run_dir / "status.json", read_json(run_dir / "status.json"))
    except ValueError:
        return {}


def damage_of(run_dir: Path) -> str:
    """What keeps the run's own files from being read, or "": a stage that runs again writes them anew."""
    own: dict[str, Callable[[Path], object]]
    own = {"status.json": _read_sealed, "command.json": _read_sealed, "config.yaml": peek}
    for name, read in own.items():
        try:
            if (run_dir / name).is_file():
                read(run_dir / name)
        except (OSError, ValueError, RecursionError) as error:
            return f"{name} cannot be read: {error}"
    return ""


def _read_sealed(path: Path) -> None:
    if not isinstance(value := json.loads(path.read_bytes()), dict):
        raise ValueError(f"{path.name} is no JSON object")
    check_seal(Path(path.name), value)


def process_exists(pid: Any) -> bool:
    """Whether a process of this machine has that number, any user's; True for what is no number."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except (PermissionError, TypeError, ValueError):
        return True
    return True


def refuse_strange_entries(run_dir: Path, outputs: Iterable[str]) -> None:
    """Raises ValueError for a link, a pipe or a device where the run would write: it would change other files."""
    own = [*BOOKKEEPING, *outputs]
    entries = [path for path in run_dir.iterdir() if any(fnmatch(path.name, pattern) for pattern in own)]
    if (run_dir / "log").is_dir() and not (run_dir / "log").is_symlink():
        entries += (run_dir / "log").iterdir()
    for path in sorted(entries):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise ValueError(f"{path} is a link: a run writes only into its own directory (which may be a link itself)")
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(f"{path} is neither a file nor a folder: a run cannot write there")


def holds_outputs(run_dir: Path) -> bool:
    """Whether there are files besides the bookkeeping."""
    files = (path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file())
    return any(path.parts[0] not in BOOKKEEPING for path in files)


def remove_outputs(run_dir: Path, stage: str, outputs: Iterable[str]) -> None:
    """Remove what an earlier run of this stage wrote, and nothing else; logs stay. Nothing happens where no run was.

    outputs: glob patterns. Raises ValueError where the run is another stage's, OSError where a removal fails.
    """
    if not (run_dir / "config.yaml").is_file():
        return
    writer = read_json(run_dir / "command.json").get("stage", stage)
    if writer != stage:
        raise ValueError(f"fresh=true: {run_dir} is a run of {writer}, not of {stage}; nothing was removed")
    # In this order, a removal that is cut short leaves a run that is not done and still refuses another config.
    for pattern in ("status.json", *outputs, *_TRACKED, INPUTS, "command.json", "config.yaml"):
        for path in sorted(run_dir.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def stale_inputs(run_dir: Path, inputs: Mapping[str, str]) -> list[str]:
    """A line for each input whose fingerprint is not the recorded one; older runs have no record."""
    lines = []
    for key, recorded in read_json(run_dir / INPUTS).items():
        now = inputs.get(key, "not given")
        if now != recorded:
            lines.append(f"{key} was {_short(recorded)} and is {_short(now)} now")
    return lines


def _short(fingerprint: Any) -> str:
    text = str(fingerprint)
    return text[: len(_START) + 12] if text.startswith(_START) else text
