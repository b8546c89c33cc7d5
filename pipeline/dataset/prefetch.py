"""Load a few things ahead, in order and bounded in bytes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetched(
    load: Callable[[T], R],
    items: Iterable[tuple[T, int]],
    *,
    max_bytes: int,
    threads: int,
    max_items: int | None = None,
) -> Iterator[tuple[T, R]]:
    """Yield each item with what `load` made of it, in the order of the items.

    Items are begun ahead while what was begun, and is not yet done with, has at most `max_bytes`
    and is at most `max_items`; one at least is. An item is done with when the next is asked for.
    The first error, in the order of the items, is raised. Leaving the iteration early waits for
    what has been begun.

    Args:
        load: called by `threads` threads.
        items: each with how many bytes it takes.
        max_bytes: see above.
        threads: how many.
        max_items: see above; None for any number.
    """
    left = iter(items)
    ahead: deque[tuple[T, int, Future[R]]] = deque()
    held = 0
    upcoming = next(left, None)
    with ThreadPoolExecutor(threads, thread_name_prefix="carve-load") as pool:
        try:
            while ahead or upcoming is not None:
                while upcoming is not None:
                    is_full = held + upcoming[1] > max_bytes or len(ahead) == max_items
                    if ahead and is_full:
                        break
                    item, size = upcoming
                    ahead.append((item, size, pool.submit(load, item)))
                    held += size
                    upcoming = next(left, None)
                item, size, future = ahead.popleft()
                yield item, future.result()
                held -= size
        finally:
            for _, _, future in ahead:
                future.cancel()
