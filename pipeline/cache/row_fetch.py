"""Fetch many rows at once, by as few reads as their places allow."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from pipeline.cache import row
from pipeline.cache.checksum import Sums, crc32c
from pipeline.cache.fetched_rows import FetchedRows
from pipeline.cache.places import Places
from pipeline.cache.row_batch import Bytes, Numbers, starts_of
from pipeline.errors import CacheFormatError, NotFoundError, StorageError
from pipeline.storage import Store

Allocate = Callable[[int], Bytes]

_ALIGNMENT = 8  # of each row's aux in the buffer
_LOCAL_GAP = 4 << 10  # headers of pages between rows: passed over, not read anew
_REMOTE_GAP = 256 << 10  # bytes that take less time than another request
_DROPPED = memoryview(bytearray(max(_LOCAL_GAP, _REMOTE_GAP)))
_LOCAL_SPAN = 2 << 20  # read, then summed while it still is in the processor's cache
_REMOTE_SPAN = 16 << 20  # of one request; more in parallel are faster


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One read: a run of bytes of one file, and where its pieces go."""

    path: str
    start: int
    gaps: Sequence[int]  # bytes passed over before each piece
    starts: Sequence[int]  # where it goes in the buffer
    lengths: Sequence[int]
    numbers: Sequence[int]  # which of the rows' tokens it is, or behind them which aux

    @property
    def length(self) -> int:
        """Bytes that are read."""
        return sum(self.gaps) + sum(self.lengths)

    def pieces(self, buffer: memoryview) -> list[memoryview]:
        """Return where its pieces go."""
        places = zip(self.starts, self.lengths, strict=True)
        return [buffer[start : start + length] for start, length in places]

    def views(self, pieces: list[memoryview]) -> list[memoryview]:
        """Return where its bytes go: what lies between pieces to a place that nobody reads."""
        if not any(self.gaps):
            return pieces
        views = []
        for gap, piece in zip(self.gaps, pieces, strict=True):
            if gap:
                views.append(_DROPPED[:gap])
            views.append(piece)
        return views


