"""Runs, experiments or exported folders -> one self-contained page that puts them side by side.

It only reads: on any machine that sees the folders, and while the runs go on.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqscale.config import Request, flatten, read_request, read_yaml
from vqscale.data.shards import MANIFEST
from vqscale.evaluation.compare import ComparedRun, held_out_png, render
from vqscale.evaluation.figures import is_number, metrics_of_run, series_of
from vqscale.evaluation.scores import METRICS
from vqscale.fields import NonNegativeInt, PathText
from vqscale.files import check_seal, read_json, write_atomically
from vqscale.models.pretrained import CONFIG
from vqscale.rundir import INPUTS, damage_of, is_run, read_status, runs_in
from vqscale.text import one_line, printable

USAGE = "RUN RUN ... [key=value ...]"
_OF_COMMAND = "strategy world_size nodes device device_name precision threads git_commit versions".split()
_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError)


@dataclass(frozen=True)
class CompareConfig:
    """Where the page goes, and how much it shows."""

    out: PathText = "compare.html"  # the page, or a folder for it; a name that ends in .png: the held-out curves alone
    metrics: list[str] = field(default_factory=list)  # of a .png, such as nll; [] = all that are held out
    data: PathText = ""  # reconstruct held-out images of this data set; "" = the one that the first VQ-VAE learned from
    images: NonNegativeInt = 8  # held-out images that every VQ-VAE reconstructs
    samples: NonNegativeInt = 4  # of each class
    classes: NonNegativeInt = 20  # at most so many, spread over all


Config = CompareConfig


def load(words: Sequence[str]) -> Request[CompareConfig]:
    """From `RUN RUN … key=value …`; see `read_request`."""
    paths = next((n for n, word in enumerate(words) if re.match(r"[\w.]+=", word)), len(words))
    return read_request(CompareConfig, words, f"compare {USAGE}", paths=max(1, paths))


def main(request: Request[CompareConfig]) -> None:
    """Write the page. Raises FileNotFoundError where there is no run, ValueError for fewer than two."""
    config, page = request.config, page_path(request.config.out)
    folders = list(dict.fromkeys(folder for path in request.paths for folder in folders_in(path)))
    if len(folders) < 2:
        raise ValueError(f"compare takes two runs or more, there is only {folders[0]}")
    runs = [read_run(folder) for folder in folders]
    content: str | bytes
    if page.suffix == ".png":
        content = held_out_png(runs, config.metrics)
    else:
        content = render(runs, data=config.data, images=config.images, samples=config.samples, classes=config.classes)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(page, content)
    unreadable = [f"; unreadable: {run.path}" for run in runs if run.problem]
    print(printable(f"{page}: {len(runs)} runs{''.join(unreadable)}"))


def page_path(out: str) -> Path:
    """Raises ValueError for a file that is no page: it could be somebody's."""
    path = Path(out) / "compare.html" if Path(out).is_dir() else Path(out)
    if path.suffix not in (".html", ".png"):
        raise ValueError(f"out={out}: neither a folder nor a name that ends in .html or .png")
    return path


def folders_in(path: Path) -> list[Path]:
    """The runs or exported models at a path or, of an experiment, below it. Raises FileNotFoundError without any."""
    folders = sorted(set(runs_in(path))) or [one for one in (path, *sorted(path.glob("*"))) if (one / CONFIG).is_file()]
    if not folders:
        raise FileNotFoundError(f"{path}: no run there (no status.json), and no exported model")
    return folders


def read_run(path: Path) -> ComparedRun:
    """A run directory or an exported folder; what is damaged is its `problem`."""
    try:
        if damage := damage_of(path):
            raise ValueError(damage)
        return _read_run(path, {} if is_run(path) else check_seal(path / CONFIG, read_json(path / CONFIG)))
    except _UNREADABLE as error:
        return ComparedRun(path, f"{type(error).__name__}: {one_line(error)}")


def _read_run(path: Path, exported: Mapping[str, Any]) -> ComparedRun:
    """exported: config.json of an exported folder, which stands for the files of a run."""
    status = read_status(path) or {**exported, "state": "exported"}
    command = read_json(path / "command.json") or exported.get("provenance", {})
    level = {key: exported[key] for key in ("level",) if key in exported}
    config = {"model": exported["config"], **level} if exported else read_yaml(path / "config.yaml")
    inputs = read_json(path / INPUTS) or {key: exported[key] for key in ("data", "tokenizer") if exported.get(key)}
    inputs.pop("config", None)  # of an evaluation: it repeats the keys
    own = read_json(path / MANIFEST) or exported
    stage = command.get("stage") or (f"train_{exported['kind']}" if exported else path.name)
    return ComparedRun(
        path,
        stage=f"{stage} {config.get('level', '')}".strip(),
        state=str(status["state"]),
        images_seen=int(status.get("images_seen", 0)),
        facts=_facts({**config, "command": command, "inputs": inputs, "fingerprint": own.get("fingerprint", {})}),
        metrics=_read_metrics(path),
        scores=_read_scores(path / "scores.json"),
    )


def _facts(values: Mapping[str, Any]) -> dict[str, str]:
    command = {key: values["command"][key] for key in _OF_COMMAND if key in values["command"]}
    flat = [(key, value) for key, value in flatten({**values, "command": command}) if value != {}]
    texts = {key: value if isinstance(value, list) else [value] for key, value in flat}
    return {key: ", ".join(one if isinstance(one, str) else json.dumps(one) for one in texts[key]) for key in texts}


def _read_metrics(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Raises ValueError for lines that cannot be read, besides the last one of a run that was killed."""
    file, lines = path / "metrics.jsonl", metrics_of_run(path)
    written = len(file.read_bytes().splitlines()) if file.is_file() else 0
    if written - len(lines) > (1 if lines else 0):
        raise ValueError(f"metrics.jsonl: {written - len(lines)} of {written} lines cannot be read")
    return series_of(lines)


def _read_scores(file: Path) -> dict[str, dict[str, Any]]:
    scores = json.loads(file.read_bytes()) if file.is_file() else {}
    if wrong := [key for key, score in scores.items() if not _is_score(key, score)]:
        raise ValueError(f"{file.name}: {wrong[0]} is no score that can be read: {str(scores[wrong[0]])[:80]}")
    return scores


def _is_score(key: str, score: Any) -> bool:
    if key.split("/")[0] not in METRICS or not isinstance(score, dict) or "value" not in score:
        return False
    numbers = [score["value"], *(score.get("interval") or (None, None))]
    return len(numbers) == 3 and all(number is None or is_number(number) for number in numbers)
