"""Random damage to every file that the program reads: what is read must be as it was, or be refused in one clear line.

    python tests/chaos/fuzz.py [--trials N] [--seed N] [--format NAME]…

In: nothing.  Out: per format how many damages were harmless, refused, silent (something else was read) or crashed the
reader. The seed is printed; the same seed makes the same damages.
"""

import argparse
import dataclasses
import logging
import random
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from support import faults  # noqa: E402
from support.vqvaes import vqvae  # noqa: E402

from vqscale.config import StageConfig  # noqa: E402
from vqscale.data.codes import CodeReader, pack_codes  # noqa: E402
from vqscale.data.loader import build_loader  # noqa: E402
from vqscale.data.shards import Manifest, ShardWriter  # noqa: E402
from vqscale.data.shardtable import ShardTable  # noqa: E402
from vqscale.data.tarindex import index_tar  # noqa: E402
from vqscale.engine.checkpoint import Checkpoint, Checkpointer, CheckpointState, verify  # noqa: E402
from vqscale.evaluation.statistics import FeatureSet, load_statistics, save_statistics, statistics_path  # noqa: E402
from vqscale.files import sealed, write_json  # noqa: E402
from vqscale.models.pretrained import fingerprint, read_folder, write_folder  # noqa: E402
from vqscale.rundir import read_status  # noqa: E402
from vqscale.topology import bring_up, take_down  # noqa: E402

SAMPLES = 12
CODES = {"levels": {"top": [2, 2]}, "views": 1, "num_codes": 4096, "note": 0.5}
FACTS = {"data": "sha256:1", "n": 8}


@dataclass(frozen=True)
class Format:
    """`make(folder)` writes whole files and names the one to damage; `read(folder)` reads as the program does."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    harm: Callable[[Path, random.Random], str] = faults.change


# --- data sets --------------------------------------------------------------------------------------------------------


def make_codes(folder: Path) -> None:
    """A data set of codes in one tar."""
    with ShardWriter(folder / "000000.tar") as writer:
        for n in range(SAMPLES):
            codes = pack_codes({"top": np.full((1, 2, 2), 100 + n, np.uint16)})
            writer.write(f"k{n:02d}", {**codes, "cls": str(n % 2).encode()})
    assert writer.info is not None
    Manifest.of("codes", [writer.info], ["a", "b"], {"resolution": 8}, CODES).save(folder)


def read_codes(folder: Path) -> Any:
    """Keys, labels and codes as training reads them; a sample that is counted as bad is refused."""
    manifest = Manifest.load(folder)
    index = manifest.index(folder, 0)
    reader = CodeReader(manifest.extra["levels"], num_codes=manifest.extra["num_codes"])
    loader = build_loader(folder, read=reader, global_batch=SAMPLES, shuffle_window=0, max_bad_fraction=1.0)
    batch = next(iter(loader))
    if batch["bad"].any():
        raise ValueError(f"{folder}: {int((batch['bad'] > 0).sum())} samples are counted as bad")
    shards = tuple(manifest.shards)
    return (
        dataclasses.asdict(dataclasses.replace(manifest, shards=shards)),
        index.keys,
        batch["label"].tolist(),
        batch["top"].tolist(),
    )


def made_codes(name: str) -> Callable[[Path], Path]:
    """A maker that names that file of a data set of codes."""

    def make(folder: Path) -> Path:
        make_codes(folder)
        return folder / name

    return make


def make_columns(folder: Path) -> Path:
    """A data set of codes whose shards are in a file of columns, as those of many are."""
    make_codes(folder)
    listed = Manifest.load(folder)
    dataclasses.replace(listed, shards=ShardTable.of(listed.shards)).save(folder)
    return next(folder.glob("shards-*"))


def make_foreign_tar(folder: Path) -> Path:
    """A tar that others wrote, to be indexed."""
    for n in range(4):
        for suffix, text in (("jpg", f"picture {n}"), ("cls", str(n))):
            (folder / f"{n}.{suffix}").write_text(text)
    with tarfile.open(folder / "others.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(folder.glob("[0-9].*")):
            tar.add(path, path.name)
    return folder / "others.tar"


def index_foreign_tar(folder: Path) -> Any:
    """Keys, labels and parts."""
    _, rows = index_tar(folder / "others.tar")
    return rows.keys, rows.labels, rows.parts


def damage_a_header(path: Path, chance: random.Random) -> str:
    """In a member's header alone: what a member contains has no checksum in a tar."""
    data = bytearray(path.read_bytes())
    header = 1024 * chance.randrange(8)  # each member has a block of contents
    for _ in range(chance.choice((1, 1, 2, 8))):
        data[header + chance.randrange(500)] = chance.randrange(256)
    path.write_bytes(data)
    return f"header at {header}"


# --- runs and models --------------------------------------------------------------------------------------------------


def made_checkpoint(name: str) -> Callable[[Path], Path]:
    """A maker of a checkpoint that names that file of it."""

    def make(folder: Path) -> Path:
        topology = bring_up(StageConfig(device="cpu", threads=1))
        try:
            keeper = Checkpointer(folder, topology, keep=1)
            keeper.save({"model.weight": torch.arange(6.0).reshape(2, 3)}, CheckpointState(8, data={"loss": 0.25}))
            keeper.wait()
        finally:
            take_down(orderly=True)
        return folder / f"{8:012d}" / name

    return make


