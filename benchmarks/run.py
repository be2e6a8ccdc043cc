"""Every benchmark in turn, each within its share of the time: one table, one JSON file by date, the page's figures.

    python benchmarks/run.py [--quick | --full] [--minutes M] [--only NAME ...] [--results DIR] [--page FILE]

In: nothing. Out: on the terminal every row, its value beside its goal and its limit; `<results>/<date>.json`:
{"<script>/<row>": {"value", "goal", "limit", …}}; in the page, the table and the section on growth. A script that fails
or takes three times its share is named, the others run on, and the exit code is 1. A quick run, or one of some scripts
only, writes what --results and --page ask for and nothing else.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import goal_of, product_rate, reached, rows_of, table, write_section

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs" / "benchmarks.md"
MINUTES = {  # 37 in all, so that `make bench` ends within 40
    "loader": 5.5,
    "train_step": 4,
    "allocator": 1,
    "neighbour": 1.5,
    "checkpoint": 1.5,
    "extract": 4.5,
    "quantizer": 2.5,
    "sampling": 8,
    "codes": 0.5,
    "scale": 4,
    "growth": 4,
}
FULL = {"train_step": ["--compile"]}  # what has no room in `make bench`
LONGER, QUICKER = 4, 0.02  # times the minutes, with --full and --quick


def run_script(name: str, minutes: float, options: Sequence[str]) -> dict[str, Any]:
    """The rows of one script, run in a process of its own. Raises CalledProcessError or TimeoutExpired."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(out), "--minutes", f"{minutes:.2f}"]
        print(f"\n== {name}, about {minutes:.1f} minutes", flush=True)
        subprocess.run([*command, *options], check=True, timeout=60 * (3 * minutes + 5))
        return {f"{name}/{row}": value for row, value in rows_of(json.loads(out.read_text()))}


def run_all(
    names: Sequence[str], minutes: float, options: dict[str, list[str]], keep: Callable[[dict[str, Any]], None]
) -> tuple[dict[str, Any], list[str]]:
    """(rows, what failed). What one script takes beyond its share, the others after it have less.

    keep: is given all rows so far after each script.
    """
    rows: dict[str, Any] = {}
    failed, end = [], time.monotonic() + 60 * minutes
    for number, name in enumerate(names):
        share = MINUTES[name] / sum(MINUTES[other] for other in names[number:])
        left = max(0.0, end - time.monotonic()) / 60
        try:
            rows |= run_script(name, share * left, options[name])
            keep(rows)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failed.append(f"{name}: {error}")
    return rows, failed


def machine() -> str:
    """What was measured on, and what it cannot show."""
    fp32, bf16 = product_rate(torch.float32), product_rate(torch.bfloat16)
    told = (
        f"Measured on {len(os.sched_getaffinity(0))} CPU cores with torch {torch.__version__}; matrix products reach "
        f"{fp32 / 1e9:.0f} GFLOP/s in fp32 and {bf16 / 1e9:.1f} in bf16."
    )
    if bf16 <= fp32:
        told += " Nothing could be shown for bf16, which this processor multiplies slower than fp32."
    if not torch.cuda.is_available():
        told += " There was no GPU and no network between machines: nothing could be shown for either."
    return told


def markdown(rows: dict[str, Any]) -> str:
    """The table for the page."""
    lines = ["| row | value | goal | limit |", "|---|---|---|---|"]
    for name, row in rows.items():
        goal = goal_of(row) + ("" if reached(row) else ", missed")
        limit = "" if row["limit"] is None else f"{row['limit']:.3g}"
        lines.append(f"| {name} | {row['value']:.3g} | {goal} | {limit} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="small sizes: only that everything runs")
    how.add_argument("--full", action="store_true", help="more turns, and what has no room in 40 minutes")
    parser.add_argument("--minutes", type=float, help="about how long in all: fewer turns when short")
    parser.add_argument("--only", nargs="+", choices=MINUTES, default=list(MINUTES), help="these scripts")
    parser.add_argument("--results", type=Path, help="folder of the JSON file")
    parser.add_argument("--page", type=Path, help="the page to write the figures into")
    args = parser.parse_args(argv)
    if not args.quick and len(args.only) == len(MINUTES):
        args.results, args.page = args.results or RESULTS, args.page or PAGE
    options = {name: ["--quick"] * args.quick + FULL.get(name, []) * args.full for name in args.only}
    if args.page and "growth" in args.only:
        options["growth"] += ["--page", str(args.page)]
    usual = sum(MINUTES[name] for name in args.only) * (QUICKER if args.quick else LONGER if args.full else 1)
    about = machine()
    today = datetime.date.today().isoformat()

    def keep(rows: dict[str, Any]) -> None:
        if args.results:
            args.results.mkdir(parents=True, exist_ok=True)
            (args.results / f"{today}.json").write_text(json.dumps(rows, indent=1) + "\n")

    rows, failed = run_all(args.only, args.minutes or usual, options, keep)
    print(f"\n{about}\n{table(rows)}")
    if args.page and not failed:
        write_section(args.page, "table", f"{today}. {about}\n\n{markdown(rows)}")
    for line in failed:
        print(f"failed: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
