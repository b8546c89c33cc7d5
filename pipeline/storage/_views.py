"""Writable buffers that take one range of a file, one after the other."""

import os
from collections.abc import Sequence

_MOST_VIEWS = 1024  # IOV_MAX of Linux: what one call takes


def flat(views: Sequence[memoryview]) -> list[memoryview]:
    """Return views as plain bytes, those of no length left out.

    Raises:
        TypeError: one is not contiguous or cannot be written.
    """
    if any(view.readonly for view in views):
        raise TypeError("cannot read into a view that is read-only")
    return [view.cast("B") for view in views if view.nbytes]


def num_bytes(views: Sequence[memoryview]) -> int:
    """Return how many bytes flat views take together."""
    return sum(map(len, views))


def cut(
    views: Sequence[memoryview], length: int
) -> tuple[Sequence[memoryview], Sequence[memoryview]]:
    """Return the flat views of the first `length` bytes, and those of the rest."""
    for number, view in enumerate(views):
        if length < len(view):
            whole = views[:number]
            head = [*whole, view[:length]] if length else whole
            return head, [view[length:], *views[number + 1 :]]
        length -= len(view)
    return views, []


def scatter(content: memoryview, views: Sequence[memoryview]) -> None:
    """Fill flat views from bytes, of which there are as many."""
    start = 0
    for view in views:
        view[:] = content[start : start + len(view)]
        start += len(view)


def fill(descriptor: int, offset: int, views: Sequence[memoryview]) -> int:
    """Fill flat views from an open file.

    Args:
        descriptor: of the file; its position is neither used nor moved.
        offset: of the first byte.
        views: to be filled, one after the other.

    Returns:
        Bytes read; fewer than asked for only at the end of the file.
    """
    total = 0
    while views:
        got = os.preadv(descriptor, views[:_MOST_VIEWS], offset + total)
        if not got:
            break
        total += got
        views = cut(views, got)[1]
    return total
