"""Places of the rows of each part, the parts used last kept in memory."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.cache import layout, parquet
from pipeline.cache.fetch import in_order
from pipeline.cache.places import Places
from pipeline.cache.row_groups import RowGroups
from pipeline.errors import CacheFormatError, NotFoundError
from pipeline.fork_lock import ForkLock

_MAX_ROWS = 1 << 19  # kept; about 200 bytes each with its key
_ORDER = [("part", "ascending"), ("row_group", "ascending"), ("row", "ascending")]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRows:
    """The rows of one part in the order they are stored, without those that an equal key hides."""

    places: Places
    starts: NDArray[np.int64]  # of each row group among them, and their number at the end

    def group(self, row_group: int) -> Places:
        """Return the rows of one row group; none where it is beyond the last."""
        if row_group >= len(self.starts) - 1:
            return self.places.slice(0, 0)
        return self.places.slice(int(self.starts[row_group]), int(self.starts[row_group + 1]))


class PartPlaces:
    """Gives the rows of parts by the index of their attempt. Safe to use from many threads.

    At most 2^19 rows, or those of one attempt where it has more, stay in memory.

    Args:
        groups: reads the indexes.
        hidden: returns numbers of rows that are left out, by part and row group.
        size_of: returns the size of a part, in bytes.
    """

    def __init__(
        self,
        groups: RowGroups,
        hidden: Callable[[], Mapping[tuple[str, int], set[int]]],
        size_of: Callable[[str], int],
    ) -> None:
        self._groups = groups
        self._hidden = hidden
        self._size_of = size_of
        self._kept: OrderedDict[str, Mapping[str, PartRows]] = OrderedDict()
        self._num_kept: dict[str, int] = {}
        self._lock = ForkLock()

    def part(self, path: str) -> PartRows:
        """Return the rows of one part.

        Raises:
            CacheFormatError: the index is damaged.
            NotFoundError: there is no index beside it.
            StorageError: the store cannot be read.
        """
        shard_id, attempt, number = self._parsed(path)
        index = layout.index_path(shard_id, attempt)
        with self._lock:
            kept = self._kept.get(index)
            if kept is not None:
                self._kept.move_to_end(index)
        if kept is None or path not in kept:
            kept = self._load(shard_id, attempt, number)
            self._keep(index, kept)
        return kept[path]

    def read_ahead(self, paths: Iterable[str]) -> None:
        """Read the rows of parts that are not in memory, at once where the store is remote.

        Raises:
            CacheFormatError, NotFoundError, StorageError: as `part` does.
        """
        if self._groups.store.local_path("") is not None:
            return
        one_of = {layout.index_path(*self._parsed(path)[:2]): path for path in paths}
        with self._lock:
            missing = [path for index, path in one_of.items() if index not in self._kept]
        if len(missing) > 1:
            for _ in in_order(self.part, missing):
                pass

    def index_rows(self, path: str) -> pa.Table:
        """Return what the index of its attempt says of one part, as stored; not kept."""
        shard_id, attempt, number = self._parsed(path)
        rows = self._index_rows(layout.index_path(shard_id, attempt))
        return rows.filter(pc.equal(rows["part"], number)).sort_by(_ORDER)

    def visible_index(self, path: str) -> pa.Table:
        """Return `index_rows` without those that an equal key hides."""
        rows = self.index_rows(path)
        return rows.filter(pa.array(self._is_visible(rows, path)))

    def _is_visible(self, rows: pa.Table, path: str) -> NDArray[np.bool_]:
        """Tell of a part's index rows which of them no equal key hides."""
        known = self._hidden()
        groups = rows["row_group"].unique().to_pylist()
        hidden = {g: known[path, g] for g in groups if known.get((path, g))}
        if not hidden:
            return np.ones(len(rows), np.bool_)
        pairs = zip(rows["row_group"].to_pylist(), rows["row"].to_pylist(), strict=True)
        return np.array([r not in hidden.get(g, ()) for g, r in pairs], np.bool_)

    def _parsed(self, path: str) -> tuple[str, str, int]:
        parsed = layout.parse_part_path(path)
        if parsed is None:
            raise CacheFormatError(f"{self._groups.store.url}/{path} is not the path of a part")
        return parsed

    def _load(self, shard_id: str, attempt: str, wanted: int) -> Mapping[str, PartRows]:
        """Return the rows of all parts of an attempt that count."""
        rows = self._index_rows(layout.index_path(shard_id, attempt))
        found = {}
        for number in {*rows["part"].unique().to_pylist(), wanted}:
            path = layout.part_path(shard_id, attempt, number)
            try:
                size = self._size_of(path)
            except NotFoundError:
                if number == wanted:
                    raise
                continue
            mine = rows.filter(pc.equal(rows["part"], number))
            found[path] = self._part_rows(mine, path, size)
        return found

    def _index_rows(self, path: str) -> pa.Table:
        store = self._groups.store
        return parquet.read_table(store.read(path), layout.INDEX_SCHEMA, where=store.url_of(path))

    def _part_rows(self, rows: pa.Table, path: str, size: int) -> PartRows:
        rows = rows.sort_by(_ORDER)
        url = self._groups.store.url
        places = Places.of_index(rows, path, size, url)
        row_group = places.column("row_group")
        count = int(row_group[-1]) + 1 if len(places) else 0
        if count > len(places):  # every row group has a row
            raise CacheFormatError(
                f"{url}/{path}: its index names row group {count - 1}; it is damaged"
            )
        seen = self._is_visible(rows, path)
        if not seen.all():
            places, row_group = places.take(np.flatnonzero(seen)), row_group[seen]
        return PartRows(places=places, starts=np.searchsorted(row_group, np.arange(count + 1)))

    def _keep(self, index: str, parts: Mapping[str, PartRows]) -> None:
        with self._lock:
            self._kept[index] = parts
            self._kept.move_to_end(index)
            self._num_kept[index] = sum(len(part.places) for part in parts.values())
            while sum(self._num_kept.values()) > _MAX_ROWS and len(self._kept) > 1:
                oldest, _ = self._kept.popitem(last=False)
                del self._num_kept[oldest]
