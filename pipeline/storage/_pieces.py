"""What is wanted of an object, cut into what is wanted of each of its blocks."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.storage._views import cut, num_bytes

_THREADS = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """What is wanted of one block."""

    number: int  # of the block
    at: int  # within it
    length: int
    views: Sequence[memoryview]  # to be filled, as many bytes

    @property
    def end(self) -> int:
        return self.at + self.length


def pieces_of(offset: int, views: Sequence[memoryview], block_bytes: int) -> Iterator[Piece]:
    """Yield the pieces of a range, in order.

    Args:
        offset: where it begins.
        views: flat, to be filled one after the other; as long as the range.
        block_bytes: of each block.
    """
    length = num_bytes(views)
    while length:
        number, at = divmod(offset, block_bytes)
        here = min(length, block_bytes - at)
        head, views = cut(views, here)
        yield Piece(number, at, here, head)
        offset, length = offset + here, length - here


def adjacent(pieces: Sequence[Piece], most: int) -> list[list[Piece]]:
    """Return the runs of pieces of adjacent blocks, at most so many in one."""
    groups: list[list[Piece]] = []
    for piece in pieces:
        follows = bool(groups) and groups[-1][-1].number + 1 == piece.number
        if follows and len(groups[-1]) < most:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def in_threads(act: Callable[[Sequence[Piece]], None], groups: Sequence[Sequence[Piece]]) -> None:
    """Do something to each group, to all of them even if one fails; raise the first error."""
    if len(groups) < 2:
        for group in groups:
            act(group)
        return
    with ThreadPoolExecutor(min(_THREADS, len(groups)), thread_name_prefix="disk-cache") as pool:
        futures = [pool.submit(act, group) for group in groups]
    for future in futures:
        future.result()
