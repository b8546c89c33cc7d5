"""The bytes of one image: its tokens and, beside them, what is needed to read any prefix.

Tokens are stored most important first, all of one length. `aux` of format version 1, all
little-endian, for K tokens of a codec with A aux bytes a token and a head of H bytes:

    uint8   layout: 3 for a tiled image, else 2 where there is a head, 1 where there is none
    uint8   A
    uint16  T, tokens per checksum block
    uint32  K
    uint32  tiles[8]         only in layout 3: rows, columns of tiles; top, bottom, left, right of
                             what is no padding, in tokens; rows, columns of the canvas after it was
                             resampled, 0 where it was not
    uint32  H                only in layouts 2 and 3
    byte    head[H]          only in layouts 2 and 3: what every prefix of the tokens needs
    uint32  positions[K]     where each token came from
    float32 sizes[K]         how many source tokens it stands for
    byte    codec_aux[K][A]
    uint32  crc32c[ceil(K/T)]  of each block of T tokens in `tokens`; the last may be shorter
    uint32  crc32c of all bytes of `aux` before this one
"""

import struct
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.checksum import crc32c
from pipeline.errors import CacheFormatError
from pipeline.types import PackedTokens, TileLayout

Whole = TypeVar("Whole", int, NDArray[np.int64])
BLOCK_TOKENS = 16
LEAST_AUX_BYTES = 16  # header, what follows it, and the checksum: less is damaged
_HEADER = struct.Struct("<BBHI")
_TILES = struct.Struct("<8I")
_HEAD_LENGTH = struct.Struct("<I")
_CRC = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTokens:
    """The first tokens of one row, checked, still packed."""

    tokens: bytes  # num_tokens packed tokens, most important first
    codec_aux: bytes  # num_tokens * A
    positions: NDArray[np.uint32]  # (num_tokens,)
    sizes: NDArray[np.float32]  # (num_tokens,)
    num_tokens: int
    head: bytes  # the same for every prefix; empty where the codec needs none
    tiles: TileLayout | None = None  # of a tiled image


