"""A whole training run, simulated: what storage, saves, failures and restarts leave of its time.

    python benchmarks/simulate.py [--json FILE] [--quick] [--plots DIR]

In: the newest results of `checkpoint.py` and of `make chaos`, and the sizes that `vqscale plan` finds for
configs/imagenet256. Out: goodput, the share of the time that ends up in the trained weights, over ranks and save
interval; the interval with the highest goodput beside those of Young's and Daly's formulas; where the rest went. With
--plots, `scaling.png` in that folder.

A discrete-event simulation: time goes from one event to the next, in whole microseconds, so that the parts add up to
the whole exactly. Ranks fail independently of each other, and a failure of one ends all. Nothing here is timed.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from measure import arguments, write

from vqscale.engine.footprint import checkpoint_bytes, save_interval
from vqscale.stages import plan

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs" / "imagenet256"
MICROSECONDS, DAY = 1_000_000, 86_400
# The Llama 3 Herd of Models, 2024, section 3.3.4: 466 interruptions in 54 days of 16,384 GPUs.
FAILURE_DAYS = 54 * 16_384 / 466
RANKS_PER_NODE = 8
LONGER_RESTART = 300.0  # seconds that a job may wait for its nodes, on top of what was measured
WORLDS = (8, 64, 512, 1_024, 4_096, 16_384)
MOST_RANKS_PER_IMAGE = 16  # of the configured batch; the batch grows beyond one rank per image
BUFFERED_STEPS = 8  # batches that the loader's workers have ready
IMAGE_BYTES = {"train_vqvae": 50_000, "train_prior": 21_000}  # read per image: a JPEG at 256 px; two views' codes
STAGES = ("train_vqvae", "train_prior_bottom", "train_prior_top")
CAMPAIGN = (600.0, 5.0)  # seconds between the kills, and between the saves, of the share that `make chaos` reports


@dataclass(frozen=True)
class Storage:
    """A file system that all nodes share. Rates in bytes/s, times in seconds; the figures are assumptions."""

    latency: float = 0.01
    node_read: float = 2e9
    node_write: float = 1e9
    read: float = 100e9  # of all nodes together
    write: float = 50e9
    between_outages: float = 10.0 * DAY
    outage: float = 120.0  # how long nothing is read or written

    def read_seconds(self, size: float, nodes: int) -> float:
        return self.latency + size / min(nodes * self.node_read, self.read)

    def write_seconds(self, size: float, nodes: int) -> float:
        return self.latency + size / min(nodes * self.node_write, self.write)


@dataclass(frozen=True)
class Job:
    """What the simulation has to know of a run. Times in seconds."""

    interval: float  # of training, from one save to the next
    stall: float  # that training loses to a save
    write: float  # from the start of a save's writing until it is a checkpoint
    restart: float  # from a failure to the first batch
    between_failures: float
    first_batch: float = 0.0  # how long it takes after a restart
    starved: float = 0.0  # share of training's time in which it waits for data, outages aside
    between_outages: float = math.inf
    outage: float = 0.0
    buffered: float = 0.0  # how long training goes on without storage


@dataclass(frozen=True)
class Spent:
    """Microseconds of a run, by what they were spent on; `useful` is what the trained weights keep."""

    useful: int
    data: int
    saves: int
    restarts: int
    lost: int  # steps that had to be repeated
    total: int
    failures: int

    def share(self, part: str) -> float:
        return float(getattr(self, part) / self.total)


PARTS = ("data", "saves", "restarts", "lost")


def arrivals(mean: float, *key: int) -> Iterator[int]:
    """Times in microseconds at which something happens that has no memory, `mean` seconds apart on average."""
    chance, now = np.random.default_rng(key), 0.0
    while True:
        now += float(chance.exponential(mean)) if math.isfinite(mean) else 1e12
        yield round(now * MICROSECONDS)


class Simulation:
    """One run of `work` seconds of training. The same seed has the same failures and outages for every Job."""

    def __init__(self, job: Job, work: float, seed: int = 0, failures: Sequence[float] | None = None):
        """failures: their times in seconds, where they are known."""

        def ticks(seconds: float) -> int:
            return round(seconds * MICROSECONDS)

        self.job, self.work = job, ticks(work)
        self.interval, self.stall, self.write = max(1, ticks(job.interval)), ticks(job.stall), ticks(job.write)
        self.restart, self.first_batch = ticks(job.restart), ticks(job.first_batch)
        self.outage, self.buffered = ticks(job.outage), ticks(job.buffered)
        self._failures, self._outages = arrivals(job.between_failures, seed, 0), arrivals(job.between_outages, seed, 1)
        if failures is not None:
            self._failures = chain(map(ticks, failures), arrivals(math.inf, seed))
        self.next_failure, self.next_outage = next(self._failures), next(self._outages)
        self.now = self.done = 0  # wall-clock; training in the weights
        self.saved = self.durable = 0  # training in the newest save, and in the newest whole checkpoint
        self.whole_at = 0  # when the newest save is a whole checkpoint
        self.spent = {"data": 0, "saves": 0, "restarts": 0, "lost": 0, "failures": 0}

    def run(self) -> Spent:
        while self.done < self.work:
            self._train()
            if self.done - self.saved >= self.interval and self.done < self.work:
                self._save()
        waited = round(self.done * self.job.starved)
        self.spent["data"] += waited
        return Spent(useful=self.done - waited, total=self.now, **self.spent)

    def _train(self) -> None:
        """Until a save is due, the run ends, a failure comes, or the batches run out."""
        while self.next_outage + self.outage <= self.now:
            self.next_outage = next(self._outages)
        due = self.now + min(self.saved + self.interval, self.work) - self.done
        dry = max(self.now, self.next_outage + self.buffered)
        start, until = self.now, min(due, dry, self.next_failure)
        self.now = until
        self.done += until - start
        if until == self.next_failure:
            self._fail()
        elif until == dry < due:
            self._spend("data", max(0, self.next_outage + self.outage - self.now))

    def _save(self) -> None:
        """One save at a time: the last one must be whole before the next begins."""
        if not (self._spend("saves", max(0, self.whole_at - self.now)) and self._spend("saves", self.stall)):
            return
        self.durable, self.saved = self.saved, self.done
        self.whole_at = self.now + self.write + self._outage_within(self.write)
        self._skip_quiet_saves()

    def _outage_within(self, span: int) -> int:
        """How long nothing is written of what would take `span` from now on."""
        over = self.next_outage + self.outage - max(self.now, self.next_outage)
        return max(0, over) if self.next_outage < self.now + span else 0

    def _skip_quiet_saves(self) -> None:
        """All saves at once before anything else happens: a run has millions of them."""
        wait = max(0, self.write - self.interval)
        cycle = self.interval + wait + self.stall
        quiet = (min(self.next_failure, self.next_outage) - self.now) // cycle
        skipped = min(quiet, (self.work - self.done) // self.interval) - 1
        if skipped < 1:
            return
        self.now += skipped * cycle
        self.done += skipped * self.interval
        self.spent["saves"] += skipped * (wait + self.stall)
        self.durable, self.saved = self.done - self.interval, self.done
        self.whole_at = self.now + self.write

    def _spend(self, part: str, span: int) -> bool:
        """Let time pass. False where a failure came first: then the run has been restarted."""
        if self._passes(part, span):
            return True
        self._fail()
        return False

    def _passes(self, part: str, span: int) -> bool:
        passed = min(span, self.next_failure - self.now)
        self.now += passed
        self.spent[part] += passed
        return passed == span

    def _fail(self) -> None:
        """Back to the newest whole checkpoint; failures in between begin the restart anew."""
        kept = self.saved if self.whole_at <= self.now else self.durable
        self.spent["lost"] += self.done - kept
        self.done = self.saved = self.durable = kept
        self.whole_at = self.now
        while True:
            self.next_failure = next(self._failures)
            self.spent["failures"] += 1
            if self._passes("restarts", self.restart) and self._passes("data", self.first_batch):
                return


def simulate(job: Job, failures: float, seed: int = 0) -> Spent:
    """A run so long that about so many failures fall into it."""
    return Simulation(job, failures * job.between_failures, seed).run()


# --- from measurements and sizes to a job -----------------------------------------------------------------------------


def newest(pattern: str) -> dict[str, Any]:
    """The rows of the newest committed results."""
    return json.loads(sorted((HERE / "results").glob(pattern))[-1].read_text())


def measured() -> dict[str, float]:
    """What the newest results tell: of the chaos campaign, and of a save."""
    chaos, bench = newest("chaos-*.json"), newest("2*.json")
    return {
        "share": chaos["chaos/effective_training_time"]["value"],
        "restart": chaos["chaos/seconds_to_train_again"]["value"],
        "stall": chaos["chaos/save_stall_seconds"]["value"],
        "slowed": bench["checkpoint/slowed"]["value"],
    }


def killed_row() -> dict[str, Any]:
    """Of the run that the chaos campaign kills again and again: its share of useful time, and its times."""
    return newest("chaos-*.json")["chaos/share_under_constant_kills"]


def campaign(figures: dict[str, float]) -> Job:
    """The run that the chaos campaign's share of useful time is told for."""
    between_failures, interval = CAMPAIGN
    return Job(interval, figures["stall"], figures["stall"], figures["restart"], between_failures)


