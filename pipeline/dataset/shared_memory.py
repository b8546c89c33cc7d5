"""Memory that a DataLoader's worker reads into and its main process uses, again and again.

Sent the usual way, each batch takes new shared memory, whose pages cost several times what reading
into them does, in both processes. Here a worker keeps a few slots, as many as were in use at once.
A slot travels once, and may take the place of one that was too small; later only its name does. Its
worker uses it again when as many of its batches have died in the main process as were sent there:
each process counts what it alone knows, in its own word of the slot.
"""

import os
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.fork_lock import ForkLock

_PAGE = 4096
_HEADER = 64  # bytes before the content: what was given back, as int64, the rest unused

Bytes = NDArray[np.uint8]


class _Slot:
    """A piece of shared memory of one worker."""

    def __init__(self, owner: str, number: int, num_bytes: int) -> None:
        size = -(-(num_bytes + _HEADER) // _PAGE) * _PAGE
        storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
        self.owner = owner
        self.number = number
        self.memory = torch.empty(0, dtype=torch.uint8).set_(storage)
        self.returned = self.memory[:8].view(torch.int64)
        self.returned[0] = 0
        self.capacity = size - _HEADER
        self.sent = 0
        self.is_known = False  # to the main process
        self.is_used = False  # here

    @property
    def is_free(self) -> bool:
        return not self.is_used and self.sent == int(self.returned[0])

    def content(self, num_bytes: int) -> Bytes:
        """Return the first bytes; the slot is in use until they, and all their views, are gone."""
        self.is_used = True
        # Views of the array refer to it, since what it stands on is no array.
        array = np.frombuffer(self.memory.numpy().data, np.uint8, num_bytes, _HEADER)
        _IN_USE[id(array)] = self
        weakref.finalize(array, self._leave, id(array)).atexit = False
        return array

    def _leave(self, array: int) -> None:
        del _IN_USE[array]
        self.is_used = False


_IN_USE: dict[int, _Slot] = {}  # slots of this process by the array that uses each


class SharedSlots:
    """Gives a worker memory that its main process can see; one a worker."""

    def __init__(self) -> None:
        self.name = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._slots: dict[int, _Slot] = {}
        self._lock = threading.Lock()

    @property
    def is_own(self) -> bool:
        """Whether they were made in this process, not in one that it was forked from."""
        return int(self.name.partition("-")[0]) == os.getpid()

    def take(self, num_bytes: int) -> Bytes:
        """Return (num_bytes,) of no particular content."""
        with self._lock:
            free = sorted((s for s in self._slots.values() if s.is_free), key=lambda s: s.capacity)
            slot = next((s for s in free if num_bytes <= s.capacity), None)
            if slot is None:
                # In place of one that is too small, and then with room: sizes vary, it seems.
                number, room = (free[0].number, num_bytes // 8) if free else (len(self._slots), 0)
                slot = self._slots[number] = _Slot(self.name, number, num_bytes + room)
            return slot.content(num_bytes)


class SharedBytes:
    """Bytes that arrive in another process as an array, through shared memory where they can.

    Args:
        values: in a slot, or not.
    """

    def __init__(self, values: Bytes) -> None:
        self.values = values

    def __reduce__(self) -> tuple[Callable[..., Bytes], tuple[Any, ...]]:
        return _as_array, (bytearray(self.values.data),)

    def share(self) -> tuple[Callable[..., Bytes], tuple[Any, ...]]:
        """Return how a process that a queue leads to gets them."""
        array = self.values
        while isinstance(array.base, np.ndarray):
            array = array.base
        slot = _IN_USE.get(id(array))
        if slot is None:
            return _of_tensor, (torch.from_numpy(self.values),)
        memory = None if slot.is_known else slot.memory
        slot.is_known = True
        slot.sent += 1
        start = self.values.ctypes.data - slot.memory.data_ptr()
        return _received, (slot.owner, slot.number, memory, start, len(self.values))


ForkingPickler.register(SharedBytes, SharedBytes.share)

_KNOWN: dict[str, dict[int, Tensor]] = {}  # slots of workers that were sent here
_KNOWN_LOCK = ForkLock()
_RETURNED: deque[NDArray[np.int64]] = deque()
_RETURNED_LOCK = threading.Lock()


def forget_gone() -> None:
    """Give up the memory of workers that have ended, before others begin and need as much."""
    with _KNOWN_LOCK:
        for name in [name for name in _KNOWN if not _is_alive(name)]:
            del _KNOWN[name]  # what is still in use of it refers to its memory itself


def _as_array(content: bytearray) -> Bytes:
    return np.frombuffer(content, np.uint8)


def _of_tensor(values: Tensor) -> Bytes:
    return values.numpy()


def _received(owner: str, number: int, memory: Tensor | None, start: int, length: int) -> Bytes:
    """Return bytes that a worker sent; when nothing refers to them any more it may use them."""
    with _KNOWN_LOCK:
        slots = _KNOWN.setdefault(owner, {})
        if memory is not None:
            slots[number] = memory
        content = slots[number].numpy()
    array = np.frombuffer(content.data, np.uint8, count=length, offset=start)
    word = content[:8].view(np.int64)
    weakref.finalize(array, _give_back, word, os.getpid()).atexit = False
    return array


def _give_back(word: NDArray[np.int64], process: int) -> None:
    """Count a batch that has died, which may happen anywhere, within this function too.

    Not in a process that was forked from the one it arrived in, where it may be in use still.
    """
    if process != os.getpid():
        return
    _RETURNED.append(word)
    while _RETURNED and _RETURNED_LOCK.acquire(blocking=False):
        try:
            while _RETURNED:
                _RETURNED.popleft()[0] += 1
        finally:
            _RETURNED_LOCK.release()


def _is_alive(name: str) -> bool:
    try:
        os.kill(int(name.partition("-")[0]), 0)
    except ProcessLookupError:
        return False
    return True
