"""Fetch things ahead, many at once, in order: a bounded number of them, or of bytes."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREADS = 24  # a request to an object store waits for some 30 ms and uses no core meanwhile


def in_order(fetch: Callable[[T], R], items: Iterable[T], *, threads: int = THREADS) -> Iterator[R]:
    """Yield `fetch(item)` of each item, in the order of the items.

    At most two results a thread wait for the consumer. The first error, in the order of the items,
    is raised; what has not started by then never does.
    """
    sized = ((item, 0) for item in items)
    ahead = prefetched(fetch, sized, max_bytes=0, threads=threads, max_items=2 * threads)
    with closing(ahead):
        for _, result in ahead:
            yield result


def prefetched(
    fetch: Callable[[T], R],
    items: Iterable[tuple[T, int]],
    *,
    max_bytes: int,
    threads: int,
    max_items: int | None = None,
) -> Generator[tuple[T, R]]:
    """Yield each item with what `fetch` made of it, in the order of the items.

    Items are begun ahead while what was begun, and is not yet done with, has at most `max_bytes`
    and is at most `max_items`; one at least is. An item is done with when the next is asked for.
    The first error, in the order of the items, is raised. Leaving the iteration early waits for
    what has been begun.

    Args:
        fetch: called by `threads` threads.
        items: each with how many bytes it takes.
        max_bytes: see above.
        threads: how many.
        max_items: see above; None for any number.
    """
    left = iter(items)
    ahead: deque[tuple[T, int, Future[R]]] = deque()
    held = 0
    upcoming = next(left, None)
    with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
        try:
            while ahead or upcoming is not None:
                while upcoming is not None:
                    is_full = held + upcoming[1] > max_bytes or len(ahead) == max_items
                    if ahead and is_full:
                        break
                    item, size = upcoming
                    ahead.append((item, size, pool.submit(fetch, item)))
                    held += size
                    upcoming = next(left, None)
                item, size, future = ahead.popleft()
                yield item, future.result()
                held -= size
        finally:
            for _, _, future in ahead:
                future.cancel()
