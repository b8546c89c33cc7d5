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


def fill(descriptor: int, offset: int, views: Sequence[memoryview]) -> tuple[int, int]:
    """Fill writable, contiguous views from an open file.

    Args:
        descriptor: of the file; its position is neither used nor moved.
        offset: of the first byte.
        views: to be filled, one after the other.

    Returns:
        Bytes asked for, and bytes read: fewer only at the end of the file.
    """
    wanted = sum([view.nbytes for view in views])
    try:
        got = os.preadv(descriptor, views, offset) if 0 < len(views) <= _MOST_VIEWS else 0
    except BufferError:  # of a view that is not contiguous, or cannot be written
        got = 0
    if got == wanted:  # as a rule: the rest is for files of other kinds, and ends of files
        return wanted, got
    rest = cut(flat(views), got)[1]
    while rest:
        more = os.preadv(descriptor, rest[:_MOST_VIEWS], offset + got)
        if not more:
            break
        got += more
        rest = cut(rest, more)[1]
    return wanted, got