def pack_aux(
    packed: PackedTokens,
    *,
    positions: NDArray[np.uint32],
    sizes: NDArray[np.float32],
    tiles: TileLayout | None = None,
) -> bytes:
    """Return the `aux` bytes of one row.

    Args:
        packed: K tokens of equal length, most important first.
        positions: (K,), in the same order.
        sizes: (K,), in the same order.
        tiles: of a tiled image.
    """
    tokens, codec_aux, head = packed.tokens, packed.aux, packed.head
    count = len(positions)
    block = BLOCK_TOKENS * (len(tokens) // count)
    # The first layouts have no room for what later ones hold; rows without it keep their bytes.
    layout = 3 if tiles is not None else 2 if head else 1
    body = b"".join(
        (
            _HEADER.pack(layout, len(codec_aux) // count, BLOCK_TOKENS, count),
            _pack_tiles(tiles) if tiles is not None else b"",
            _HEAD_LENGTH.pack(len(head)) + head if layout > 1 else b"",
            positions.astype("<u4", copy=False).tobytes(),
            sizes.astype("<f4", copy=False).tobytes(),
            codec_aux,
            np.array(
                [crc32c(tokens[start : start + block]) for start in range(0, len(tokens), block)],
                dtype="<u4",
            ).tobytes(),
        )
    )
    return body + _CRC.pack(crc32c(body))


def headers(fields: NDArray[np.uint8]) -> tuple[NDArray[np.int64], ...]:
    """Return what the first 8 bytes of aux say, of many rows at once.

    Args:
        fields: (B, 8).

    Returns:
        (B,) each: layout, aux bytes a token, tokens a checksum block, tokens.
    """
    widths = np.ascontiguousarray(fields[:, 2:4]).view("<u2").reshape(-1)
    counts = np.ascontiguousarray(fields[:, 4:8]).view("<u4").reshape(-1)
    found = (fields[:, 0], fields[:, 1], widths, counts)
    return tuple(values.astype(np.int64) for values in found)


def head_offsets(layouts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where in aux the length of the head stands, or positions where there is none."""
    return np.where(layouts == 3, _HEADER.size + _TILES.size, _HEADER.size)


def aux_length(value: bytes | memoryview, *, where: str) -> int:
    """Return how many bytes aux takes at the start of a value that it begins.

    Raises:
        CacheFormatError: they would be more than there are, or of no known layout.
    """
    if len(value) >= LEAST_AUX_BYTES:
        layout, aux_bytes, block_tokens, count = _HEADER.unpack_from(value)
        start = _HEADER.size + (_TILES.size if layout == 3 else 0)
        if layout in (2, 3) and len(value) >= start + _HEAD_LENGTH.size:
            start += _HEAD_LENGTH.size + int(_HEAD_LENGTH.unpack_from(value, start)[0])
        if layout in (1, 2, 3) and block_tokens:
            length = start + count * (8 + aux_bytes) + 4 * -(-count // block_tokens) + _CRC.size
            if length <= len(value):
                return int(length)
    raise CacheFormatError(f"{where}: a row of {len(value)} bytes has no aux; it is damaged")


def tiles_of(aux: bytes | memoryview, *, where: str) -> TileLayout:
    """Return the tiles of an intact row of layout 3.

    Raises:
        CacheFormatError: they cannot be.
    """
    return _unpack_tiles(bytes(aux[: _HEADER.size + _TILES.size]), _HEADER.size, where=where)


def row_checksum(tokens: bytes | memoryview, aux: bytes | memoryview) -> int:
    """Return the crc32c of a whole row, tokens then aux."""
    return crc32c(aux, crc32c(tokens))


def prefix_bytes(tokens_length: Whole, *, num_tokens: Whole, keep_tokens: int | None) -> Whole:
    """Return how many bytes of `tokens` to fetch for the first `keep_tokens` of a row, or of many.

    Whole checksum blocks, so that what is returned has been checked; or all.
    """
    if keep_tokens is None:
        return tokens_length
    blocks = -(-keep_tokens // BLOCK_TOKENS)
    prefix = blocks * BLOCK_TOKENS * (tokens_length // num_tokens)
    return cast("Whole", np.minimum(tokens_length, prefix))


def unpack_row(
    tokens: bytes | memoryview,
    aux: bytes | memoryview,
    *,
    tokens_length: int,
    keep_tokens: int | None = None,
    where: str,
) -> StoredTokens:
    """Check and cut the bytes of one row.

    Args:
        tokens: the first bytes of the row's tokens, as many as `prefix_bytes` says or all.
        aux: all of the row's aux.
        tokens_length: bytes of all tokens of the row.
        keep_tokens: how many tokens are wanted; None for all.
        where: key and place, for messages.

    Raises:
        CacheFormatError: the bytes are damaged or of another layout.
    """
    body = aux_body(aux, where=where)
    layout, aux_bytes, block_tokens, count = _HEADER.unpack_from(body)
    start, head, tiles = _HEADER.size, b"", None
    if layout == 3 and len(body) >= start + _TILES.size:
        tiles = _unpack_tiles(body, start, where=where)
        start += _TILES.size
    if layout in (2, 3) and len(body) >= start + _HEAD_LENGTH.size:
        (head_length,) = _HEAD_LENGTH.unpack_from(body, start)
        start += _HEAD_LENGTH.size
        head = body[start : start + head_length]
        start += head_length
    num_blocks = -(-count // block_tokens) if block_tokens else 0
    expected = start + count * (8 + aux_bytes) + 4 * num_blocks
    is_known = layout in (1, 2, 3) and count > 0 and block_tokens > 0 and expected == len(body)
    if not is_known or tokens_length < count or tokens_length % count:
        raise CacheFormatError(
            f"{where}: aux layout {layout} with {count} tokens in {len(body)} bytes is not known; "
            "a newer version of this package may read it"
        )
    positions = np.frombuffer(body, "<u4", count, start)
    sizes = np.frombuffer(body, "<f4", count, start + 4 * count)
    codec_start = start + 8 * count
    crcs = np.frombuffer(body, "<u4", num_blocks, codec_start + aux_bytes * count)
    keep = count if keep_tokens is None else min(keep_tokens, count)
    token_bytes = tokens_length // count
    _check_blocks(memoryview(tokens), crcs, block_tokens * token_bytes, keep * token_bytes, where)
    return StoredTokens(
        tokens=bytes(tokens[: keep * token_bytes]),
        codec_aux=body[codec_start : codec_start + keep * aux_bytes],
        positions=positions[:keep],
        sizes=sizes[:keep],
        num_tokens=keep,
        head=head,
        tiles=tiles,
    )


def aux_body(aux: bytes | memoryview, *, where: str) -> bytes:
    """Return what the checksum at the end of `aux` is of.

    Raises:
        CacheFormatError: they do not match.
    """
    aux = bytes(aux)
    if len(aux) < _HEADER.size + _CRC.size:
        raise CacheFormatError(f"{where}: aux has only {len(aux)} bytes; the file is damaged")
    body = aux[: -_CRC.size]
    if crc32c(body) != aux_checksum(aux):
        raise CacheFormatError(f"{where}: aux does not match its checksum; the file is damaged")
    return body


def aux_checksum(aux: bytes | memoryview) -> int:
    """Return the checksum that `aux` ends with, which stands for the whole row.

    It covers the checksums of the tokens too. An index that holds it tells a row from any other.
    """
    return int(_CRC.unpack(aux[-_CRC.size :])[0])


def check_is_indexed(
    aux: bytes | memoryview, *, num_tokens: int, aux_crc32c: int | None, where: str
) -> None:
    """Check that an intact row is the one that an index means.

    Args:
        aux: of the row, checked by `unpack_row`.
        num_tokens: as the index has it.
        aux_crc32c: likewise; None where an older index has none.
        where: key and place, for messages.

    Raises:
        CacheFormatError: it is another row.
    """
    count = _HEADER.unpack_from(aux)[3]
    if count != num_tokens:
        raise CacheFormatError(f"{where}: holds {count} tokens, the index says {num_tokens}")
    if aux_crc32c is not None and aux_checksum(aux) != aux_crc32c:
        raise CacheFormatError(
            f"{where}: the row there is not the one that was indexed; the file was replaced or "
            "its rows were moved"
        )


def _pack_tiles(tiles: TileLayout) -> bytes:
    return _TILES.pack(tiles.rows, tiles.columns, *tiles.unpadded, *(tiles.canvas or (0, 0)))


def _unpack_tiles(body: bytes, start: int, *, where: str) -> TileLayout:
    rows, columns, top, bottom, left, right, *canvas = _TILES.unpack_from(body, start)
    if min(rows, columns) < 1 or top >= bottom or left >= right or (0 in canvas and any(canvas)):
        raise CacheFormatError(
            f"{where}: {rows} x {columns} tiles, unpadded {(top, bottom, left, right)}, canvas "
            f"{tuple(canvas)} cannot be; the file is damaged"
        )
    return TileLayout(
        rows=rows,
        columns=columns,
        unpadded=(top, bottom, left, right),
        canvas=(canvas[0], canvas[1]) if any(canvas) else None,
    )


def _check_blocks(
    tokens: memoryview, crcs: NDArray[np.uint32], block: int, needed: int, where: str
) -> None:
    if len(tokens) < needed:
        raise CacheFormatError(f"{where}: {len(tokens)} bytes of tokens where {needed} are needed")
    for number in range(-(-needed // block)):
        start = number * block
        if crc32c(tokens[start : start + block]) != crcs[number]:
            raise CacheFormatError(
                f"{where}: tokens do not match their checksum in block {number} "
                f"(bytes {start} to {start + block} of the row); the file is damaged"
            )
