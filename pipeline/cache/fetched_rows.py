"""Check the bytes of many rows at once: what `row.py` says of one row, for a batch of them."""

from dataclasses import dataclass

import numpy as np

from pipeline.cache import row
from pipeline.cache.checksum import Sums, crc32c, joined_crc32c
from pipeline.cache.places import Places
from pipeline.cache.row_batch import Bytes, Numbers, RowBatch, of_stored, runs
from pipeline.cache.row_place import RowPlace
from pipeline.errors import CacheFormatError
from pipeline.types import TileLayout

_MOST_SUMS = 1 << 22  # of a batch; one row of very many blocks must not cost as many for all rows
_SUM_OF_INTACT_AUX = crc32c(bytes(4))  # of any bytes that end with their own checksum


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedRows:
    """Rows as they were fetched, not yet checked: all in one buffer."""

    places: Places  # of B rows
    buffer: Bytes
    tokens_at: Numbers  # (B,) where the tokens of each begin in the buffer
    tokens_length: Numbers  # (B,) bytes fetched: whole checksum blocks, or all
    aux_at: Numbers  # (B,) likewise its aux, which is there whole
    token_sums: Sums  # (B,) checksum of all that was fetched of the tokens of each
    aux_sums: Sums  # (B,) likewise of its aux

    def row_bytes(self, number: int) -> tuple[memoryview, memoryview]:
        """Return tokens and aux of one row."""
        tokens, aux = int(self.tokens_at[number]), int(self.aux_at[number])
        length = int(self.places.column("aux_length")[number])
        view = self.buffer.data
        return view[tokens : tokens + int(self.tokens_length[number])], view[aux : aux + length]


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedRow:
    """A row that was left out, and what is wrong with it."""

    key: str
    path: str  # of its part, in the cache
    offset: int  # of its tokens in the part, in bytes
    message: str

    @classmethod
    def of(cls, place: RowPlace, message: str) -> "DamagedRow":
        """Name a row by its place."""
        return cls(key=place.key, path=place.path, offset=place.tokens_offset, message=message)


def unpack_rows(
    fetched: FetchedRows,
    *,
    keep_tokens: int | None,
    url: str,
    damaged: list[DamagedRow] | None = None,
) -> RowBatch:
    """Check rows and cut them.

    Args:
        fetched: the rows.
        keep_tokens: how many tokens are wanted of each; None for all.
        url: of the cache, for messages.
        damaged: takes the rows that are damaged; None to raise an error about the first.

    Raises:
        CacheFormatError: a row is damaged, or another one than was indexed. The message has its
            key, its part and the byte it begins at.
    """
    batch = _unpack_at_once(fetched, keep_tokens)
    if batch is None:
        batch = _unpack_each(fetched, keep_tokens, url, damaged)
    return batch


