"""Rows as a source loads them: checked bytes, the columns asked for, and what was damaged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache import row_batch
from pipeline.cache.fetched_rows import DamagedRow
from pipeline.cache.row_batch import RowBatch
from pipeline.dataset import columns


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedRows:
    """Rows that were asked for, in their order, without those that are damaged."""

    rows: RowBatch
    asked: NDArray[np.int64]  # (B,) which of the rows asked for each is, ascending
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    damaged: Sequence[DamagedRow] = ()
    damaged_asked: Sequence[int] = ()  # which of the rows asked for they are, ascending

    def slice(self, start: int, stop: int) -> "LoadedRows":
        """Return what was loaded of the rows asked for from `start` to before `stop`."""
        first, last = np.searchsorted(self.asked, [start, stop]).tolist()
        lost = [n for n, asked in enumerate(self.damaged_asked) if start <= asked < stop]
        return LoadedRows(
            rows=self.rows.slice(first, last),
            asked=self.asked[first:last] - start,
            columns={name: values[first:last] for name, values in self.columns.items()},
            damaged=[self.damaged[n] for n in lost],
            damaged_asked=[self.damaged_asked[n] - start for n in lost],
        )


def joined(pieces: Sequence[LoadedRows], lengths: Sequence[int]) -> LoadedRows:
    """Return rows of several requests as one.

    Args:
        pieces: what was loaded.
        lengths: how many rows each request asked for.
    """
    if len(pieces) == 1:
        return pieces[0]
    before = [0, *np.cumsum(lengths).tolist()]
    return LoadedRows(
        rows=row_batch.joined([p.rows for p in pieces]),
        asked=np.concatenate([p.asked + b for p, b in zip(pieces, before, strict=False)]),
        columns=columns.joined([p.columns for p in pieces]),
        damaged=[row for p in pieces for row in p.damaged],
        damaged_asked=[
            a + b for p, b in zip(pieces, before, strict=False) for a in p.damaged_asked
        ],
    )


def permuted(loaded: LoadedRows, order: NDArray[np.int64]) -> LoadedRows:
    """Return rows in another order: the i-th is the one that was asked for as order[i]."""
    place = np.argsort(order)  # where each of the old order goes
    new = place[loaded.asked]
    by_new = np.argsort(new)
    lost = sorted(
        (int(place[a]), d) for a, d in zip(loaded.damaged_asked, loaded.damaged, strict=True)
    )
    return LoadedRows(
        rows=loaded.rows.take(by_new),
        asked=new[by_new],
        columns={
            name: [values[n] for n in by_new.tolist()] for name, values in loaded.columns.items()
        },
        damaged=[row for _, row in lost],
        damaged_asked=[asked for asked, _ in lost],
    )
