"""A queue between two threads of one pipeline, bounded in bytes."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class QueueStoppedError(Exception):
    """The other end has given up; raised to end a thread, never to report a fault."""


class ByteQueue(Generic[T]):
    """First in, first out; `put` waits while more than `max_bytes` would lie in it.

    One item larger than the bound is let into an empty queue, so nothing can get stuck.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._stopped = False
        self._changed = threading.Condition()

    @property
    def num_bytes(self) -> int:
        """What lies in it now."""
        return self._bytes

    def put(self, item: T, num_bytes: int) -> None:
        """Add an item.

        Raises:
            QueueStoppedError: the consumer has stopped.
        """
        with self._changed:
            while not self._stopped and self._bytes and self._bytes + num_bytes > self.max_bytes:
                self._changed.wait()
            if self._stopped:
                raise QueueStoppedError
            self._items.append((item, num_bytes))
            self._bytes += num_bytes
            self._changed.notify_all()

    def close(self) -> None:
        """Say that nothing more will be put; what lies in the queue can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Drop what lies in the queue and end both sides."""
        with self._changed:
            self._stopped = self._closed = True
            self._items.clear()
            self._bytes = 0
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Yield items until the queue is closed and empty, or stopped."""
        while True:
            with self._changed:
                while not self._items and not self._closed:
                    self._changed.wait()
                if not self._items:
                    return
                item, num_bytes = self._items.popleft()
                self._bytes -= num_bytes
                self._changed.notify_all()
            yield item
