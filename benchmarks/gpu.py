"""What a GPU has to show, in one command of at most nine minutes on one card.

    python benchmarks/gpu.py [--device cpu|cuda] [--quick] [--json FILE] [--port DIR] [--only PART ...]

In: nothing. Out: JSON {row: {"value", "goal", "limit"}}, by default benchmarks/results/gpu-<card>-<date>.json, written
after every part; beside it a log of all parts; the table at the end. Each part is a program of its own with a time-out.
What fails leaves rows with `value: null` and the reason, and the other parts go on. The exit code is 0 unless no row
has a value.

The parts, in order: ceilings, the tests marked `gpu` and beside them the debug chain with a TERM and a resume, the
VQ-VAE's step, both priors' steps, sampling, the loader with extraction and a save, and the graphs that `compile: true`
makes.
--port: a folder with the `vqvae.py` of the usual PyTorch port and what that imports, whose training step is measured
beside ours; its class is `VQVAE(in_channel=3, channel=128, n_res_block=2, n_res_channel=32, embed_dim=64,
n_embed=512)`, and a call gives (reconstruction, latent loss). --quick: small sizes, as always on a CPU; it shows only
that everything runs.
"""

import argparse
import datetime
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_rows import ROWS, Case, Rows
from measure import Row, table

from vqscale.topology import die_with_parent

HERE = Path(__file__).parent
BESIDE = ("tests", "chain")  # where nothing is timed, side by side
SECONDS = {  # of each part at most; nine minutes in all, as the chain runs beside the tests
    "ceilings": 25,
    "tests": 150,
    "chain": 180,
    "vqvae": 60,
    "priors": 110,
    "sampling": 70,
    "data": 60,
    "graphs": 30,
}
SLOWER = 6  # a CPU's core may take so much longer
MODULES = {
    "graphs": "gpu_graphs",
    "tests": "gpu_stages",
    "chain": "gpu_stages",
    "data": "gpu_data",
    "sampling": "gpu_sampling",
}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options.add_argument("--quick", action="store_true", help="small sizes: only that everything runs")
    options.add_argument("--json", type=Path, help="write the rows here")
    options.add_argument("--port", type=Path, help="folder with the vqvae.py of the usual PyTorch port")
    options.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="these parts")
    options.add_argument("--part", choices=ROWS, help=argparse.SUPPRESS)  # what the program calls itself with
    return options


def card(device: str) -> str:
    """The card's name, fit for a file; asked of the driver, so that this program takes none of its memory."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if device == "cpu" or not shutil.which(query[0]):
        return device
    names = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.splitlines() or [device]
    return re.sub(r"[^A-Za-z0-9]+", "-", names[0].removeprefix("NVIDIA ")).strip("-")


def run_part(part: str, args: argparse.Namespace, seconds: float, rows: dict[str, Row], log: Any) -> dict[str, Row]:
    """The rows of one part, whatever becomes of it."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        out, earlier = Path(folder) / "rows.json", Path(folder) / "earlier.json"
        earlier.write_text(json.dumps(rows))
        found = Rows(part, out, args.device == "cuda" and not args.quick)
        command = [sys.executable, str(HERE / "gpu.py"), "--part", part, "--device", args.device, "--json", str(out)]
        command += ["--quick"] * args.quick + (["--port", str(args.port)] if args.port else [])
        log.write(f"== {part}\n")
        log.flush()
        reason = wait(command, seconds, log)
        try:
            found.rows = json.loads(out.read_text())
        except ValueError:
            reason = reason or "its rows cannot be read"
        if reason:
            print(f"  {reason}", flush=True)
            for name in found.rows:
                found.fail(name, reason)
        return found.rows


def side_by_side(parts: Sequence[str]) -> list[list[str]]:
    """The parts in their order, those that may run together as one."""
    groups: list[list[str]] = []
    for part in parts:
        if groups and part in BESIDE and groups[-1][-1] in BESIDE:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def wait(command: Sequence[str], seconds: float, log: Any) -> str:
    """Run it to its end or its time-out, which ends its processes too. Returns why it failed, or ""."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(timeout=max(1.0, seconds))
        return f"ended with exit code {code}: see {log.name}" if code else ""
    except subprocess.TimeoutExpired:
        return f"not reached within {seconds:.0f} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def serve(args: argparse.Namespace) -> None:
    """One part, in a program of its own."""
    die_with_parent(os.getppid())
    if args.device == "cuda":
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # a machine without a network
    out = args.json
    full = args.device == "cuda" and not args.quick
    case = Case(args.device, full, Rows(args.part, out, full), json.loads(out.with_name("earlier.json").read_text()))
    case.port = args.port
    with case.rows.attempt(*case.rows.rows):
        module = importlib.import_module(MODULES.get(args.part, "gpu_steps"))
        getattr(module, args.part)(case)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.part:
        serve(args)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU here; --device cpu --quick shows that everything runs", file=sys.stderr)
        return 2
    path = args.json
    if path is None:
        path = HERE / "results" / f"gpu-{card(args.device)}-{datetime.date.today().isoformat()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
    slower = SLOWER if args.device == "cpu" else 1
    rows: dict[str, Row] = {}
    with open(path.with_suffix(".log"), "w") as log:
        for parts in side_by_side(args.only):
            start = time.monotonic()
            print(f"{' and '.join(parts)} ...", flush=True)
            with ThreadPoolExecutor() as pool:
                run = partial(run_part, args=args, rows=dict(rows), log=log)
                for found in pool.map(lambda part: run(part, seconds=slower * SECONDS[part]), parts):  # noqa: B023
                    rows |= found
                    path.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"  {time.monotonic() - start:.0f} s", flush=True)
    print(f"\n{table(rows)}\n\n{path}", flush=True)
    return 0 if any(row["value"] is not None for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
