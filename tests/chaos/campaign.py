"""Kills and corruptions by the hundred, against runs to which nothing happened. `make chaos` runs it whole.

    python tests/chaos/campaign.py [--json FILE] [--quick] [--seed N] [--part PART]…

In: nothing.  Out, with --json: a row per headline figure, {"value", "goal", "limit"}. Fails where a run does not end at
the same bits, or a corruption is not noticed. Ranks are real processes that die by SIGKILL; most are forked from a
server that has imported torch, so that many deaths fit into the time; the last ones are started by torchrun.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import torch  # noqa: E402
from chaos.journey import RANKS, Tally, Work, all_stalls, read_journal, timing, travel  # noqa: E402
from support import faults  # noqa: E402
from support.stages import run_stage  # noqa: E402

from vqscale.data.images import ImageReader  # noqa: E402
from vqscale.data.loader import build_loader  # noqa: E402
from vqscale.data.shards import Manifest  # noqa: E402
from vqscale.data.verify import verify_shard  # noqa: E402
from vqscale.engine.checkpoint import Checkpoint, find_latest  # noqa: E402

MINUTES_BETWEEN_FAILURES = 10
SAVES_PER_MINUTE = 12
SMALL = ("total_images=1280", "save_every=64", "log_every=32", "evaluate_every=640")
WORKS = [
    Work("train_vqvae", "train_vqvae", "fsdp", SMALL),
    Work("train_prior", "train_prior_top", "zero2", SMALL),
    Work("train_vqvae", "train_vqvae", "zero2", SMALL),
    Work("train_prior", "train_prior_top", "fsdp", SMALL),
]
LONGER = ("total_images=6400", "save_every=64", "log_every=32", "evaluate_every=0")
INSIDE = ["nothing written@2@1", "shard written@3@0", "shard written@2", "all shards written@2", "manifest written@1"]
INSIDE += ["synced@2", "renamed@2", "before retention@3", "in retention@1", "shard written@2@1"]


def make_inputs() -> None:
    """Images, a VQ-VAE and its codes, of the debug experiment."""
    for stage, workers in (("pack", 1), ("train_vqvae", 0), ("extract_codes", 0)):  # here: none has to be started
        assert run_stage(stage, stage, f"workers={workers}") == 0, stage


# --- kills ------------------------------------------------------------------------------------------------------------


def kill_runs(work: Work, deaths: int, inside: Sequence[str], chance: random.Random, tally: Tally) -> None:
    """`deaths` at random moments and one per point of `inside`, over as many runs as it takes; each run ends as the
    uninterrupted one does."""
    expected = uninterrupted(work)
    left = [*[""] * deaths, *inside]
    chance.shuffle(left)
    runs = 0
    while left:
        runs += 1
        run_dir = Path(f"{work.label}-{runs}").absolute()
        travel(work, run_dir, left, chance, tally)
        assert_same(expected, run_dir)
    print(f"{work.label}: {deaths + len(inside)} kills over {runs} runs, each ended at the same bits", flush=True)


def uninterrupted(work: Work) -> Path:
    """The run to which nothing happens; made once."""
    run_dir = Path(f"{work.label}-uninterrupted").absolute()
    if not run_dir.is_dir():
        travel(work, run_dir, [], random.Random(), Tally())
    return run_dir


def latest_of(run_dir: Path) -> Checkpoint:
    found = find_latest(run_dir / "checkpoints", set_aside=False)
    assert found is not None, run_dir
    return found


def assert_same(expected: Path, run_dir: Path) -> None:
    """Weights, buffers, moments, weight EMA, data position, counters and losses: every bit."""
    one, other = latest_of(expected), latest_of(run_dir)
    tensors, others = one.read(""), other.read("")
    assert tensors.keys() == others.keys()
    differing = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not differing, f"{run_dir}: {differing}"
    assert one.state == other.state, run_dir
    assert losses(expected) == losses(run_dir), run_dir


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["images_seen"], line["loss"]) for line in lines if "loss" in line]


def restart_seconds(work: Work, kills: int) -> list[float]:
    """From the kill of a rank under torchrun to the first step after it: processes, imports and all."""
    expected, run_dir = uninterrupted(work), Path(f"{work.label}-torchrun").absolute()
    journal = run_dir.with_suffix(".jsonl")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", str(RANKS)]
    script = [str(Path(__file__).with_name("journey.py")), work.stage, work.name, str(journal), *work.words(run_dir)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with open(run_dir.with_suffix(".log"), "w") as log:
        job = subprocess.Popen(
            [*torchrun, "--max-restarts", str(kills), *script],
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        seconds = []
        for _ in range(kills):
            pid = _first_rank(journal, job)
            time.sleep(1.0)
            os.kill(pid, signal.SIGKILL)
            died = time.time()
            _first_rank(journal, job, after=died)
            seconds.append(next(line["time"] for line in read_journal(journal) if line["time"] > died) - died)
        assert job.wait(300) == 0, run_dir.with_suffix(".log").read_text()[-3000:]
    assert_same(expected, run_dir)
    return seconds


def _first_rank(journal: Path, job: subprocess.Popen[bytes], after: float = 0.0) -> int:
    until = time.monotonic() + 180
    while time.monotonic() < until and job.poll() is None:
        lines = read_journal(journal)
        if lines and lines[-1]["time"] > after:
            return int(lines[-1]["pid"])
        time.sleep(0.05)
    raise AssertionError(f"no step in time: {journal.with_suffix('.log').read_text()[-3000:]}")


# --- corruptions ------------------------------------------------------------------------------------------------------


def corrupt_checkpoints(runs: Sequence[Path], trials: int, chance: random.Random) -> dict[str, int]:
    """Damage the newest of two checkpoints; what is loaded must be the older one, never the damaged one."""
    counts = {"tried": 0, "silent": 0, "previous_used": 0}
    for trial in range(trials):
        folder = Path(f"damaged-{trial}")
        shutil.copytree(runs[trial % len(runs)] / "checkpoints", folder)
        previous, newest = sorted(path.name for path in folder.glob("0*"))
        what = faults.damage(folder / newest, chance)
        found = find_latest(folder)
        assert found is not None
        counts["tried"] += 1
        counts["silent"] += found.folder.name == newest
        counts["previous_used"] += found.folder.name == previous
        if found.folder.name != previous:
            print(f"NOT NOTICED: {what} in {runs[trial % len(runs)]}")
        shutil.rmtree(folder)
    return counts


def samples_of(folder: Path) -> list[tuple[bool, int, bytes]]:
    """(bad, label, pixels) of every sample in stored order, as training reads them."""
    manifest = Manifest.load(folder)
    reader = ImageReader(manifest.transform["resolution"])
    loader = build_loader(
        folder, read=reader, global_batch=manifest.num_samples, shuffle_window=0, max_bad_fraction=1.0
    )
    batch = next(iter(loader))
    pixels = [image.numpy().tobytes() for image in batch["image"]]
    return list(zip((batch["bad"] > 0).tolist(), batch["label"].tolist(), pixels, strict=True))


def corrupt_shards(folder: Path, trials: int, chance: random.Random) -> dict[str, int]:
    """Damage one tar (or swap two, or take one away). Each sample must be as it was, or counted as bad; or the data set
    is refused by name. And `vqscale index --verify` must say so in any case."""
    whole = samples_of(folder)
    counts = {"tried": 0, "silent": 0, "refused": 0, "samples_counted": 0, "missed_by_verify": 0}
    for trial in range(trials):
        damaged = Path(f"shards-{trial}")
        shutil.copytree(folder, damaged)
        what = _damage_a_tar(damaged, chance)
        counts["tried"] += 1
        found = [line for n in range(len(Manifest.load(damaged).shards)) for line in verify_shard((damaged, n, False))]
        counts["missed_by_verify"] += not found
        try:
            read = samples_of(damaged)
            differing = [position for position, sample in enumerate(read) if sample[1:] != whole[position][1:]]
            silent = [position for position in differing if not read[position][0]]
            counts["samples_counted"] += sum(bad for bad, _, _ in read)
        except (ValueError, OSError):
            counts["refused"] += 1
            silent = []
        counts["silent"] += bool(silent)
        if silent or not found:
            print(f"NOT NOTICED: {what}: samples {silent[:5]}, verify: {found[:1]}")
        shutil.rmtree(damaged)
    return counts


def _damage_a_tar(folder: Path, chance: random.Random) -> str:
    tars = sorted(folder.glob("*.tar"))
    one, other = chance.sample(tars, 2)
    what = chance.random()
    if what < 0.05:
        one.unlink()
        return f"{one.name} is missing"
    if what < 0.1:
        one.write_bytes(b"")
        return f"{one.name} is empty"
    if what < 0.2:
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        return f"{one.name} and {other.name} are swapped"
    return faults.change(one, chance)


# --- the whole --------------------------------------------------------------------------------------------------------


PARTS = ("kills", "share", "restart", "corruptions")
Rows = dict[str, dict[str, Any]]


def campaign(quick: bool, seed: int, parts: Sequence[str] = PARTS) -> Rows:
    """Those parts of it, in the current folder."""
    chance, works, found = random.Random(seed), WORKS[:2] if quick else WORKS, Rows()
    make_inputs()
    if "kills" in parts:
        tally = Tally()
        for number, work in enumerate(works):
            inside = INSIDE[number : number + 1] if quick else INSIDE[number::2]
            kill_runs(work, 1 if quick else 9, inside, chance, tally)
        found |= rows_of_kills(tally)
    if "share" in parts and not quick:
        found |= rows_of_share(replace(works[0], overrides=LONGER), chance)
    if "restart" in parts and not quick:
        found |= rows_of_restarts(restart_seconds(works[0], 3))
    if "corruptions" in parts:
        runs = [run for run in (*Path().glob("*-uninterrupted"), Path("runs/debug/train_vqvae")) if run.is_dir()]
        found |= rows_of_corruptions(
            corrupt_checkpoints(runs, 20 if quick else 240, chance),
            corrupt_shards(Path("runs/debug/pack/train"), 20 if quick else 300, chance),
        )
    return found


def row(value: float, goal: float | None = None) -> dict[str, Any]:
    return {"value": round(value, 4), "goal": goal, "limit": None}


def rows_of_kills(tally: Tally) -> Rows:
    """What was survived, and what it cost."""
    return {
        "chaos/kills_survived_bit_identically": row(tally.kills, 50),
        "chaos/kills_inside_a_save": row(tally.inside_a_save, 15),
        "chaos/redone_images_most": row(max(tally.redone_images)),
        "chaos/save_stall_seconds": row(median(all_stalls(Path().glob("*.jsonl")))),
        "chaos/seconds_to_train_again_forked": row(median(tally.seconds_to_train_again)),
    }


def rows_of_share(work: Work, chance: random.Random) -> Rows:
    """What of the time of one run through many kills its steps took; beside it, all that it takes to simulate that."""
    run_dir = Path(f"{work.label}-share").absolute()
    travel(work, run_dir, [""] * 15, chance, Tally())
    measured = timing(run_dir.with_suffix(".jsonl")) | {"steps_between_saves": 2}
    return {"chaos/share_under_constant_kills": row(measured["work"] / measured["seconds"]) | measured}


def rows_of_restarts(seconds: Sequence[float]) -> Rows:
    """From kill to training with processes that start anew, and what follows for a long run."""
    stall = median(all_stalls(Path().glob("*.jsonl")))
    return {
        "chaos/seconds_to_train_again": row(median(seconds), 30),
        "chaos/effective_training_time": row(effective(mean(seconds), stall), 0.97),
    }


def rows_of_corruptions(checkpoints: dict[str, int], shards: dict[str, int]) -> Rows:
    """How many, and how many of them were not noticed."""
    return {
        "chaos/checkpoint_corruptions": row(checkpoints["tried"], 200),
        "chaos/checkpoint_corruptions_silent": row(checkpoints["silent"], 0),
        "chaos/checkpoint_corruptions_previous_used": row(checkpoints["previous_used"], 200),
        "chaos/shard_corruptions": row(shards["tried"], 300),
        "chaos/shard_corruptions_silent": row(shards["silent"], 0),
        "chaos/shard_corruptions_refused": row(shards["refused"]),
        "chaos/shard_corruptions_missed_by_verify": row(shards["missed_by_verify"], 0),
    }


def effective(restart: float, stall: float) -> float:
    """Share of the time that trains, at one kill per MINUTES_BETWEEN_FAILURES and SAVES_PER_MINUTE: a kill costs the
    restart and half the time between two saves, a save what it stalls."""
    lost = restart + 60 / SAVES_PER_MINUTE / 2
    return (1 - lost / (60 * MINUTES_BETWEEN_FAILURES)) * (1 - stall * SAVES_PER_MINUTE / 60)


def main(argv: Sequence[str] | None = None) -> Rows:
    """Raises AssertionError at the first run that does not come back, or when a corruption was silent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="four kills, forty corruptions")
    parser.add_argument("--seed", type=int, default=0, help="of the kills and corruptions")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be given again")
    args = parser.parse_args(argv)
    json_path = args.json.absolute() if args.json else None
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        os.chdir(folder)
        try:
            found = campaign(args.quick, args.seed, args.part or PARTS)
        finally:
            os.chdir(before)
    for name, entry in found.items():
        print(f"{name:48} {entry['value']:10g}" + (f"   goal {entry['goal']:g}" if entry["goal"] is not None else ""))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(found, indent=1) + "\n")
    for name in ("checkpoint_corruptions_silent", "shard_corruptions_silent", "shard_corruptions_missed_by_verify"):
        assert found.get(f"chaos/{name}", row(0))["value"] == 0, name
    return found


if __name__ == "__main__":
    main()
