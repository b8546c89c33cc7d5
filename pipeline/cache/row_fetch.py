"""Fetch many rows at once, by as few reads as their places allow."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from pipeline.cache import row
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
_LARGEST_SPAN = 16 << 20  # of one request; more in parallel are faster


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One read: a run of bytes of one file, and where its pieces go."""

    path: str
    start: int
    pieces: Sequence[tuple[int, int, int]]  # bytes passed over before it, place in buffer, length

    @property
    def length(self) -> int:
        """Bytes that are read."""
        return sum(gap + length for gap, _, length in self.pieces)

    def views(self, buffer: memoryview) -> list[memoryview]:
        """Return where its bytes go: what lies between pieces to a place that nobody reads."""
        views = []
        for gap, at, length in self.pieces:
            if gap:
                views.append(_DROPPED[:gap])
            views.append(buffer[at : at + length])
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
    buffer = allocate(int(aux_at[-1]))
    fetched = FetchedRows(
        places=places,
        buffer=buffer,
        tokens_at=tokens_at[:-1],
        tokens_length=lengths,
        aux_at=aux_at[:-1],
    )
    is_local = store.local_path("") is not None
    spans = plan_spans(fetched, max_gap=_LOCAL_GAP if is_local else _REMOTE_GAP)
    view = buffer.data
    if pool is None or len(spans) < 2:
        for path, some in itertools.groupby(spans, key=lambda span: span.path):
            _read(store, path, list(some), view)
    else:
        for _ in pool.map(lambda span: _read(store, span.path, [span], view), spans):
            pass
    return fetched


def wanted_bytes(places: Places, keep_tokens: int | None) -> Numbers:
    """Return (B,) how many bytes of tokens to fetch of each row."""
    lengths, counts = places.column("tokens_length"), places.column("num_tokens")
    return row.prefix_bytes(lengths, num_tokens=counts, keep_tokens=keep_tokens)


def plan_spans(fetched: FetchedRows, *, max_gap: int) -> list[Span]:
    """Return the reads that bring all rows into their buffer.

    Args:
        fetched: the rows.
        max_gap: bytes that are rather read and dropped than passed over by another read.
    """
    places = fetched.places
    paths = np.concatenate([places.column("path")] * 2)
    starts = np.concatenate([places.column("tokens_offset"), places.column("aux_offset")])
    lengths = np.concatenate([fetched.tokens_length, places.column("aux_length")])
    at = np.concatenate([fetched.tokens_at, fetched.aux_at])
    order = np.lexsort((starts, paths))
    paths, starts, lengths, at = paths[order], starts[order], lengths[order], at[order]
    gaps = np.zeros_like(starts)
    gaps[1:] = starts[1:] - (starts[:-1] + lengths[:-1])
    is_new = np.ones(len(starts), np.bool_)
    # Rows that overlap (one asked for twice) are read by reads of their own.
    is_new[1:] = (paths[1:] != paths[:-1]) | (gaps[1:] < 0) | (gaps[1:] > max_gap)
    return list(_spans(places.paths, paths, starts, is_new, (gaps, at, lengths)))


def _spans(
    names: Sequence[str],
    paths: Numbers,
    starts: Numbers,
    is_new: np.ndarray,
    pieces: tuple[Numbers, Numbers, Numbers],
) -> Iterator[Span]:
    gaps, at, lengths = (values.tolist() for values in pieces)
    first = 0
    size = 0
    for number in range(len(starts) + 1):
        is_end = number == len(starts)
        if number > first and (is_end or is_new[number] or size >= _LARGEST_SPAN):
            mine = list(
                zip(gaps[first:number], at[first:number], lengths[first:number], strict=True)
            )
            mine[0] = (0, *mine[0][1:])
            yield Span(path=names[int(paths[first])], start=int(starts[first]), pieces=mine)
            first, size = number, 0
        if not is_end:
            size += lengths[number]


def _read(store: Store, path: str, spans: Sequence[Span], view: memoryview) -> None:
    """Read spans of one part."""
    try:
        store.read_spans(path, [(span.start, span.views(view)) for span in spans])
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
