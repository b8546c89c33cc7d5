"""Rows of several caches in one order, each cache by its share."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.places import Places
from pipeline.cache.row_fetch import Allocate
from pipeline.codecs import Codec
from pipeline.dataset import loaded_rows
from pipeline.dataset.cache_source import CacheSource
from pipeline.dataset.loaded_rows import LoadedRows

Numbers = NDArray[np.int64]

_LONGEST_CYCLE = 1024
_CLOSE = 1e-3  # of a weight: so near its share has to be
_ROWS_TOGETHER = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedPlaces:
    """Where rows of several caches lie."""

    pieces: Sequence[tuple[int, Numbers, Places]]  # source, which of the rows, where they lie

    def __len__(self) -> int:
        return sum(len(numbers) for _, numbers, _ in self.pieces)


class MixedSource:
    """Gives rows of several caches by their position in an epoch of all of them.

    Positions come in cycles of a fixed length, in which each cache has a fixed number of places, in
    an order that depends on seed, epoch and cycle alone. What a cache gives follows its own order,
    epoch after epoch, and goes on where the mixture's epoch before ended: so its rows are all given
    equally often.

    Args:
        sources: of the caches; their codecs and widths are equal.
        weights: of each, above 0.
        rows: at least so many an epoch; rounded up to whole cycles.
        seed: of the order.

    Raises:
        ValueError: the caches do not fit together, or weights and rows cannot be.
    """

    def __init__(
        self, sources: Sequence[CacheSource], weights: Sequence[float], *, rows: int, seed: int
    ) -> None:
        _check(sources)
        self.sources = list(sources)
        self.seed = seed
        self.shares = shares_of(weights)
        self._cycle = int(self.shares.sum())
        self._cycles = -(-rows // self._cycle)
        self._order = lru_cache(maxsize=8)(self._cycle_order)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=8)(self._cycle_order)

    @property
    def codec(self) -> Codec:
        """Of all caches."""
        return self.sources[0].codec

    @property
    def is_local(self) -> bool:
        """Whether all caches lie in the machine's own file system."""
        return all(source.is_local for source in self.sources)

    def identity(self) -> dict[str, Any]:
        """Return what tells this order of rows from any other, as JSON."""
        return {
            "seed": self.seed,
            "rows": self._cycles * self._cycle,
            "shares": self.shares.tolist(),
            "caches": [source.identity() for source in self.sources],
        }

    def length(self, epoch: int) -> int:
        """Return how many rows an epoch has."""
        return self._cycles * self._cycle

    def boundaries(self, epoch: int, positions: Numbers) -> Numbers:
        """Return a number for each position that is the same for rows that lie together."""
        return positions // _ROWS_TOGETHER

    def places(self, epoch: int, positions: Numbers) -> MixedPlaces:
        """Return where the rows at some positions lie."""
        source, given = self._in_sources(epoch, positions)
        pieces = []
        for number, one in enumerate(self.sources):
            mine = np.flatnonzero(source == number)
            length = one.length(0)
            epochs, rows = np.divmod(given[mine], length)
            for own_epoch in np.unique(epochs).tolist():
                now = epochs == own_epoch
                pieces.append((number, mine[now], one.places(own_epoch, rows[now])))
        return MixedPlaces(pieces=pieces)

    def num_tokens(self, places: MixedPlaces) -> Numbers:
        """Return how many tokens each row gives."""
        return self._of_each(places, lambda source, some: source.num_tokens(some))

    def sizes(self, places: MixedPlaces) -> Numbers:
        """Return how many bytes are fetched of each row."""
        return self._of_each(places, lambda source, some: source.sizes(some))

    def load(
        self, places: MixedPlaces, allocate: Allocate | None, pool: Executor | None
    ) -> LoadedRows:
        """Load rows; arguments and errors as of `CacheSource.load`."""
        loaded = [self.sources[n].load(some, allocate, pool) for n, _, some in places.pieces]
        lengths = [len(numbers) for _, numbers, _ in places.pieces]
        together = loaded_rows.joined(loaded, lengths)
        order = np.concatenate([numbers for _, numbers, _ in places.pieces])
        return loaded_rows.permuted(together, np.argsort(order))

    def _in_sources(self, epoch: int, positions: Numbers) -> tuple[Numbers, Numbers]:
        """Return the source of each position, and how many rows it gave before, ever."""
        cycles, slots = np.divmod(positions, self._cycle)
        source, given = np.empty_like(positions), np.empty_like(positions)
        for cycle in np.unique(cycles).tolist():
            mine = cycles == cycle
            owners, ranks = self._order(epoch, cycle)
            source[mine], given[mine] = owners[slots[mine]], ranks[slots[mine]]
        before = (epoch * self._cycles + cycles) * self.shares[source]
        return source, before + given

    def _cycle_order(self, epoch: int, cycle: int) -> tuple[Numbers, Numbers]:
        """Return the source of each place of a cycle, and which of its places there it is."""
        owners = np.repeat(np.arange(len(self.shares)), self.shares)
        owners = np.random.default_rng([self.seed, epoch, cycle]).permutation(owners)
        ranks = np.empty_like(owners)
        for number, share in enumerate(self.shares.tolist()):
            ranks[owners == number] = np.arange(share)
        return owners, ranks

    def _of_each(self, places: MixedPlaces, value: Any) -> Numbers:  # noqa: ANN401
        found = np.empty(len(places), np.int64)
        for number, rows, some in places.pieces:
            found[rows] = value(self.sources[number], some)
        return found


def shares_of(weights: Sequence[float]) -> Numbers:
    """Return the fewest places of each weight in a cycle that come near to it.

    Raises:
        ValueError: a weight is not above 0, or is below a thousandth of all.
    """
    given = np.array(weights, np.float64)
    if not len(given) or not np.isfinite(given).all() or (given <= 0).any():
        raise ValueError(f"weights={list(weights)}: give one above 0 for each cache")
    wanted = given / given.sum()
    for length in range(1, _LONGEST_CYCLE + 1):
        shares = np.round(wanted * length).astype(np.int64)
        is_near = np.abs(shares / length - wanted) <= _CLOSE * wanted
        if (shares > 0).all() and shares.sum() == length and is_near.all():
            return shares
    shares = np.round(wanted * _LONGEST_CYCLE).astype(np.int64)
    if (shares == 0).any():
        raise ValueError(
            f"weights={list(weights)}: the smallest is below one row in {_LONGEST_CYCLE}; leave "
            "that cache out, or give it more"
        )
    return shares


def _check(sources: Sequence[CacheSource]) -> None:
    if not sources:
        raise ValueError("give at least one dataset to mix")
    kinds = [
        (s.cache.identity["settings"]["codec"], s.cache.width, _names(s), s.skip_damaged)
        for s in sources
    ]
    for number, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"datasets 0 and {number} cannot be in one batch: codec, width, columns and "
                f"skip_damaged are {kinds[0]} and {kind}"
            )
        if not sources[number].length(0):
            raise ValueError(f"dataset {number} has no rows")


def _names(source: CacheSource) -> list[str]:
    return sorted({*source.columns, *(source.join.names if source.join is not None else ())})
