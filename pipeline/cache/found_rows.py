"""Rows that segments have found for some keys, and which of them count."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.places import NUMBERS, Places, as_keys
from pipeline.cache.segment_reader import IndexedFile, SegmentReader

Found = tuple[SegmentReader, NDArray[np.int64], NDArray[np.int64]]


class FoundRows:
    """Puts together what `SegmentReader.find` gave; of equal keys the earliest shard's row counts.

    Args:
        found: of each segment, what it found.
    """

    def __init__(self, found: Sequence[Found]) -> None:
        self._files: list[IndexedFile] = []
        asked, rows = [np.empty(0, np.int64)], [np.empty((0, len(NUMBERS) + 1), np.int64)]
        for segment, numbers_asked, numbers in found:
            rows.append(self._with_files(segment, numbers))
            asked.append(numbers_asked)
        self._asked = np.concatenate(asked)
        self._rows = np.concatenate(rows)

    def missing(self, count: int) -> list[int]:
        """Return which of so many keys have no row."""
        has_row = np.zeros(count, np.bool_)
        has_row[self._asked] = True
        return np.flatnonzero(~has_row).tolist()

    def places(self, keys: Sequence[str]) -> tuple[Places, NDArray[np.int64]]:
        """Return the place of each key's row, and the size of its part.

        Args:
            keys: each of them has a row.
        """
        order = self._order(len(keys))
        numbers = self._rows[order]
        sizes = np.array([file.size for file in self._files], np.int64)
        places = Places(
            numbers=numbers,
            keys=as_keys(keys),
            paths=[file.path for file in self._files],
        )
        return places, sizes[numbers[:, 0]]

    def _order(self, count: int) -> NDArray[np.int64]:
        """Return the row that counts of each key."""
        if len(self._asked) == count:
            return np.argsort(self._asked, kind="stable")
        best: dict[int, int] = {}
        for number, asked in enumerate(self._asked.tolist()):
            kept = best.setdefault(asked, number)
            if self._name(number) < self._name(kept):
                best[asked] = number
        return np.array([best[asked] for asked in range(count)], np.int64)

    def _name(self, row: int) -> tuple[str, str]:
        file = self._files[int(self._rows[row, 0])]
        return file.shard, file.path

    def _with_files(self, segment: SegmentReader, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return rows with places in `_files` for the numbers that a segment gives its files."""
        named, places = np.unique(numbers[:, 0], return_inverse=True)
        renamed = numbers.copy()
        renamed[:, 0] = places + len(self._files)
        self._files += [segment.file_of(number) for number in named.tolist()]
        return renamed
