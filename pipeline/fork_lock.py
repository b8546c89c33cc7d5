"""A lock that no process inherits taken.

A DataLoader's workers are forked while other threads read ahead. A lock that one of those holds at
that moment would be taken in the worker for ever, and what it guards might be half changed.
"""

import os
import threading
from weakref import WeakValueDictionary


class ForkLock:
    """A lock as a context manager; a fork waits until it is free, and leaves it free.

    What is done under it must be short, take no other lock and not fork. Its thread may take it
    again: what is collected as garbage while a fork holds all locks may need one.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        _LOCKS[id(self)] = self

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


_LOCKS: WeakValueDictionary[int, ForkLock] = WeakValueDictionary()
_FORKING = threading.Lock()  # two threads that fork at once would wait for each other
_TAKEN: list[ForkLock] = []


def _take_all() -> None:
    _FORKING.acquire()
    for reference in _LOCKS.valuerefs():
        if (owner := reference()) is not None:
            owner.lock.acquire()
            _TAKEN.append(owner)


def _release_all() -> None:
    while _TAKEN:
        _TAKEN.pop().lock.release()
    _FORKING.release()


os.register_at_fork(before=_take_all, after_in_parent=_release_all, after_in_child=_release_all)