def _unpack_at_once(fetched: FetchedRows, keep_tokens: int | None) -> RowBatch | None:
    """Return the rows, or None where one is not as it should be, or they are of several shapes."""
    buffer, places, aux_at = fetched.buffer, fetched.places, fetched.aux_at
    aux_length, counts = places.column("aux_length"), places.column("num_tokens")
    full_length = places.column("tokens_length")
    if not len(places) or (aux_length < row.LEAST_AUX_BYTES).any():
        return None
    if not _are_aux_intact(fetched, aux_length):
        return None
    layouts, widths, blocks, stored_counts = row.headers(_fields(buffer, aux_at, 8))
    token_bytes = int(full_length[0] // counts[0])
    width, block = int(widths[0]), int(blocks[0])
    is_known = (
        (layouts >= 1).all()
        and (layouts <= 3).all()
        and block > 0
        and (widths == width).all()
        and (blocks == block).all()
        and (stored_counts == counts).all()
        and token_bytes > 0
        and (full_length == counts * token_bytes).all()
    )
    heads_at = aux_at + row.head_offsets(layouts)
    if not is_known or (heads_at + 4 > aux_at + aux_length).any():
        return None
    head_lengths = _fields(buffer, heads_at, 4).view("<u4").reshape(-1).astype(np.int64)
    head_lengths[layouts == 1] = 0
    starts = heads_at + head_lengths + np.where(layouts == 1, 0, 4)
    ends = starts + counts * (8 + width) + 4 * -(-counts // block) + 4
    if (ends != aux_at + aux_length).any():
        return None
    kept = counts if keep_tokens is None else np.minimum(counts, keep_tokens)
    num_blocks = -(-kept // block)
    crcs = runs(buffer, starts + counts * (8 + width), 4 * num_blocks).view("<u4")
    if not _are_blocks_intact(fetched, crcs, num_blocks, block * token_bytes):
        return None
    has_heads, has_tiles = bool(head_lengths.any()), bool((layouts == 3).any())
    return RowBatch(
        places=places,
        num_tokens=kept,
        tokens=_tokens(fetched, kept * token_bytes),
        codec_aux=runs(buffer, starts + 8 * counts, kept * width),
        positions=runs(buffer, starts, 4 * kept).view("<u4"),
        sizes=runs(buffer, starts + 4 * counts, 4 * kept).view("<f4"),
        heads=_heads(buffer, starts - head_lengths, head_lengths) if has_heads else (),
        tiles=_tiles(fetched, layouts) if has_tiles else (),
    )


def _are_aux_intact(fetched: FetchedRows, aux_length: Numbers) -> bool:
    if (fetched.aux_sums != _SUM_OF_INTACT_AUX).any():
        return False
    stored = _fields(fetched.buffer, fetched.aux_at + aux_length - 4, 4).view("<u4").reshape(-1)
    indexed = fetched.places.column("aux_crc32c")
    return bool(((indexed == stored) | (indexed < 0)).all())


def _are_blocks_intact(
    fetched: FetchedRows, crcs: Sums, num_blocks: Numbers, block_bytes: int
) -> bool:
    """Compare tokens with the checksums of their blocks; False, too, for more than fit at once."""
    last_bytes = fetched.tokens_length - (num_blocks - 1) * block_bytes
    is_cut_at_blocks = ((last_bytes >= 1) & (last_bytes <= block_bytes)).all()
    if not is_cut_at_blocks or len(num_blocks) * int(num_blocks.max()) > _MOST_SUMS:
        return False
    expected = joined_crc32c(crcs, num_blocks, block_bytes=block_bytes, last_bytes=last_bytes)
    return bool((expected == fetched.token_sums).all())


def _tokens(fetched: FetchedRows, kept: Numbers) -> Bytes:
    """Return the tokens that are wanted; those of the buffer where nothing lies between them."""
    if (fetched.tokens_length == kept).all():
        first, total = int(fetched.tokens_at[0]), int(kept.sum())
        if (np.diff(fetched.tokens_at) == kept[:-1]).all():
            return fetched.buffer[first : first + total]
    return runs(fetched.buffer, fetched.tokens_at, kept)


def _heads(buffer: Bytes, starts: Numbers, lengths: Numbers) -> list[bytes]:
    spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
    return [buffer[start:stop].tobytes() for start, stop in spans]


def _tiles(fetched: FetchedRows, layouts: Numbers) -> list[TileLayout | None]:
    found: list[TileLayout | None] = []
    for number, layout in enumerate(layouts.tolist()):
        _, aux = fetched.row_bytes(number)
        where = fetched.places.where(number, "")
        found.append(row.tiles_of(aux, where=where) if layout == 3 else None)
    return found


def _unpack_each(
    fetched: FetchedRows, keep_tokens: int | None, url: str, damaged: list[DamagedRow] | None
) -> RowBatch:
    """Check row by row, which finds out what is wrong with which."""
    found, numbers = [], []
    lengths, counts = fetched.places.column("tokens_length"), fetched.places.column("num_tokens")
    for number in range(len(fetched.places)):
        place, where = fetched.places.place(number), fetched.places.where(number, url)
        tokens, aux = fetched.row_bytes(number)
        try:
            stored = row.unpack_row(
                tokens,
                aux,
                tokens_length=int(lengths[number]),
                keep_tokens=keep_tokens,
                where=where,
            )
            row.check_is_indexed(
                aux, num_tokens=int(counts[number]), aux_crc32c=place.aux_crc32c, where=where
            )
        except CacheFormatError as err:
            if damaged is None:
                raise
            damaged.append(DamagedRow.of(place, str(err)))
        else:
            found.append(stored)
            numbers.append(number)
    return of_stored(fetched.places.take(np.array(numbers, np.int64)), found)


def _fields(buffer: Bytes, starts: Numbers, length: int) -> Bytes:
    """Return (B, length) bytes, those at each start."""
    return buffer[starts[:, None] + np.arange(length)]