def fetch_rows(
    store: Store,
    places: Places,
    *,
    keep_tokens: int | None,
    allocate: Allocate,
    pool: Executor | None = None,
) -> FetchedRows:
    """Fetch the first tokens of some rows, and their aux.

    Args:
        store: the cache.
        places: of the rows, in any order, of any parts.
        keep_tokens: how many tokens are wanted of each; None for all.
        allocate: returns so many bytes to read into.
        pool: reads the spans in parallel; None for one after the other.

    Raises:
        CacheFormatError: a part is shorter than a row of it.
        NotFoundError: a part is missing.
        StorageError: the store cannot be read.
    """
    lengths, aux_lengths = wanted_bytes(places, keep_tokens), places.column("aux_length")
    tokens_at = starts_of(lengths)
    aligned = -(-aux_lengths // _ALIGNMENT) * _ALIGNMENT
    aux_at = starts_of(aligned) + -(-tokens_at[-1] // _ALIGNMENT) * _ALIGNMENT
    sums = np.zeros(2 * len(places), np.uint32)
    fetched = FetchedRows(
        places=places,
        buffer=allocate(int(aux_at[-1])),
        tokens_at=tokens_at[:-1],
        tokens_length=lengths,
        aux_at=aux_at[:-1],
        token_sums=sums[: len(places)],
        aux_sums=sums[len(places) :],
    )
    is_local = store.local_path("") is not None
    spans = plan_spans(
        fetched,
        max_gap=_LOCAL_GAP if is_local else _REMOTE_GAP,
        max_bytes=_LOCAL_SPAN if is_local else _REMOTE_SPAN,
    )
    reads = list(_together(spans) if pool is None else ([span] for span in spans))
    view = fetched.buffer.data
    if pool is None or len(reads) < 2:
        for some in reads:
            _read(store, some, view, sums)
    else:
        for _ in pool.map(lambda some: _read(store, some, view, sums), reads):
            pass
    return fetched


def wanted_bytes(places: Places, keep_tokens: int | None) -> Numbers:
    """Return (B,) how many bytes of tokens to fetch of each row."""
    lengths, counts = places.column("tokens_length"), places.column("num_tokens")
    return row.prefix_bytes(lengths, num_tokens=counts, keep_tokens=keep_tokens)


def plan_spans(fetched: FetchedRows, *, max_gap: int, max_bytes: int) -> Iterator[Span]:
    """Yield the reads that bring all rows into their buffer.

    Args:
        fetched: the rows.
        max_gap: bytes that are rather read and dropped than passed over by another read.
        max_bytes: a read of so many is ended.
    """
    places = fetched.places
    paths = np.concatenate([places.column("path")] * 2)
    starts = np.concatenate([places.column("tokens_offset"), places.column("aux_offset")])
    lengths = np.concatenate([fetched.tokens_length, places.column("aux_length")])
    at = np.concatenate([fetched.tokens_at, fetched.aux_at])
    order = np.lexsort((starts, paths))
    paths, starts, lengths, at = paths[order], starts[order], lengths[order], at[order]
    ends = starts + lengths
    gaps = np.zeros_like(starts)
    gaps[1:] = starts[1:] - ends[:-1]
    # Rows that overlap (one asked for twice) are read by reads of their own.
    is_new = (gaps < 0) | (gaps > max_gap)
    is_new[1:] |= paths[1:] != paths[:-1]
    is_new[:1] = True
    gaps[is_new] = 0
    cuts = [*_cuts(np.flatnonzero(is_new), starts, ends, max_bytes), len(starts)]
    gap, place, length, number = (v.tolist() for v in (gaps, at, lengths, order))
    for first, end in itertools.pairwise(cuts):
        yield Span(
            path=places.paths[int(paths[first])],
            start=int(starts[first]),
            gaps=[0, *gap[first + 1 : end]],
            starts=place[first:end],
            lengths=length[first:end],
            numbers=number[first:end],
        )


def _cuts(runs: Numbers, starts: Numbers, ends: Numbers, max_bytes: int) -> list[int]:
    """Return where reads begin: with each run, and in one as soon as a read has its bytes."""
    last = np.append(runs[1:], len(starts))[: len(runs)] - 1
    if (ends[last] - starts[runs] <= max_bytes).all():
        return list(runs.tolist())
    cuts: list[int] = []
    for first, end in zip(runs.tolist(), (last + 1).tolist(), strict=True):
        begin = first
        while begin < end:
            cuts.append(begin)
            begin += int(np.searchsorted(ends[begin:end], starts[begin] + max_bytes)) + 1
    return cuts


def _together(spans: Iterator[Span]) -> Iterator[list[Span]]:
    """Yield spans of one part that are read one after the other, then summed."""
    held: list[Span] = []
    size = 0
    for span in spans:
        if held and (span.path != held[0].path or size >= _LOCAL_SPAN):
            yield held
            held, size = [], 0
        held.append(span)
        size += span.length
    if held:
        yield held


def _read(store: Store, spans: Sequence[Span], view: memoryview, sums: Sums) -> None:
    """Read spans of one part, and sum what was read."""
    path = spans[0].path
    pieces = [span.pieces(view) for span in spans]
    asked = zip(spans, pieces, strict=True)
    try:
        store.read_spans(path, [(span.start, span.views(own)) for span, own in asked])
    except NotFoundError:
        raise
    except StorageError as err:
        size, end = store.size(path), max(span.start + span.length for span in spans)
        if end > size:
            raise CacheFormatError(
                f"{store.url_of(path)} has {size} bytes, and the index names bytes up to {end} of "
                "it; the file is damaged"
            ) from err
        raise
    for span, own in zip(spans, pieces, strict=True):
        sums[span.numbers] = [crc32c(piece) for piece in own]
