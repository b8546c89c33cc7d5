"""Many small things are fetched at once, in order, and not far ahead."""

import threading
import time

import pytest

from pipeline.cache.fetch import THREADS, in_order


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
