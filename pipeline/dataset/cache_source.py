"""The rows of one cache in the order of an epoch."""

import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache import layout
from pipeline.cache.fetched_rows import DamagedRow
from pipeline.cache.places import Places
from pipeline.cache.row_batch import RowBatch
from pipeline.cache.row_fetch import Allocate, wanted_bytes
from pipeline.carved_cache import CarvedCache
from pipeline.codecs import Codec
from pipeline.dataset.columns import Columns
from pipeline.dataset.joined_columns import JoinedColumns
from pipeline.dataset.loaded_rows import LoadedRows
from pipeline.dataset.order import EpochOrder
from pipeline.dataset.selection import Filters, Selection, canonical, select_rows
from pipeline.errors import CacheFormatError

logger = logging.getLogger(__name__)
Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shuffle:
    """How an epoch is shuffled; see `EpochOrder`."""

    seed: int
    window: int
    lanes: int
    lane_rows: int
    shuffle: bool


@dataclass(kw_only=True, eq=False)
class CacheSource:
    """Gives rows of a cache by their position in an epoch. Safe to use from many threads.

    Attributes:
        cache: opened, with the number of tokens that are wanted.
        shuffle: the order.
        columns: of the cache, that are wanted with the rows.
        join: further columns; None for none.
        filters: that rows must pass; None for all rows.
        skip_damaged: leave damaged rows out, instead of raising an error.
    """

    cache: CarvedCache
    shuffle: Shuffle
    columns: Sequence[str] = ()
    join: JoinedColumns | None = None
    filters: Filters | None = None
    skip_damaged: bool = False
    _selection: Selection | None = field(default=None, init=False, repr=False)
    _orders: tuple[EpochOrder, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.filters is not None:
            self._selection = select_rows(self.cache.reader, self.filters)
        self._columns = Columns(self.cache.reader, self.columns)
        if not self.skip_damaged:
            self._columns.check()
        if self.join is not None and (both := {*self.columns} & {*self.join.names}):
            raise ValueError(f"columns {sorted(both)} are in the cache and in the joined table")

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without what can be computed again."""
        return {**self.__dict__, "_orders": ()}

    @property
    def codec(self) -> Codec:
        """Of the cache."""
        return self.cache.codec

    @property
    def is_local(self) -> bool:
        """Whether the cache lies in the machine's own file system."""
        return self.cache.reader.store.local_path("") is not None

    def identity(self) -> dict[str, Any]:
        """Return what tells this order of rows from any other, as JSON."""
        snapshot = self.cache.reader.snapshot
        shuffle = self.shuffle
        return {
            "snapshot": snapshot.number,
            "rows": snapshot.num_rows,
            "fingerprint": self.cache.identity.get("fingerprint"),
            "seed": shuffle.seed,
            "shuffle": [shuffle.shuffle, shuffle.window, shuffle.lanes, shuffle.lane_rows],
            "filters": None
            if self.filters is None
            else layout.fingerprint(canonical(self.filters)),
        }

    def length(self, epoch: int) -> int:
        """Return how many rows an epoch has."""
        return self._num_rows

    def places(self, epoch: int, positions: Numbers) -> Places:
        """Return where the rows at some positions lie."""
        numbers, rows = self._order_of(epoch).rows(positions)
        reader = self.cache.reader
        files, groups, _ = reader.row_groups()
        if self._selection is not None:
            rows = self._selection.visible(numbers, rows)
        pieces: list[Places] = []
        of_file = files[numbers]
        order = np.argsort(of_file, kind="stable")
        cuts = np.flatnonzero(np.diff(of_file[order])) + 1
        by_file = np.split(order, cuts) if len(order) else []
        paths = [reader.files[of_file[mine[0]]] for mine in by_file]
        reader.read_part_rows(paths)
        for path, mine in zip(paths, by_file, strict=True):
            part = reader.part_rows(path)
            pieces.append(part.places.take(part.starts[groups[numbers[mine]]] + rows[mine]))
        found = Places.joined(pieces)
        is_sorted = bool((np.diff(order) == 1).all())
        return found if is_sorted else found.take(np.argsort(order, kind="stable"))

    def num_tokens(self, places: Places) -> Numbers:
        """Return how many tokens each row gives."""
        counts, keep = places.column("num_tokens"), self.cache.keep_tokens
        return counts if keep is None else np.minimum(counts, keep)

    def sizes(self, places: Places) -> Numbers:
        """Return how many bytes are fetched of each row."""
        return wanted_bytes(places, self.cache.keep_tokens) + places.column("aux_length")

    def boundaries(self, epoch: int, positions: Numbers) -> Numbers:
        """Return a number for each position that is the same for rows that lie together."""
        return self._order_of(epoch).boundaries(positions)

    def load(self, places: Places, allocate: Allocate | None, pool: Executor | None) -> LoadedRows:
        """Load rows.

        Args:
            places: of the rows, as `places` gave them.
            allocate: returns memory to read into; None for that of each cache's reader.
            pool: reads in parallel what lies apart; None for one after the other.

        Raises:
            CacheFormatError: a row is damaged, and damaged rows are not left out.
            StorageError: the store cannot be read.
        """
        damaged: list[DamagedRow] | None = [] if self.skip_damaged else None
        rows = self.cache.reader.read_batch(
            places, self.cache.keep_tokens, allocate=allocate, pool=pool, damaged=damaged
        )
        rows, columns = self._with_columns(rows, damaged)
        asked = np.arange(len(places))
        lost: dict[int, DamagedRow] = {}
        if damaged:
            found = {row.key: row for row in damaged}
            keys = places.keys.tolist()
            lost = {n: found[key] for n, key in enumerate(keys) if key in found}
            asked = np.setdiff1d(asked, [*lost])
            for row in lost.values():
                logger.warning("left out: %s", row.message)
        if self.join is not None:
            columns.update(self.join.of(rows.places.keys.tolist()))
        return LoadedRows(
            rows=rows,
            asked=asked,
            columns=columns,
            damaged=[*lost.values()],
            damaged_asked=[*lost],
        )

    def _with_columns(
        self, rows: RowBatch, damaged: list[DamagedRow] | None
    ) -> tuple[RowBatch, dict[str, Sequence[Any]]]:
        """Return rows with their columns; of a damaged part, those that have any."""
        try:
            return rows, dict(self._columns.of(rows.places))
        except CacheFormatError:
            if damaged is None:
                raise
        kept = []
        for number in range(len(rows)):
            try:
                self._columns.of(rows.places.slice(number, number + 1))
            except CacheFormatError as err:
                damaged.append(DamagedRow.of(rows.places.place(number), str(err)))
            else:
                kept.append(number)
        rows = rows.take(np.array(kept, np.int64))
        return rows, dict(self._columns.of(rows.places))

    def _order_of(self, epoch: int) -> EpochOrder:
        """Return an epoch's order; the last two are kept: a mixture goes from one to the next."""
        orders = self._orders
        for order in orders:
            if order.epoch == epoch:
                return order
        order = EpochOrder(
            sizes=self._group_sizes(),
            seed=self.shuffle.seed,
            epoch=epoch,
            shuffle=self.shuffle.shuffle,
            window=self.shuffle.window,
            lanes=self.shuffle.lanes if self.shuffle.shuffle else 1,
            lane_rows=self.shuffle.lane_rows,
        )
        self._orders = (order, *orders[:1])
        return order

    @cached_property
    def _num_rows(self) -> int:
        return int(self._group_sizes().sum())

    def _group_sizes(self) -> Numbers:
        """Return how many rows of each row group are given."""
        selection = self._selection
        return self.cache.reader.row_groups()[2] if selection is None else selection.sizes
