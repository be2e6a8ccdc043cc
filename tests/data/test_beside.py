"""One thread makes items while another uses them: order, bounds, errors of either side."""

import threading
from collections.abc import Iterator

import pytest

from vqscale.data.beside import use_beside

SECONDS = 30  # more than any of this takes


def test_all_items_are_used_in_order_in_another_thread() -> None:
    def use(items: Iterator[int]) -> tuple[list[int], bool]:
        return list(items), threading.current_thread() is threading.main_thread()

    assert use_beside(range(100), use, waiting=3) == (list(range(100)), False)
    assert use_beside([], use, waiting=1) == ([], False)
    assert use_beside(range(100), use, waiting=0) == (list(range(100)), True)


def test_the_next_item_is_made_while_one_is_used() -> None:
    second_is_made, first_is_used = threading.Event(), threading.Event()

    def make() -> Iterator[int]:
        yield 1
        assert first_is_used.wait(SECONDS)
        second_is_made.set()
        yield 2

    def use(items: Iterator[int]) -> list[int]:
        first = next(items)
        first_is_used.set()
        assert second_is_made.wait(SECONDS)
        return [first, *items]

    assert use_beside(make(), use, waiting=1) == [1, 2]


@pytest.mark.parametrize("waiting", [1, 4])
def test_no_more_items_wait_than_may(waiting: int) -> None:
    made, used, most = 0, 0, 0

    def make() -> Iterator[int]:
        nonlocal made, most
        for item in range(50):
            made += 1
            most = max(most, made - used)
            yield item

    def use(items: Iterator[int]) -> None:
        nonlocal used
        for _ in items:
            used += 1

    use_beside(make(), use, waiting)
    assert (made, used) == (50, 50) and most <= waiting + 2  # one is made, one is used


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_making_comes_after_all_that_was_made(kind: type[BaseException]) -> None:
    used: list[int] = []
    left: list[BaseException] = []

    def make() -> Iterator[int]:
        yield from range(5)
        raise kind("no more")

    def use(items: Iterator[int]) -> None:
        try:
            used.extend(items)
        except BaseException as error:
            left.append(error)
            raise

    with pytest.raises(kind, match="no more"):
        use_beside(make(), use, waiting=10)
    assert used == list(range(5)) and [type(error) for error in left] == [kind]


def test_an_error_of_the_use_ends_the_making_at_once() -> None:
    made: list[int] = []
    has_failed = threading.Event()

    def make() -> Iterator[int]:
        for item in range(1000):
            made.append(item)
            yield item
            if item == 2:
                assert has_failed.wait(SECONDS)

    def use(items: Iterator[int]) -> None:
        for item in items:
            if item == 2:
                threading.Timer(0.0, has_failed.set).start()
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        use_beside(make(), use, waiting=2)
    assert len(made) <= 6


def test_where_both_fail_the_error_of_the_use_is_raised() -> None:
    """A full disk is not hidden by the stop request that comes with it."""
    is_stopped = threading.Event()

    def make() -> Iterator[int]:
        yield 1
        is_stopped.set()
        raise ValueError("stopped")

    def use(items: Iterator[int]) -> None:
        next(items)
        assert is_stopped.wait(SECONDS)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        use_beside(make(), use, waiting=1)
