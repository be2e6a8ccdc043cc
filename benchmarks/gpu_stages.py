"""Parts of `gpu.py`: the tests marked `gpu`, and the debug chain by the command line, with a TERM and a resume.

In: a `Case`.  Out: its rows. Both run programs of their own, whose output is in the log.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_rows import Case

from vqscale.rundir import read_status
from vqscale.stopping import EXIT_UNFINISHED

ROOT = Path(__file__).parents[1]
STEPS = ("pack", "train_vqvae", "extract_codes", "train_prior_top", "train_prior_bottom", "sample", "evaluate")
QUICK_STEPS = STEPS[:2]
TOTAL = "total_images: 1920"  # of the VQ-VAE's debug config
ON_CARD, ON_CPU = "total_images: 6400", "total_images: 960"  # a card's steps must leave time for a TERM
NAME = "gpu"  # of the experiment


def tests(case: Case) -> None:
    """`pytest -m gpu`: the share of the selected tests that passed so far, and the names of those that did not."""
    if not case.on_gpu:
        raise ValueError("it needs a GPU")
    options = ["-m", "gpu", "-vv", "-W", "default", "-o", "timeout=60", "-p", "no:cacheprovider", "tests/gpu"]
    command, lines = [sys.executable, "-m", "pytest", *options], list[str]()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
            selected, passed, others = outcomes(lines)
            if passed or others:
                case.rows.put("tests/passed", passed / selected, selected=selected, passed=passed, others=others)


def outcomes(lines: list[str]) -> tuple[int, int, list[str]]:
    """(tests selected, tests that passed, names of those that failed or were skipped) in the output of `pytest -vv`."""
    text = "".join(lines)
    counts = re.search(r"collected (\d+) items?(?:.* (\d+) selected)?", text)
    found = re.findall(r"^\S+::(\S+) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    others = [f"{name} {word}" for name, word in found if word != "PASSED"]
    return int(counts[2] or counts[1]) if counts else len(found), len(found) - len(others), others


def chain(case: Case) -> None:
    """Every stage of the debug configs; the VQ-VAE's training is stopped by TERM, and the same command goes on."""
    steps = STEPS if case.on_gpu else QUICK_STEPS
    with tempfile.TemporaryDirectory(prefix="gpu-chain-") as name:
        root = Path(name)
        runs = root / "runs" / NAME
        command = chain_command(case, root, steps)
        try:
            code = stop_once(command, root, runs / "train_vqvae" / "metrics.jsonl")
            subprocess.run(command, cwd=root, env=environment())
        finally:
            states = {step: read_status(runs / step).get("state", "none") for step in steps}
            done = sum(state == "done" for state in states.values())
            case.rows.put("chain/stages", done / len(steps), stages=states)
        resumed_from = json.loads((runs / "train_vqvae" / "command.json").read_text()).get("resumed_from", 0)
        resumed = code == EXIT_UNFINISHED and resumed_from > 0 and states["train_vqvae"] == "done"
        case.rows.put("chain/resumed after TERM", resumed, exit_code=code, resumed_from=resumed_from)


def chain_command(case: Case, root: Path, steps: tuple[str, ...]) -> list[str]:
    """`vqscale run` over copies of the debug configs in `root`."""
    folder = root / "configs"
    folder.mkdir()
    for step in steps:
        shutil.copy(ROOT / "configs" / "debug" / f"{step}.yaml", folder)
    path = folder / "train_vqvae.yaml"
    path.write_text(path.read_text().replace(TOTAL, ON_CARD if case.on_gpu else ON_CPU))
    words = [str(folder), f"experiment={NAME}", f"device={case.device}"]
    return [sys.executable, "-m", "vqscale", "run", *words]


def stop_once(command: list[str], root: Path, metrics: Path) -> int:
    """The exit code of the command, which gets a TERM after the first line of metrics."""
    process = subprocess.Popen(command, cwd=root, env=environment())
    try:
        while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        return process.wait()
    finally:
        process.kill()


def environment() -> dict[str, str]:
    """With this project on the path, from wherever the program is started."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
