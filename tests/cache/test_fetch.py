"""Many small things are fetched at once, in order, and not far ahead."""

import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.cache.fetch import THREADS, in_order, prefetched


def test_results_come_in_the_order_of_the_items() -> None:
    def fetch(number: int) -> int:
        time.sleep(0.001 * (number % 3))
        return number * 10

    assert list(in_order(fetch, range(200))) == [10 * n for n in range(200)]
    assert list(in_order(fetch, [])) == []


def test_fetches_run_at_once() -> None:
    together = threading.Barrier(THREADS)

    assert len(list(in_order(lambda _: together.wait(timeout=20), range(2 * THREADS)))) == (
        2 * THREADS
    )


def test_a_slow_consumer_bounds_what_is_fetched() -> None:
    started: list[int] = []

    results = in_order(started.append, range(10_000))
    next(results)
    time.sleep(0.05)

    assert len(started) <= 2 * THREADS + 1
    results.close()


def test_an_error_is_raised_in_its_turn_and_ends_the_fetching() -> None:
    started: list[int] = []

    def fetch(number: int) -> int:
        started.append(number)
        if number == 5:
            raise ValueError("five")
        return number

    results = in_order(fetch, range(10_000))

    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)
    assert len(started) < 100


def test_what_is_there_is_not_kept_waiting_for_an_item_behind_it() -> None:
    is_wanted = threading.Event()

    def items() -> Iterator[tuple[int, int]]:
        yield 1, 1
        assert is_wanted.wait(20)
        yield 2, 1

    results = prefetched(str, items(), max_bytes=100, threads=2, in_thread=True)

    assert next(results) == (1, "1")
    is_wanted.set()
    assert list(results) == [(2, "2")]


def test_an_error_of_an_item_is_raised_behind_those_before_it() -> None:
    def items() -> Iterator[tuple[int, int]]:
        yield 1, 1
        raise ValueError("no second")

    results = prefetched(str, items(), max_bytes=100, threads=2, in_thread=True)
    found: list[int] = []

    with pytest.raises(ValueError, match="no second"):
        found.extend(number for number, _ in results)

    assert found == [1]


@pytest.mark.parametrize("in_thread", [False, True])
def test_bytes_that_are_begun_are_bounded(in_thread: bool) -> None:
    held: list[int] = []
    most: list[int] = []

    def fetch(number: int) -> int:
        held.append(number)
        most.append(len(held))
        return number

    items = ((number, 10) for number in range(50))
    results = prefetched(fetch, items, max_bytes=30, threads=4, in_thread=in_thread)
    for number, result in results:
        assert number == result
        time.sleep(0.002)
        held.remove(number)

    assert 1 < max(most) <= 3
