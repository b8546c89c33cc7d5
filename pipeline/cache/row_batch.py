"""Rows of a cache, checked and still packed: a batch of them in a few arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.places import Places
from pipeline.cache.row import StoredTokens
from pipeline.errors import CacheFormatError
from pipeline.types import TileLayout

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]
T = TypeVar("T")
V = TypeVar("V", bound=np.generic)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBatch:
    """The first tokens of B rows, checked, still packed: row after row, most important first."""

    places: Places
    num_tokens: Numbers  # (B,) K of each, as many as were asked for
    tokens: Bytes  # (sum of K * token_bytes,)
    codec_aux: Bytes  # (sum of K * A,)
    positions: NDArray[np.uint32]  # (sum of K,)
    sizes: NDArray[np.float32]  # (sum of K,)
    heads: Sequence[bytes] = ()  # of each row; empty where no row has one
    tiles: Sequence[TileLayout | None] = ()  # likewise

    def __len__(self) -> int:
        return len(self.num_tokens)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in `tokens`."""
        return len(self.tokens) // int(self.num_tokens.sum()) if len(self) else 0

    @property
    def aux_bytes(self) -> int:
        """Bytes of one token in `codec_aux`."""
        return len(self.codec_aux) // int(self.num_tokens.sum()) if len(self) else 0

    @property
    def starts(self) -> Numbers:
        """(B + 1,) where the tokens of each row begin, and their number."""
        return starts_of(self.num_tokens)

    def stored(self, number: int) -> StoredTokens:
        """Return one row alone."""
        start, stop = self.starts[number : number + 2].tolist()
        width = self.aux_bytes
        return StoredTokens(
            tokens=self.tokens[start * self.token_bytes : stop * self.token_bytes].tobytes(),
            codec_aux=self.codec_aux[start * width : stop * width].tobytes(),
            positions=self.positions[start:stop],
            sizes=self.sizes[start:stop],
            num_tokens=stop - start,
            head=self.heads[number] if self.heads else b"",
            tiles=self.tiles[number] if self.tiles else None,
        )

    def slice(self, start: int, stop: int) -> "RowBatch":
        """Return the rows from `start` to before `stop`; nothing is copied."""
        first, last = int(self.num_tokens[:start].sum()), int(self.num_tokens[:stop].sum())
        token_bytes, width = self.token_bytes, self.aux_bytes
        return RowBatch(
            places=self.places.slice(start, stop),
            num_tokens=self.num_tokens[start:stop],
            tokens=self.tokens[first * token_bytes : last * token_bytes],
            codec_aux=self.codec_aux[first * width : last * width],
            positions=self.positions[first:last],
            sizes=self.sizes[first:last],
            heads=self.heads[start:stop],
            tiles=self.tiles[start:stop],
        )

    def take(self, rows: Numbers) -> "RowBatch":
        """Return some of the rows, in the order given, copied."""
        token_bytes, width = self.token_bytes, self.aux_bytes
        starts, counts = self.starts[:-1][rows], self.num_tokens[rows]
        return RowBatch(
            places=self.places.take(rows),
            num_tokens=counts,
            tokens=runs(self.tokens, starts * token_bytes, counts * token_bytes),
            codec_aux=runs(self.codec_aux, starts * width, counts * width),
            positions=runs(self.positions, starts, counts),
            sizes=runs(self.sizes, starts, counts),
            heads=[self.heads[r] for r in rows] if self.heads else (),
            tiles=[self.tiles[r] for r in rows] if self.tiles else (),
        )


def joined(batches: Sequence[RowBatch]) -> RowBatch:
    """Return several batches as one, copied.

    Raises:
        CacheFormatError: their tokens differ in bytes.
    """
    if len(batches) == 1:
        return batches[0]
    if len({b.token_bytes for b in batches if len(b)}) > 1:
        raise CacheFormatError("rows of different widths cannot be in one batch")
    none = [[b""] * len(b) for b in batches], [[None] * len(b) for b in batches]
    return RowBatch(
        places=Places.joined([b.places for b in batches]),
        num_tokens=np.concatenate([b.num_tokens for b in batches]),
        tokens=np.concatenate([b.tokens for b in batches]),
        codec_aux=np.concatenate([b.codec_aux for b in batches]),
        positions=np.concatenate([b.positions for b in batches]),
        sizes=np.concatenate([b.sizes for b in batches]),
        heads=_flat([b.heads or n for b, n in zip(batches, none[0], strict=True)])
        if any(b.heads for b in batches)
        else (),
        tiles=_flat([b.tiles or n for b, n in zip(batches, none[1], strict=True)])
        if any(b.tiles for b in batches)
        else (),
    )


def runs(values: NDArray[V], starts: Numbers, lengths: Numbers) -> NDArray[V]:
    """Return pieces of an array, one behind the other, copied."""
    if not len(starts):
        return values[:0].copy()
    length, first = int(lengths[0]), int(starts[0])
    step = int(starts[1]) - first if len(starts) > 1 else max(1, length)
    if step > 0 and (lengths == length).all() and (np.diff(starts) == step).all():
        size = values.itemsize
        shape, strides = (len(starts), length), (step * size, size)
        pieces: NDArray[V] = np.ndarray(shape, values.dtype, values, first * size, strides)
        return np.ascontiguousarray(pieces).reshape(-1)
    spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
    view = values.data
    # Several times faster than to concatenate arrays; writable, as batches are.
    content = bytearray().join([view[start:stop] for start, stop in spans])
    return np.frombuffer(content, values.dtype)


def of_stored(places: Places, rows: Sequence[StoredTokens]) -> RowBatch:
    """Return rows that were unpacked one by one as a batch.

    Raises:
        CacheFormatError: their tokens differ in bytes.
    """
    if len({(len(r.tokens) // r.num_tokens, len(r.codec_aux) // r.num_tokens) for r in rows}) > 1:
        raise CacheFormatError(
            f"rows {places.key(0)!r} to {places.key(len(rows) - 1)!r}: their tokens differ in "
            "bytes, so they cannot be in one batch; the cache is damaged"
        )
    return RowBatch(
        places=places,
        num_tokens=np.array([r.num_tokens for r in rows], np.int64),
        tokens=np.frombuffer(bytearray().join(r.tokens for r in rows), np.uint8),
        codec_aux=np.frombuffer(bytearray().join(r.codec_aux for r in rows), np.uint8),
        positions=np.concatenate([np.empty(0, np.uint32), *(r.positions for r in rows)]),
        sizes=np.concatenate([np.empty(0, np.float32), *(r.sizes for r in rows)]),
        heads=[r.head for r in rows] if any(r.head for r in rows) else (),
        tiles=[r.tiles for r in rows] if any(r.tiles for r in rows) else (),
    )


def starts_of(counts: Numbers) -> Numbers:
    """Return where runs of so many begin that lie one behind the other, and their end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def _flat(lists: Sequence[Sequence[T]]) -> list[T]:
    return [value for values in lists for value in values]
