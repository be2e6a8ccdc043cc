"""One training run through many deaths.

In: a stage, a strategy, the deaths to die.  Out: a run directory whose run is done, and a journal of what it took.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from support import faults
from support.distributed import Ranks, started
from support.stages import run_stage

from vqscale.data.loader import Loader
from vqscale.engine.checkpoint import Checkpointer, find_latest, verify

RANKS = 2


@dataclass(frozen=True)
class Work:
    """What is trained, and how."""

    stage: str
    name: str
    strategy: str
    overrides: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name}-{self.strategy}"

    def words(self, run_dir: Path) -> list[str]:
        return [f"run_dir={run_dir}", f"strategy={self.strategy}", "workers=0", "trackers=[]", *self.overrides]


@dataclass
class Tally:
    """What the deaths of one or more journeys cost."""

    kills: int = 0
    inside_a_save: int = 0
    redone_images: list[int] = field(default_factory=list)
    seconds_to_train_again: list[float] = field(default_factory=list)
    save_stalls: list[float] = field(default_factory=list)


def rank(stage: str, name: str, words: list[str], journal: str) -> None:
    """One rank of a run, which writes down each step and each save. Raises AssertionError where the run fails."""
    faults.install_from_environment()
    _write_steps_down(Path(journal))
    assert run_stage(stage, name, *words) == 0


def _write_steps_down(journal: Path) -> None:
    """A line per step (`seen`: images) and per save (`stall`: seconds that training waited), by the first rank."""
    if os.environ.get("RANK", "0") != "0":
        return
    advance, save = Loader.advance, Checkpointer.save

    def note(**facts: Any) -> None:
        with open(journal, "a") as file:
            file.write(json.dumps({"time": time.time(), "pid": os.getpid(), **facts}) + "\n")

    def advanced(self: Loader) -> None:
        advance(self)
        note(seen=self.state.consumed_samples)

    def saved(self: Checkpointer, *arguments: Any) -> None:
        start = time.perf_counter()
        save(self, *arguments)
        note(stall=time.perf_counter() - start)

    Loader.advance, Checkpointer.save = advanced, saved  # type: ignore[method-assign]


def read_journal(journal: Path) -> list[dict[str, Any]]:
    if not journal.is_file():
        return []
    return [json.loads(line) for line in journal.read_text().splitlines()]


def travel(work: Work, run_dir: Path, deaths: list[str], chance: random.Random, tally: Tally) -> None:
    """Run until it is done, dying by as many of `deaths` (a FAULT, or "" for a kill at a random moment) as it takes;
    those that were died are taken from the list. At every instant in between a whole checkpoint must be there."""
    journal = run_dir.with_suffix(".jsonl")
    died_at = 0.0
    while True:
        fault = deaths[0] if deaths else ""
        with started(
            rank, RANKS, work.stage, work.name, work.words(run_dir), str(journal), variables={"FAULT": fault}
        ) as ranks:
            killed = _kill_at_random(ranks, journal, chance) if deaths and not fault else False
            codes = ranks.wait(5 if killed else 120) if deaths else ranks.wait(240)
            died = -signal.SIGKILL in codes
            assert died or codes == [0] * RANKS, f"{work.label}: exit codes {codes}\n{ranks.output()[-3000:]}"
        _count_resume(journal, died_at, tally)
        if not died:
            return
        if not killed:
            assert fault, f"{work.label}: a rank hung and was killed\n{ranks.output()[-3000:]}"
        died_at = time.time()
        deaths.pop(0)
        tally.kills += 1
        tally.inside_a_save += bool(fault)
        _assert_a_checkpoint_is_whole(run_dir, journal)


def _kill_at_random(ranks: Ranks, journal: Path, chance: random.Random) -> bool:
    """Some moment after the first step, one rank or all. False when the run ended before."""
    until, pid = time.monotonic() + 120, ranks.pids[0]
    while not any(line["pid"] == pid for line in read_journal(journal)[-1:]):
        if time.monotonic() > until or not ranks.alive():
            return False
        time.sleep(0.01)
    time.sleep(chance.uniform(0.0, 2.0))
    alive = ranks.alive()
    ranks.signal(signal.SIGKILL, chance.choice([[0], [1], None]))
    if alive:
        with open(journal, "a") as file:
            file.write(json.dumps({"time": time.time(), "pid": pid, "killed": True}) + "\n")
    return alive


def timing(journal: Path) -> dict[str, Any]:
    """What a run with kills took, in seconds: `seconds` from its first batch to its last step, of which its steps alone
    would take `work`; `step`; `stall`, what a save adds to the steps around it; `restart`, from a kill to the next
    batch; `kills`, after the first batch. All but the kills are means.
    """
    lines = read_journal(journal)
    steps = [line for line in lines if "seen" in line]
    batch = steps[1]["seen"] - steps[0]["seen"]
    after_step, after_save = [], []
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if "seen" in before and "stall" in line and "seen" in after:
            after_save.append(after["time"] - before["time"])
        elif "seen" in line and "seen" in after:
            after_step.append(after["time"] - line["time"])
    step = mean(after_step)
    start, kills = steps[0]["time"] - step, [line["time"] for line in lines if "killed" in line]
    again = [min(line["time"] for line in steps if line["time"] > kill) - step - kill for kill in kills]
    return {
        "seconds": steps[-1]["time"] - start,
        "work": steps[-1]["seen"] / batch * step,
        "step": step,
        "stall": mean(after_save) - step,
        "restart": mean(again),
        "kills": [kill - start for kill in kills],
    }


def _count_resume(journal: Path, died_at: float, tally: Tally) -> None:
    """Of the start that followed a death: when it trained again, and what it did once more."""
    lines = read_journal(journal)
    steps = [line for line in lines if "seen" in line]
    before = [line["seen"] for line in steps if line["time"] <= died_at]
    after = [line for line in steps if line["time"] > died_at]
    if died_at and after:
        tally.seconds_to_train_again.append(after[0]["time"] - died_at)
        step = steps[1]["seen"] - steps[0]["seen"]
        tally.redone_images.append(max(0, before[-1] - after[0]["seen"] + step) if before else 0)


def _assert_a_checkpoint_is_whole(run_dir: Path, journal: Path) -> None:
    """Once a process began its second save, the first was committed; so from then on one must be there."""
    saves = Counter(line["pid"] for line in read_journal(journal) if "stall" in line)
    if max(saves.values(), default=0) > 1:
        assert find_latest(run_dir / "checkpoints", set_aside=False) is not None, f"{run_dir}: no checkpoint is left"
    assert not [path for path in (run_dir / "checkpoints").glob("0*") if verify(path)], f"{run_dir}: a damaged one"


def all_stalls(journals: Iterator[Path]) -> list[float]:
    return [line["stall"] for journal in journals for line in read_journal(journal) if "stall" in line]


if __name__ == "__main__":  # a rank under torchrun: STAGE NAME JOURNAL WORDS...
    stage, name, journal, *words = sys.argv[1:]
    rank(stage, name, words, journal)
