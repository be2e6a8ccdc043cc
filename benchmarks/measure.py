"""What the benchmarks share: clocks, turns, the machine's own limits, and the table that they print.

A row is {"value", "goal", "limit"}: a ratio measured in one run, what it should reach, what it could reach at best.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vqscale.topology import Topology

ALONE = Topology(0, 1, 0, 1, 1, "single", torch.device("cpu"))


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds instead of minutes")
    return parser


def timed(action: Callable[[], Any]) -> float:
    """Seconds that `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turns(actions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action in each round; every round runs all of them, so a slow minute of the machine slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            seconds[name].append(timed(action))
    return seconds


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of five; of a small one where the type is emulated and slow."""
    best = 0.0
    for side in (256, 2048):
        square = torch.randn(side, side).to(dtype)
        seconds = min(timed(lambda: square @ square) for _ in range(5))  # noqa: B023
        best = max(best, 2 * side**3 / seconds)
        if seconds > 0.02:
            break
    return best


def memory_rate() -> float:
    """Bytes/s of reading 256 MB, the best of five."""
    long = torch.randn(1 << 26)
    return long.numel() * 4 / min(timed(long.sum) for _ in range(5))


def print_rows(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Each row's value beside its goal and its limit."""
    for name, row in rows.items():
        told = [f"{key} {row[key]:.3g}" for key in ("goal", "limit") if row.get(key) is not None]
        print(f"{name:48} {row['value']:8.3f}   {', '.join(told)}")


def write(path: Path | None, result: Any) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


def median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())
