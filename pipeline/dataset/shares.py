"""Which rows of an epoch each rank and each of its workers reads, batch by batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ends = Literal["exact", "pad", "drop"]
"""What becomes of the rows behind the last step that all ranks can take in full.

`exact`: they are shared out evenly, each once; the last batches are shorter, differ by one row, and
where there are fewer rows than ranks some ranks take one step less. `pad`: likewise, but all ranks
get equally many, with rows from the start of the epoch's order for those that are missing. `drop`:
they are left out.
"""

_SCANNED = 1024  # rows of which the number of tokens is looked up at once
_ROWS_AT_ONCE = 64  # that are read together where they are given one by one


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """One of those who share an epoch."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    num_workers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one reader reads at once."""

    positions: NDArray[np.int64]  # in the epoch's order
    ends: NDArray[np.int64]  # where the epoch stands after each step: rows that all have taken
    steps: int  # of the reader: 1 for a batch, as many as rows where they are given one by one


def in_batches(
    length: int, start: int, reader: Reader, *, size: int, ends: Ends
) -> Iterator[Share]:
    """Yield a reader's batches of a fixed number of rows.

    Step s of all ranks takes the next `world_size * size` rows; rank r the r-th `size` of them.
    The workers of a rank take its steps in turn.

    Args:
        length: rows of the epoch.
        start: rows that were taken before.
        reader: whose batches.
        size: rows a batch.
        ends: the rule at the end.
    """
    step_rows = size * reader.world_size
    full, left = divmod(length - start, step_rows)
    for step in range(reader.worker, full, reader.num_workers):
        first = start + step * step_rows
        mine = np.arange(size, dtype=np.int64) + first + reader.rank * size
        yield _batch(mine, first + step_rows)
    if left and ends != "drop" and full % reader.num_workers == reader.worker:
        mine = _last_positions(length, left, reader, ends)
        if len(mine):
            yield _batch(mine, length)


def one_by_one(length: int, start: int, reader: Reader, *, ends: Ends) -> Iterator[Share]:
    """Yield a reader's rows where they are given one by one: as batches of one row would be.

    So row p of what is left goes to rank p mod `world_size`, and there to each worker in turn.
    """
    ranks, workers = reader.world_size, reader.num_workers
    full, left = divmod(length - start, ranks)
    for first in range(reader.worker, full, workers * _ROWS_AT_ONCE):
        steps = np.arange(first, min(full, first + workers * _ROWS_AT_ONCE), workers)
        yield Share(
            positions=start + steps * ranks + reader.rank,
            ends=start + (steps + 1) * ranks,
            steps=len(steps),
        )
    if left and ends != "drop" and full % workers == reader.worker:
        mine = _last_positions(length, left, reader, ends)
        if len(mine):
            yield Share(positions=mine, ends=np.array([length]), steps=1)


def in_budgets(
    length: int,
    start: int,
    reader: Reader,
    *,
    budget: int,
    ends: Ends,
    num_tokens: Callable[[NDArray[np.int64]], NDArray[np.int64]],
) -> Iterator[Share]:
    """Yield a reader's batches of as many rows, in order, as have at most `budget` tokens.

    Batch b of what is left goes to rank b mod `world_size`, and there to each worker in turn.

    Args:
        length: rows of the epoch.
        start: rows that were taken before.
        reader: whose batches.
        budget: tokens a batch.
        ends: the rule at the end, for batches instead of rows.
        num_tokens: returns the number of tokens of the rows at some positions.

    Raises:
        ValueError: a row has more tokens than the budget.
    """
    step, batches = 0, []
    for batch in _budgeted(length, start, budget, num_tokens):
        batches.append(batch)
        if len(batches) == reader.world_size:
            if step % reader.num_workers == reader.worker:
                yield _batch(np.arange(*batches[reader.rank]), batches[-1][1])
            step, batches = step + 1, []
    if not batches or ends == "drop" or step % reader.num_workers != reader.worker:
        return
    if ends == "pad":
        again = _budgeted(length, 0, budget, num_tokens)
        while len(batches) < reader.world_size:
            batches.append(next(again, batches[0]))
    if reader.rank < len(batches):
        yield _batch(np.arange(*batches[reader.rank]), length)


def num_batches(length: int, start: int, reader: Reader, *, size: int, ends: Ends) -> int:
    """Return how many batches all workers of a rank yield."""
    full, left = divmod(length - start, size * reader.world_size)
    if not left or ends == "drop":
        return full
    return full + (ends == "pad" or reader.rank < left)


def num_rows(length: int, start: int, reader: Reader, *, size: int, ends: Ends) -> int:
    """Return how many rows all workers of a rank yield."""
    full, left = divmod(length - start, size * reader.world_size)
    last = len(_last_positions(length, left, reader, ends)) if left and ends != "drop" else 0
    return full * size + last


def _batch(positions: NDArray[np.int64], end: int) -> Share:
    return Share(positions=positions, ends=np.array([end]), steps=1)


def _last_positions(length: int, left: int, reader: Reader, ends: Ends) -> NDArray[np.int64]:
    """Return a rank's rows of the last step, `left` for all ranks."""
    first = length - left
    if ends == "pad":
        each = -(-left // reader.world_size)
        positions = np.arange(each, dtype=np.int64) + first + reader.rank * each
        return np.where(positions < length, positions, (positions - length) % length)
    each, more = divmod(left, reader.world_size)
    start = first + reader.rank * each + min(reader.rank, more)
    return np.arange(start, start + each + (reader.rank < more), dtype=np.int64)


def _budgeted(
    length: int,
    start: int,
    budget: int,
    num_tokens: Callable[[NDArray[np.int64]], NDArray[np.int64]],
) -> Iterator[tuple[int, int]]:
    """Yield (first position, position behind the last) of each batch."""
    first, filled = start, 0
    for chunk in range(start, length, _SCANNED):
        positions = np.arange(chunk, min(chunk + _SCANNED, length))
        for position, tokens in zip(
            positions.tolist(), num_tokens(positions).tolist(), strict=True
        ):
            if tokens > budget:
                raise ValueError(
                    f"batch_tokens={budget}: a row has {tokens} tokens; give more, or keep_tokens"
                )
            if filled + tokens > budget:
                yield first, position
                first, filled = position, 0
            filled += tokens
    if first < length:
        yield first, length