def killed_run(row: dict[str, Any]) -> Simulation:
    """The run that the campaign killed again and again, with its measured times. A save counts as soon as the step
    after it is done."""
    step = row["step"]
    job = Job(
        row["steps_between_saves"] * step, row["stall"], write=step, restart=row["restart"], between_failures=math.inf
    )
    return Simulation(job, row["work"], failures=row["kills"])


@dataclass(frozen=True)
class Sizes:
    """Of a stage of configs/imagenet256."""

    stage: str
    parameters: int
    saved: int  # bytes of a checkpoint
    rate: float  # images per second and rank, by arithmetic alone
    image: int  # bytes
    global_batch: int
    save_every: int  # as configured

    def step(self, ranks: int) -> float:
        """Seconds. Beyond one image per rank the batch grows with the ranks."""
        return max(1.0, self.global_batch / ranks) / self.rate

    def batch(self, ranks: int) -> int:
        return max(self.global_batch, ranks)


def sizes_of(stage: str) -> Sizes:
    """By `vqscale plan`, at 200 TFLOP/s a rank. No data set is needed."""
    request = plan.load([str(CONFIGS / f"{stage}.yaml"), "tflops=200"])
    trainer = request.trainer
    description, _ = plan.describe(request)
    with plan.FakeTensorMode():
        model: Any = plan.build_model(description)
    numel = sum(parameter.numel() for parameter in model.parameters())
    flops = plan.flops_per_image(description, plan._training_step(request))
    saved, rate = checkpoint_bytes(numel, average=bool(trainer.ema_halflife)), request.plan.tflops * 1e12 / flops
    return Sizes(stage, numel, saved, rate, IMAGE_BYTES[request.stage], trainer.global_batch, trainer.save_every)


