"""A mapping that forgets what was not used for long."""

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class RecentlyUsed(Generic[K, V]):
    """Holds the entries used last. Safe to use from many threads.

    What it holds belongs to one process: after a fork, and after pickling, it is empty.

    Args:
        most: entries to hold, at least 1.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._state = _State[K, V]()

    def __reduce__(self) -> tuple[type["RecentlyUsed[K, V]"], tuple[int]]:
        return RecentlyUsed, (self._most,)

    def get(self, key: K) -> V | None:
        """Return what is held, and count it as used."""
        state = self._own()
        with state.lock:
            found = state.held.get(key)
            if found is not None:
                state.held.move_to_end(key)
            return found

    def put(self, key: K, value: V) -> None:
        """Hold a value, and forget the one not used for longest if that is one too many."""
        state, forgotten = self._own(), None
        with state.lock:
            state.held[key] = value
            state.held.move_to_end(key)
            if len(state.held) > self._most:
                forgotten = state.held.popitem(last=False)
        del forgotten  # which may close a file: not under the lock

    def forget(self, key: K) -> None:
        """Hold it no more, if it is held."""
        state = self._own()
        with state.lock:
            forgotten = state.held.pop(key, None)
        del forgotten

    def _own(self) -> "_State[K, V]":
        # The lock of a parent may have been taken, for ever, at the moment of the fork.
        if self._state.pid != os.getpid():
            self._state = _State[K, V]()
        return self._state


class _State(Generic[K, V]):
    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.held: OrderedDict[K, V] = OrderedDict()
