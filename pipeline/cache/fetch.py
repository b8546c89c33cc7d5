"""Fetch things ahead, many at once, in order: a bounded number of them, or of bytes."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from typing import Any, Generic, TypeVar

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
    in_thread: bool = False,
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
        in_thread: a thread works the items out, one ahead, because that takes long too; so what
            has been fetched is never kept waiting for an item behind it.
    """
    ahead: deque[tuple[T, int, Future[R]]] = deque()
    held = 0
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="fetch"))
        planner = ThreadPoolExecutor(1, thread_name_prefix="plan") if in_thread else None
        upcoming = _Upcoming(items, stack.enter_context(planner) if planner else None)
        try:
            while True:
                while upcoming.is_there(before=ahead[0][2] if ahead else None):
                    found = upcoming.get()
                    if found is None:
                        break
                    is_full = held + found[1] > max_bytes or len(ahead) == max_items
                    if ahead and is_full:
                        break
                    ahead.append((*found, pool.submit(fetch, found[0])))
                    held += found[1]
                    upcoming.advance()
                if not ahead:
                    return
                item, size, future = ahead.popleft()
                yield item, future.result()
                held -= size
        finally:
            for _, _, future in ahead:
                future.cancel()


class _Upcoming(Generic[T]):
    """The next of some items, worked out by a thread where one is given."""

    def __init__(self, items: Iterable[tuple[T, int]], planner: Executor | None) -> None:
        self._left = iter(items)
        self._planner = planner
        self.advance()

    def advance(self) -> None:
        """Go on to the item behind it."""
        self._future: Future[tuple[T, int] | None] | None = None
        if self._planner is None:
            self._item = next(self._left, None)
        else:
            self._future = self._planner.submit(next, self._left, None)

    def is_there(self, *, before: Future[R] | None) -> bool:
        """Wait until it is, or until something else is done first."""
        if self._future is None or before is None:
            return True
        both: set[Future[Any]] = {self._future, before}
        wait(both, return_when=FIRST_COMPLETED)
        return self._future.done() and self._future.exception() is None  # an error in its turn

    def get(self) -> tuple[T, int] | None:
        """Return it, or None behind the last; raise the error that working it out did."""
        return self._item if self._future is None else self._future.result()