def job_of(sizes: Sizes, ranks: int, figures: dict[str, float], storage: Storage = Storage()) -> Job:
    """At Daly's interval."""
    nodes, step = max(1, ranks // RANKS_PER_NODE), sizes.step(ranks)
    read = storage.read_seconds(sizes.batch(ranks) * sizes.image, nodes) - storage.latency  # hidden by reading ahead
    write = storage.write_seconds(sizes.saved, nodes)
    stall, between_failures = figures["slowed"] * write, FAILURE_DAYS * DAY / ranks
    return Job(
        interval=save_interval(stall, between_failures),
        stall=stall,
        write=write,
        restart=figures["restart"] + storage.read_seconds(sizes.saved, nodes),
        between_failures=between_failures,
        first_batch=storage.latency + read,
        starved=max(0.0, 1 - step / read),
        between_outages=storage.between_outages,
        outage=storage.outage,
        buffered=BUFFERED_STEPS * max(step, read),
    )


# --- over ranks and intervals -----------------------------------------------------------------------------------------


def curve(job: Job, failures: float, least: float) -> dict[float, Spent]:
    """Save interval in seconds -> what became of the time, around Daly's, in steps of half an octave."""
    intervals = {job.interval * 2 ** (half / 2) for half in range(-10, 11)}
    return {
        seconds: simulate(replace(job, interval=seconds), failures) for seconds in sorted(intervals) if seconds >= least
    }


def study(sizes: Sizes, ranks: int, figures: dict[str, float], failures: float) -> dict[str, Any]:
    """One number of ranks: the curve, the best interval, the formulas' and the config's."""
    job, step = job_of(sizes, ranks, figures), sizes.step(ranks)
    points = curve(job, failures, step)
    best = max(points, key=lambda seconds: points[seconds].share("useful"))
    configured = step * sizes.save_every / sizes.batch(ranks)
    at_daly = simulate(job, failures)
    return {
        "stage": sizes.stage,
        "ranks": ranks,
        "step_seconds": step,
        "between_failures_seconds": job.between_failures,
        "save_seconds": job.write,
        "restart_seconds": job.restart,
        "best_interval": best,
        "best_goodput": points[best].share("useful"),
        "young_interval": math.sqrt(2 * job.stall * job.between_failures),
        "daly_interval": job.interval,
        "daly_goodput": at_daly.share("useful"),
        "longer_restart_goodput": simulate(replace(job, restart=job.restart + LONGER_RESTART), failures).share(
            "useful"
        ),
        "configured_interval": configured,
        "configured_goodput": simulate(replace(job, interval=configured), failures).share("useful"),
        "daly_parts": {part: at_daly.share(part) for part in PARTS},
        "curve": [[seconds, spent.share("useful")] for seconds, spent in points.items()],
    }


def check(figures: dict[str, float]) -> dict[str, float]:
    """The chaos campaign, simulated, beside the shares that it reports."""
    row, told = killed_row(), simulate(campaign(figures), 1_000).share("useful")
    killed = killed_run(row).run().share("useful")
    print(f"chaos campaign: {figures['share']:.2%} reported, {told:.2%} simulated")
    print(f"its run under constant kills: {row['value']:.2%} measured, {killed:.2%} simulated")
    return {"reported": figures["share"], "simulated": told, "killed": row["value"], "killed_simulated": killed}


COLUMNS = ("stage", "ranks", "a failure every", "save", "best interval", "Young", "Daly", "goodput at Daly's", *PARTS)
COLUMNS += ("restart + 5 min", "at the config's `save_every`")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: intervals in seconds of training, shares in percent."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        parts = " | ".join(f"{row['daly_parts'][part]:.3%}" for part in PARTS)
        lines.append(
            f"| {row['stage']} | {row['ranks']:,} | {row['between_failures_seconds'] / 3600:,.1f} h "
            f"| {row['save_seconds']:.2f} s | {row['best_interval']:,.0f} s | {row['young_interval']:,.0f} s "
            f"| {row['daly_interval']:,.0f} s | {row['daly_goodput']:.2%} | {parts} "
            f"| {row['longer_restart_goodput']:.2%} "
            f"| {row['configured_goodput']:.2%} ({row['configured_interval']:,.1f} s) |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Of the last stage: goodput over the interval for each number of ranks, and what the losses at Daly's are."""
    rows = [row for row in rows if row["stage"] == rows[-1]["stage"]]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in rows:
        seconds, goodput = zip(*row["curve"], strict=True)
        (line,) = left.plot(seconds, [100 * share for share in goodput], label=f"{row['ranks']:,} ranks")
        left.plot(row["daly_interval"], 100 * row["daly_goodput"], "o", color=line.get_color())
    left.set_xscale("log")
    left.set_xlabel("seconds of training between saves (dot: Daly's)")
    left.set_ylabel("goodput, %")
    left.legend(fontsize=7)
    bottom = np.zeros(len(rows))
    for part in PARTS:
        heights = np.array([100 * row["daly_parts"][part] for row in rows])
        right.bar(
            [f"{row['ranks']:,}" for row in rows],
            heights,
            bottom=bottom,
            label="lost steps" if part == "lost" else part,
        )
        bottom += heights
    right.set_xlabel("ranks")
    right.set_ylabel("% of the time at Daly's interval")
    right.legend(fontsize=7)
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__)
    parser.add_argument("--plots", type=Path, help="folder of scaling.png")
    args = parser.parse_args(argv)
    figures, failures = measured(), 30 if args.quick else 500
    stages, worlds = (STAGES[:1], WORLDS[:2]) if args.quick else (STAGES, WORLDS)
    rows = [
        study(sizes, ranks, figures, failures)
        for sizes in map(sizes_of, stages)
        for ranks in worlds
        if ranks <= MOST_RANKS_PER_IMAGE * sizes.global_batch
    ]
    print(table(rows))
    if args.plots:
        plot(rows).savefig(args.plots / "scaling.png", dpi=110)
    result = {"check": check(figures), "figures": figures, "runs": rows}
    write(args.json, result)
    return result


if __name__ == "__main__":
    main()