def read_checkpoint(folder: Path) -> Any:
    """What a verified checkpoint holds."""
    if failure := verify(folder / f"{8:012d}"):
        raise ValueError(f"{folder}: {failure}")
    found = Checkpoint(folder / f"{8:012d}")
    return found.state, {name: tensor.tolist() for name, tensor in found.read("").items()}


def make_status(folder: Path) -> Path:
    """A run's status.json."""
    facts = {
        "state": "done",
        "images_seen": 4096,
        "reason": "",
        "host": "elsewhere",
        "pid": 7,
        "job_id": "",
        "time": 1.5,
    }
    write_json(folder / "status.json", sealed(facts))
    return folder / "status.json"


def read_a_status(folder: Path) -> Any:
    """What status.json says; unreadable is refused."""
    if not (found := read_status(folder)):
        raise ValueError(f"{folder}: unreadable")
    return found


def make_statistics(folder: Path) -> Path:
    """Cached statistics of features."""
    path = statistics_path(folder, FACTS)
    save_statistics(path, FeatureSet(8, {}, torch.arange(24.0).reshape(8, 3), torch.ones(8, 2)), FACTS)
    return path


def read_cached_statistics(folder: Path) -> Any:
    """The features in them."""
    found = load_statistics(statistics_path(folder, FACTS), FACTS)
    return found.n, found.features.tolist(), found.logits.tolist()


def made_model(name: str) -> Callable[[Path], Path]:
    """A maker of an exported model that names that file of it."""

    def make(folder: Path) -> Path:
        tensors = vqvae().state_dict()
        config = {"kind": "vqvae", "hidden": 16, "classes": ["a", "b"], "fingerprint": fingerprint(tensors)}
        write_folder(folder, tensors, config)
        return folder / name

    return make


def read_model(folder: Path) -> Any:
    """Its description and the fingerprint of its weights."""
    tensors, config = read_folder(folder)
    return config, fingerprint(tensors)


FORMATS = {
    "shard index": Format(made_codes("000000.index.safetensors"), read_codes),
    "dataset.json": Format(made_codes("dataset.json"), read_codes),
    "columns of shards": Format(make_columns, read_codes),
    "npy in a tar": Format(made_codes("000000.tar"), read_codes),
    "foreign tar": Format(make_foreign_tar, index_foreign_tar, damage_a_header),
    "manifest.json": Format(made_checkpoint("manifest.json"), read_checkpoint),
    "state.json": Format(made_checkpoint("state.json"), read_checkpoint),
    "status.json": Format(make_status, read_a_status),
    "statistics": Format(make_statistics, read_cached_statistics),
    "config.json": Format(made_model("config.json"), read_model),
    "model.safetensors": Format(made_model("model.safetensors"), read_model),
}


# --- trials -----------------------------------------------------------------------------------------------------------


def fuzz(name: str, trials: int, seed: int) -> Counter[str]:
    """Counts of harmless, refused, silent and crashed; silent ones and crashes are printed with their number."""
    chosen, counts, chance = FORMATS[name], Counter[str](), random.Random(f"{name}/{seed}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        whole, damaged = Path(temporary, "whole"), Path(temporary, "damaged")
        whole.mkdir()
        victim = chosen.make(whole).relative_to(whole)
        expected = chosen.read(whole)
        for trial in range(trials):
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(whole, damaged)
            what = chosen.harm(damaged / victim, chance)
            outcome, detail = _outcome(lambda: chosen.read(damaged), expected)
            counts[outcome] += 1
            if outcome in ("silent", "crashed"):
                print(f"{name}, trial {trial}: {outcome} after {what}: {detail[:200]}")
    return counts


def _outcome(read: Callable[[], Any], expected: Any) -> tuple[str, str]:
    try:
        found = read()
    except (ValueError, OSError) as error:
        if "\n" in str(error) or not str(error):
            return "crashed", f"not one line: {error!r}"
        return "refused", str(error)
    except Exception as error:
        return "crashed", repr(error)
    return ("harmless", "") if found == expected else ("silent", repr(found))


def main(argv: Sequence[str] | None = None) -> dict[str, Counter[str]]:
    """Raises AssertionError when a damage was silent or crashed a reader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2_000, help="damages per format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=FORMATS, action="append", help="only this; may be given again")
    args = parser.parse_args(argv)
    print(f"{args.trials} damages of each format, seed {args.seed}")
    found = {}
    for name in args.format or FORMATS:
        found[name] = fuzz(name, args.trials, args.seed)
        print(f"{name:20} " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(found[name].items())))
    wrong = {name: counts for name, counts in found.items() if counts["silent"] or counts["crashed"]}
    assert not wrong, wrong
    return found


if __name__ == "__main__":
    logging.getLogger("vqscale").setLevel(logging.ERROR)  # thousands of warnings would hide the table
    main()
