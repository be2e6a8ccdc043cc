"""Seconds of each stage -> a table of hours, GPU-hours and money; no command of its own.

In: for each stage, what it takes at each number of ranks.  Out: lines of text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_HOUR = 3_600


@dataclass(frozen=True)
class Spent:
    """The seconds of a stage on `ranks` GPUs, which may be fewer than there are."""

    ranks: int
    seconds: float

    @property
    def gpu_hours(self) -> float:
        return self.ranks * self.seconds / _HOUR


def shared(seconds: float, worlds: Sequence[int]) -> list[Spent]:
    """Work of so many GPU-seconds that any number of ranks can share."""
    return [Spent(world, seconds / world) for world in worlds]


def lines(worlds: Sequence[int], stages: Mapping[str, Sequence[Spent]], price: float) -> list[str]:
    """`stages`: by name, one `Spent` for each of `worlds`; `price`: of a GPU-hour, 0 = no money."""
    measures: dict[str, Callable[[Spent], float]] = {
        "hours": lambda s: s.seconds / _HOUR,
        "GPU-hours": lambda s: s.gpu_hours,
    }
    if price:
        measures[f"money at {price:g} per GPU-hour"] = lambda s: s.gpu_hours * price
    table = [_row("ranks", [f"{world:,}" for world in worlds])]
    for title, measure in measures.items():
        table += ["", title]
        for name, row in stages.items():
            table.append(_row(f"  {name}", [_cell(measure(spent)) for spent in row]))
        totals = (sum(measure(row[n]) for row in stages.values()) for n in range(len(worlds)))
        table.append(_row("  total", [_cell(total) for total in totals]))
    return table + _fewer(worlds, stages)


def _fewer(worlds: Sequence[int], stages: Mapping[str, Sequence[Spent]]) -> list[str]:
    """A line for each stage and number of ranks that it cannot use all of."""
    pairs = [
        (name, spent.ranks, world) for name, row in stages.items() for spent, world in zip(row, worlds, strict=True)
    ]
    note = "ranks, as all cannot share its global_batch"
    return [f"{name}: on {ranks} of {world} {note}" for name, ranks, world in pairs if ranks < world]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<28}" + "".join(f"{cell:>14}" for cell in cells)


def _cell(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
