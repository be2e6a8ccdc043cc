"""Two threads at work: one makes items, the other uses them.

In: an iterable of items, and a function that takes an iterator of them.  Out: what the function returns, or the error
of either thread.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Semaphore
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_LOOK_SECONDS = 0.1  # between looks whether the other thread has failed
_END = object()


def use_beside(items: Iterable[Item], use: Callable[[Iterator[Item]], Result], waiting: int) -> Result:
    """`use(items)` in a thread of its own, while this thread makes the items, of which at most `waiting` wait.

    waiting=0: in turns, in this thread. That is faster where the items are made on a CPU: torch's threads wait for each
    other, and one that must share its core holds up all.

    An error of the items is raised inside `use` too, after all items before it, and here once `use` has ended. An error
    of `use` is raised here when the item that is being made is there.
    """
    if not waiting:
        return use(iter(items))
    room, queue = Semaphore(waiting), SimpleQueue[Any]()

    def received() -> Iterator[Item]:
        while (item := queue.get()) is not _END:
            room.release()
            if isinstance(item, BaseException):
                raise item
            yield item

    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(use, received())
        try:
            for item in items:
                while not result.done() and not room.acquire(timeout=_LOOK_SECONDS):
                    pass
                if result.done():
                    break
                queue.put(item)
        except BaseException as error:
            queue.put(error)
            result.result()  # raises it, or the other thread's own
            raise
        queue.put(_END)
        return result.result()
