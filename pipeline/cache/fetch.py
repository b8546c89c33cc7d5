"""Fetch many small things at once, in order and a bounded number ahead."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREADS = 24  # a request to an object store waits for some 30 ms and uses no core meanwhile


def in_order(fetch: Callable[[T], R], items: Iterable[T], *, threads: int = THREADS) -> Iterator[R]:
    """Yield `fetch(item)` of each item, in the order of the items.

    At most two results a thread wait for the consumer. The first error, in the order of the items,
    is raised; what has not started by then never does.
    """
    left = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in itertools.islice(left, 2 * threads):
                waiting.append(pool.submit(fetch, item))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(fetch, item) for item in itertools.islice(left, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()
