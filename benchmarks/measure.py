"""What the benchmarks share: clocks, turns, the machine's own limits, rows, and the table that they print.

A row is a ratio measured in one run: {"value", "goal", "limit"}, beside them "better" ("higher", "lower" or "equal")
and what else there is to tell. `goal` is what the ratio should reach, `limit` what it could reach at best; either may
be null. A row that could not be measured has a null value, and the reason under "reason".
A script's result is a tree whose leaves are rows; a row's name is its path, joined by slashes.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.topology import Topology

Row = dict[str, Any]


def alone(device: str = "cpu") -> Topology:
    """One process without a process group."""
    return Topology(0, 1, 0, 1, 1, "single", torch.device(device))


ALONE = alone()


def arguments(
    description: str | None, minutes: float = 0, devices: Sequence[str] = ("cpu", "cuda")
) -> argparse.ArgumentParser:
    """The options of every benchmark; `minutes`: about how long this one takes when nothing is said, 0 = no say.
    devices: where it can be run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds instead of minutes")
    parser.add_argument("--device", choices=devices, type=_device, default="cpu", help="where models compute")
    if minutes:
        parser.add_argument("--minutes", type=float, default=minutes, help="about how long: fewer turns when short")
    return parser


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda: torch sees no GPU here")
    return name


def at_least(goal: float | None, value: float | None, *, limit: float | None = None, **details: Any) -> Row:
    """A row of which more is better."""
    return {"value": value, "goal": goal, "limit": limit, "better": "higher", **details}


def at_most(goal: float | None, value: float | None, *, limit: float | None = None, **details: Any) -> Row:
    """A row of which less is better."""
    return {"value": value, "goal": goal, "limit": limit, "better": "lower", **details}


def exactly(goal: float | None, value: float | None, *, limit: float | None = None, **details: Any) -> Row:
    """A row that has one right value."""
    return {"value": value, "goal": goal, "limit": limit, "better": "equal", **details}


def rows_of(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Row]]:
    """(name, row) of every leaf."""
    for key, node in tree.items():
        name = f"{path}/{key}" if path else key
        if "value" in node:
            yield name, node
        else:
            yield from rows_of(node, name)


def reached(row: Row) -> bool:
    """Whether a row meets its goal; a row without one does, one without a value does not."""
    if row["goal"] is None or row["value"] is None:
        return row["value"] is not None
    return {
        "higher": row["value"] >= row["goal"],
        "lower": row["value"] <= row["goal"],
        "equal": row["value"] == row["goal"],
    }[row["better"]]


def goal_of(row: Row) -> str:
    """The goal in words; empty where there is none."""
    sign = {"higher": "≥", "lower": "≤", "equal": "="}[row["better"]]
    return "" if row["goal"] is None else f"{sign} {row['goal']:.3g}"


def table(tree: Mapping[str, Any]) -> str:
    """One line per row: its value beside its goal and its limit."""
    lines = [f"{'row':44}{'value':>9}{'goal':>11}{'limit':>9}"]
    for name, row in rows_of(tree):
        value, limit = ("-" if row[key] is None else f"{row[key]:.3g}" for key in ("value", "limit"))
        end = row.get("reason", "") if row["value"] is None else "" if reached(row) else "missed"
        lines.append(f"{name:44}{value:>9}{goal_of(row):>11}{limit.strip('-'):>9}   {end}".rstrip())
    return "\n".join(lines)


def finish(args: argparse.Namespace, tree: dict[str, Any]) -> dict[str, Any]:
    """The end of a benchmark: print the table, write the rows where --json says."""
    print(table(tree), flush=True)
    write(args.json, tree)
    return tree


def write(path: Path | None, result: Any) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


def write_section(page: Path, name: str, text: str) -> None:
    """Put `text` between the page's marks `<!-- name -->` and `<!-- end of name -->`; ValueError without them."""
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.read_text().partition(first)
    _, ended, after = rest.partition(last)
    if not (found and ended):
        raise ValueError(f"{page}: has no section between {first.strip()} and {last.strip()}")
    page.write_text(f"{before}{first}{text}\n{last}{after}")


def timed(action: Callable[[], Any]) -> float:
    """Seconds that `action` takes, with what it asked of a GPU, by the GPU's own clock."""
    if not torch.cuda.is_initialized():
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    action()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def in_turns(
    actions: Mapping[str, Callable[[], Any]], rounds: int, seconds: float = float("inf"), least: int = 2
) -> dict[str, list[float]]:
    """Seconds of each action in each round; every round runs all of them, so a slow minute of the machine slows all.

    No round begins after `seconds`, but `least` are run.
    """
    columns: dict[str, list[float]] = {name: [] for name in actions}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= least and time.perf_counter() - start > seconds:
            break
        for name, action in actions.items():
            columns[name].append(timed(action))
    return columns


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median over the rounds of one action's seconds over another's."""
    return median([a / b for a, b in zip(over, under, strict=True)])


def median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def port_model(folder: Path) -> nn.Module:
    """A new model of the usual PyTorch port, at its own defaults, by the `vqvae.py` in this folder."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("vqvae").VQVAE()
    finally:
        sys.path.remove(str(folder))


def port_loss(reconstruction: Tensor, image: Tensor, latent_loss: Tensor) -> Tensor:
    """As the port's own script trains."""
    return F.mse_loss(reconstruction, image) + 0.25 * latent_loss.mean()


def product_rate(dtype: torch.dtype, device: str = "cpu", sides: Sequence[int] = (256, 2048)) -> float:
    """FLOP/s of a square matrix product, the best of twenty; of a small one where the type is emulated and slow."""
    best = 0.0
    for side in (8192,) if device == "cuda" else sides:
        square = torch.randn(side, side, device=device).to(dtype)
        seconds = min(timed(lambda: square @ square) for _ in range(20))  # noqa: B023
        best = max(best, 2 * side**3 / seconds)
        if seconds > 0.02:
            break
    return best


def memory_rate(device: str = "cpu") -> float:
    """Bytes/s of reading 256 MB, the best of five."""
    long = torch.randn(1 << 26, device=device)
    return long.numel() * 4 / min(timed(long.sum) for _ in range(5))
