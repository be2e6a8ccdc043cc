"""Are the shards there, and whole? Looked at in the order in which they are read, each by one rank.

In: a data set's tars, their order, this rank's share.  Out: nothing, or an error that names the shard. Enough for the
first windows is looked at before the first step, the rest beside the training, ahead of its reads. Remote shards are
checked when they are fetched, against their sha256.
"""

import logging
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vqscale.data.order import ShuffleOrder
from vqscale.data.parts import PartReader

log = logging.getLogger("vqscale")

AT_START = 1000  # shards that a rank looks at before the first step
PAUSE = 0.01  # seconds between looks beside the training: 100 a second and rank
_NAMED = 10  # problems that are named
Item = TypeVar("Item")


class CutShort(NamedTuple):
    """A tar that has lost its end, and how many samples are gone with it."""

    path: Path
    size: int
    expected: int
    lost: int


class ShardCheck:
    """The check of one rank. Made on all ranks together, where `gather` is a collective."""

    def __init__(
        self,
        folder: Path,
        files: PartReader,
        order: ShuffleOrder,
        *,
        position: int,
        allowed: float,
        share: tuple[int, int] = (0, 1),
        gather: Callable[[Any], list[Any]] = lambda value: [value],
    ):
        """position: where reading begins. allowed: samples that may be lost. share: (n, of): every `of`-th shard from
        the n-th on. Raises what any rank's shards give: FileNotFoundError for a missing one, ValueError for one that
        is foreign, or cut short beyond what is allowed."""
        self._folder, self._files, self._allowed, self._lost = folder, files, allowed, 0
        self._sizes = files.manifest.column("bytes")
        numbers = order.shards_from(position)
        local = numbers[~np.isin(numbers, files.tars.remote)] if files.has_remote else numbers
        mine, count = local[share[0] :: share[1]].tolist(), max(AT_START, 2 * order.window // share[1])
        found = [problem for number in mine[:count] if (problem := self._look(number))]
        self._judge([problem for of_rank in gather(found) for problem in of_rank])
        self._rest, self._found = deque(mine[count:]), deque[Problem]()

    def beside(self, batches: Iterable[Item]) -> Generator[Item, None, None]:
        """The batches, while the rest is looked at. Raises as the check does, for this rank's share."""
        over = threading.Event()
        thread = threading.Thread(target=self._look_at_rest, args=(over,), daemon=True)
        try:
            for batch in batches:
                if self._rest and thread.ident is None:
                    thread.start()  # after the workers, which are forked
                self._judge([self._found.popleft() for _ in range(len(self._found))])
                yield batch
        finally:
            over.set()

    def _look_at_rest(self, over: threading.Event) -> None:
        while self._rest and not over.wait(PAUSE):
            if problem := self._look(self._rest.popleft()):
                self._found.append(problem)

    def _look(self, number: int) -> "Problem | None":
        path, expected = self._files.tars[number], int(self._sizes[number])
        try:
            info = os.stat(path)
            if info.st_size == expected and stat.S_ISREG(info.st_mode):
                return None
            if info.st_size > expected:
                return ValueError(
                    f"shard {path} has {info.st_size} bytes, not the {expected} that were indexed: another file"
                )
            index = self._files.index(number)
        except FileNotFoundError as error:
            if error.filename is None:
                return error  # of the index
            samples = self._files.manifest.shards[number].num_samples
            return FileNotFoundError(f"shard {path} is missing; {self._folder} lists it with {samples} samples")
        except (OSError, ValueError) as error:
            return error
        ends = [np.where(index.offset[n] < 0, 0, index.offset[n] + index.size[n]) for n in index.part_names]
        return CutShort(path, info.st_size, expected, int(np.count_nonzero(np.max(ends, axis=0) > info.st_size)))

    def _judge(self, problems: Sequence["Problem"]) -> None:
        errors = [problem for problem in problems if isinstance(problem, Exception)]
        for error in errors[1:_NAMED]:
            log.warning("%s", error)
        for error in errors[:1]:
            raise error
        for cut in problems:
            assert isinstance(cut, CutShort)
            self._lost += cut.lost
            if not self._allowed or self._lost > self._allowed:
                raise ValueError(
                    f"shard {cut.path} is cut short: {cut.size} of {cut.expected} bytes; {self._lost} samples are lost "
                    f"so far, more than the {int(self._allowed)} that max_bad_fraction allows"
                )
            log.warning("shard %s is cut short (%d of %d bytes); lost samples will be replaced", *cut[:3])


Problem = CutShort | OSError | ValueError
