"""Faults on purpose: death at a point inside a save, kills from outside, damaged files, a full disk.

The product knows nothing of them. `install("POINT@SAVE")` wraps, in the calling process, the functions that a save goes
through, so that the process kills itself where a save first passes POINT, from save number SAVE since its start on; the
environment variable FAULT says the same to a whole job, with "@RANK" behind it for one rank alone.
"""

import os
import random
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vqscale.engine import checkpoint as checkpoints
from vqscale.topology import env_int

# Point -> (holder of the function, its name, whether death comes after it, whether the commit passes it alone).
POINTS: dict[str, tuple[Any, str, bool, bool]] = {
    "nothing written": (checkpoints, "HashingWriter", False, False),
    "shard written": (checkpoints.HashingWriter, "write_data", True, False),
    "all shards written": (checkpoints, "sha256_of", False, True),
    "manifest written": (checkpoints, "fsync", False, True),
    "synced": (os, "rename", False, True),
    "renamed": (os, "rename", True, True),
    "before retention": (checkpoints, "_committed_folders", False, True),
    "in retention": (shutil, "rmtree", False, True),
}
ON_EVERY_RANK = ("nothing written", "shard written")  # the others are the first rank's


def install(spec: str) -> None:
    """`"POINT@SAVE"` or `"POINT@SAVE@RANK"`; "" is no fault."""
    if not spec:
        return
    point, save, *rank = spec.split("@")
    if rank and int(rank[0]) != env_int("RANK", 0):
        return
    holder, name, after, in_commit = POINTS[point]
    real, saves = getattr(holder, name), _count_saves()

    def wrapped(*arguments: Any, **options: Any) -> Any:
        here = threading.current_thread().name.startswith("commit") or not in_commit
        if not here or saves() < int(save):
            return real(*arguments, **options)
        if after:
            real(*arguments, **options)
        if point == "in retention":
            next(Path(arguments[0]).iterdir()).unlink()
        die()

    setattr(holder, name, wrapped)


def install_from_environment() -> None:
    install(os.environ.get("FAULT", ""))


def _count_saves() -> Callable[[], int]:
    """How many saves this process has begun; a save begins when the one before it is committed."""
    real, count = checkpoints.Checkpointer._prepare, 0

    def counted(self: checkpoints.Checkpointer, *arguments: Any) -> bool:
        nonlocal count
        count += 1
        return real(self, *arguments)

    checkpoints.Checkpointer._prepare = counted  # type: ignore[method-assign]
    return lambda: count


def die(*_: Any, **__: Any) -> None:
    """As by `kill -9`: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(limit: int = 64) -> None:
    """From here on no file of this process may grow beyond `limit` bytes, as on a full disk; needs no root. What it
    prints goes nowhere, because tests print into files."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


# --- damage to files --------------------------------------------------------------------------------------------------


def flip_a_bit(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def append(data: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.randrange(1, 2048))


def lose_a_block(data: bytes, chance: random.Random) -> bytes:
    """Zeros where a block was never written."""
    start = chance.randrange(len(data)) // 512 * 512
    return data[:start] + bytes(min(512, len(data) - start)) + data[start + 512 :]


def shift(data: bytes, chance: random.Random) -> bytes:
    """One byte too few in the middle, one too many at the end."""
    place = chance.randrange(len(data))
    return data[:place] + data[place + 1 :] + b"\0"


CHANGES = (flip_a_bit, cut, append, lose_a_block, shift)


def change(path: Path, chance: random.Random) -> str:
    """Change one file's bytes; returns how."""
    before = path.read_bytes()
    while True:
        how = chance.choice(CHANGES)
        if (after := how(before, chance)) != before:
            path.write_bytes(after)
            return f"{how.__name__} in {path.name}"


def damage(folder: Path, chance: random.Random) -> str:
    """Damage a folder of files at random; returns what was done."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    what, victim = chance.random(), chance.choice(files)
    if what < 0.1:
        victim.unlink()
        return f"{victim.name} is missing"
    if what < 0.2:
        (folder / f"{victim.name}.copy").write_bytes(victim.read_bytes())
        return f"a copy of {victim.name} too many"
    other = chance.choice([path for path in files if path != victim])
    if what < 0.3:
        one, two = victim.read_bytes(), other.read_bytes()
        victim.write_bytes(two)
        other.write_bytes(one)
        return f"{victim.name} and {other.name} are swapped"
    return change(victim, chance)
