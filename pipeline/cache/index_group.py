"""A row group of a sorted index in memory, as it is searched."""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.places import index_numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexGroup:
    """R rows sorted by key; some 200 bytes each."""

    keys: list[str]
    numbers: NDArray[np.int64]  # (R, C) as in `Places`, with the number of the file for the path

    @classmethod
    def parse(cls, rows: pa.Table) -> "IndexGroup":
        """Return rows of `layout.SEGMENT_SCHEMA`."""
        numbers = index_numbers(rows, first="file")
        return cls(keys=rows["key"].to_pylist(), numbers=numbers)

    def rows_of(self, key: str) -> Iterable[int]:
        """Return the numbers of the rows of a key; several shards may hold one."""
        start = stop = bisect.bisect_left(self.keys, key)
        while stop < len(self.keys) and self.keys[stop] == key:
            stop += 1
        return range(start, stop)
