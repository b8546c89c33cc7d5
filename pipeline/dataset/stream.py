"""Load the shares of one reader: what lies together by one request, the next ones ahead."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.fetch import THREADS, prefetched
from pipeline.cache.row_fetch import Allocate
from pipeline.dataset import loaded_rows
from pipeline.dataset.loaded_rows import LoadedRows
from pipeline.dataset.shares import Share

Numbers = NDArray[np.int64]
P = TypeVar("P")


class Source(Protocol[P]):
    """What gives rows by their position in an epoch."""

    @property
    def is_local(self) -> bool:
        """Whether reading costs no requests."""

    def places(self, epoch: int, positions: Numbers) -> P:
        """Return where the rows at some positions lie."""

    def sizes(self, places: P) -> Numbers:
        """Return how many bytes are fetched of each row."""

    def boundaries(self, epoch: int, positions: Numbers) -> Numbers:
        """Return a number for each position that is the same for rows that lie together."""

    def load(self, places: P, allocate: Allocate | None, pool: Executor | None) -> LoadedRows:
        """Load rows."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Loads shares ahead of who uses them.

    From a local cache each share is read for itself, straight into the memory of its batch. From a
    remote one the rows of a reader that lie together, of several shares, are fetched by few large
    ranged reads; the first share alone, so that it is there soon.

    Attributes:
        source: of the rows.
        epoch: whose order.
        allocate: returns memory to read into; None for that of each cache's reader.
        prefetch_bytes: of rows that are loaded ahead, and of those in use.
        threads: that load and check shares from a local cache.
    """

    source: Source[Any]
    epoch: int
    allocate: Allocate | None
    prefetch_bytes: int
    threads: int

    def load(self, shares: Iterable[Share]) -> Iterator[tuple[Share, LoadedRows]]:
        """Yield each share with its rows, in order."""
        if self.source.is_local:
            batches = prefetched(
                lambda item: self.source.load(item[1], self.allocate, None),
                map(self._located, shares),
                max_bytes=self.prefetch_bytes,
                threads=self.threads,
                # More would only spread over more memory than the processor's caches have.
                max_items=self.threads + 1,
            )
            for (share, _), loaded in batches:
                yield share, loaded
            return
        yield from self._load_units(shares)

    def _load_units(self, shares: Iterable[Share]) -> Iterator[tuple[Share, LoadedRows]]:
        ahead: deque[Share] = deque()
        has_first = threading.Event()

        def fetch(positions: Numbers) -> LoadedRows:
            try:
                places = self.source.places(self.epoch, positions)
                return self.source.load(places, self.allocate, pool)
            finally:
                has_first.set()

        with ThreadPoolExecutor(THREADS, thread_name_prefix="carve-fetch") as pool:
            units = prefetched(
                fetch,
                self._units(shares, ahead, has_first),
                max_bytes=self.prefetch_bytes,
                threads=2,
                in_thread=True,
            )
            try:
                yield from _cut(units, ahead)
            finally:
                has_first.set()
                units.close()

    def _located(self, share: Share) -> tuple[tuple[Share, Any], int]:
        places = self.source.places(self.epoch, share.positions)
        return (share, places), int(self.source.sizes(places).sum())

    def _units(
        self, shares: Iterable[Share], ahead: deque[Share], has_first: threading.Event
    ) -> Iterator[tuple[Numbers, int]]:
        """Yield the positions that are fetched at once, with their bytes; put shares in `ahead`.

        Those behind the first share wait for it: it is sooner there alone, and the interpreter
        with it.
        """
        left = iter(shares)
        first = next(left, None)
        if first is None:
            return
        ahead.append(first)
        yield first.positions, int(self._sizes(first).sum())
        has_first.wait()
        largest = max(1, self.prefetch_bytes // 2)
        held: list[Numbers] = []
        held_bytes, together = 0, -1
        for share in left:
            ahead.append(share)
            sizes = self._sizes(share)
            marks = self.source.boundaries(self.epoch, share.positions)
            cuts = np.flatnonzero(np.diff(marks)) + 1
            for rows in np.split(np.arange(len(marks)), cuts):
                size, mark = int(sizes[rows].sum()), int(marks[rows[0]])
                if held and (mark != together or held_bytes + size > largest):
                    yield np.concatenate(held), held_bytes
                    held, held_bytes = [], 0
                held.append(share.positions[rows])
                held_bytes, together = held_bytes + size, mark
        if held:
            yield np.concatenate(held), held_bytes

    def _sizes(self, share: Share) -> Numbers:
        return self.source.sizes(self.source.places(self.epoch, share.positions))


def _cut(
    units: Iterator[tuple[Numbers, LoadedRows]], ahead: deque[Share]
) -> Iterator[tuple[Share, LoadedRows]]:
    """Yield shares with their rows from units that follow each other."""
    pieces: list[LoadedRows] = []
    counts: list[int] = []
    for positions, loaded in units:
        at = 0
        while at < len(positions):
            missing = len(ahead[0].positions) - sum(counts)
            count = min(missing, len(positions) - at)
            pieces.append(loaded.slice(at, at + count))
            counts.append(count)
            at += count
            if count == missing:
                yield ahead.popleft(), loaded_rows.joined(pieces, counts)
                pieces, counts = [], []
