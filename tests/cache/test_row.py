"""The bytes of one row: any prefix can be read and is checked."""

import struct

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache import row
from pipeline.errors import CacheFormatError
from pipeline.types import PackedTokens, TileLayout

TOKEN_BYTES, CODEC_AUX = 24, 4


TILES = TileLayout(rows=2, columns=3, unpadded=(1, 7, 0, 12))
RESAMPLED = TileLayout(rows=6, columns=1, unpadded=(0, 24, 0, 4), canvas=(9, 2))


def packed(
    num_tokens: int, head: bytes = b"", tiles: TileLayout | None = None
) -> tuple[bytes, bytes, bytes]:
    generator = np.random.default_rng(num_tokens)
    tokens = generator.bytes(num_tokens * TOKEN_BYTES)
    codec_aux = generator.bytes(num_tokens * CODEC_AUX)
    packed_tokens = PackedTokens(tokens=tokens, aux=codec_aux, num_tokens=num_tokens, head=head)
    aux = row.pack_aux(
        packed_tokens,
        positions=np.arange(num_tokens, dtype=np.uint32)[::-1],
        sizes=np.ones(num_tokens, np.float32),
        tiles=tiles,
    )
    return tokens, codec_aux, aux


@given(
    num_tokens=st.integers(1, 100),
    keep=st.integers(1, 120),
    head=st.binary(max_size=70),
    tiles=st.sampled_from([None, TILES, RESAMPLED]),
)
def test_a_prefix_needs_only_its_blocks_and_equals_the_start_of_the_row(
    num_tokens: int, keep: int, head: bytes, tiles: TileLayout | None
) -> None:
    tokens, codec_aux, aux = packed(num_tokens, head, tiles)
    fetched = row.prefix_bytes(len(tokens), num_tokens=num_tokens, keep_tokens=keep)

    stored = row.unpack_row(
        tokens[:fetched], aux, tokens_length=len(tokens), keep_tokens=keep, where="here"
    )

    kept = min(keep, num_tokens)
    assert stored.num_tokens == kept
    assert stored.head == head
    assert stored.tiles == tiles
    assert stored.tokens == tokens[: kept * TOKEN_BYTES]
    assert stored.codec_aux == codec_aux[: kept * CODEC_AUX]
    assert stored.positions.tolist() == list(range(num_tokens))[::-1][:kept]
    assert fetched <= (kept + row.BLOCK_TOKENS - 1) * TOKEN_BYTES


@given(
    data=st.data(),
    head=st.sampled_from([b"", b"h" * 37]),
    tiles=st.sampled_from([None, RESAMPLED]),
)
def test_any_changed_byte_is_noticed(
    data: st.DataObject, head: bytes, tiles: TileLayout | None
) -> None:
    tokens, _, aux = packed(40, head, tiles)
    content = bytearray(tokens + aux)
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    changed = bytes(content)

    with pytest.raises(CacheFormatError, match="here"):
        row.unpack_row(
            changed[: len(tokens)], changed[len(tokens) :], tokens_length=len(tokens), where="here"
        )


def test_damage_behind_the_prefix_does_not_matter_to_it() -> None:
    tokens, _, aux = packed(40)
    damaged = tokens[:-1] + bytes([tokens[-1] ^ 1])

    stored = row.unpack_row(damaged, aux, tokens_length=len(tokens), keep_tokens=16, where="here")

    assert stored.tokens == tokens[: 16 * TOKEN_BYTES]


def test_a_row_without_a_head_keeps_the_first_layout_and_its_bytes() -> None:
    tokens, codec_aux, aux = packed(3)

    body = struct.pack("<BBHI3I3f", 1, CODEC_AUX, 16, 3, 2, 1, 0, 1, 1, 1) + codec_aux
    body += struct.pack("<I", google_crc32c.value(tokens))
    assert aux == body + struct.pack("<I", google_crc32c.value(body))


def test_a_head_stands_with_its_length_before_the_positions() -> None:
    tokens, codec_aux, aux = packed(3, b"head!")

    body = struct.pack("<BBHII5s3I3f", 2, CODEC_AUX, 16, 3, 5, b"head!", 2, 1, 0, 1, 1, 1)
    body += codec_aux + struct.pack("<I", google_crc32c.value(tokens))
    assert aux == body + struct.pack("<I", google_crc32c.value(body))


def test_tiles_stand_before_the_head() -> None:
    tokens, codec_aux, aux = packed(3, b"head!", RESAMPLED)

    body = struct.pack("<BBHI8I", 3, CODEC_AUX, 16, 3, 6, 1, 0, 24, 0, 4, 9, 2)
    body += struct.pack("<I5s3I3f", 5, b"head!", 2, 1, 0, 1, 1, 1) + codec_aux
    body += struct.pack("<I", google_crc32c.value(tokens))
    assert aux == body + struct.pack("<I", google_crc32c.value(body))


@pytest.mark.parametrize("changed", [(0, 3, 1, 7, 0, 12, 0, 0), (2, 3, 7, 7, 0, 12, 0, 0)])
def test_tiles_that_cannot_be_are_refused_even_with_their_checksum(changed: tuple[int]) -> None:
    tokens, _, aux = packed(3, tiles=TILES)
    body = aux[:8] + struct.pack("<8I", *changed) + aux[40:-4]

    with pytest.raises(CacheFormatError, match=r"here: .* cannot be"):
        row.unpack_row(
            tokens,
            body + struct.pack("<I", google_crc32c.value(body)),
            tokens_length=len(tokens),
            where="here",
        )


@pytest.mark.parametrize(
    ("layout", "head_length"), [(2, 36), (2, 38), (2, 2**32 - 1), (1, 37), (4, 37), (0, 37)]
)
def test_a_head_of_another_length_or_layout_is_refused_even_with_its_checksum(
    layout: int, head_length: int
) -> None:
    tokens, _, aux = packed(40, b"h" * 37)
    body = struct.pack("<BB", layout, CODEC_AUX) + aux[2:8] + struct.pack("<I", head_length)
    body += aux[12:-4]
    changed = body + struct.pack("<I", google_crc32c.value(body))

    with pytest.raises(CacheFormatError, match=f"aux layout {layout} .* is not known; a newer"):
        row.unpack_row(tokens, changed, tokens_length=len(tokens), where="here")


@pytest.mark.parametrize("length", [8, 11])
def test_an_aux_that_ends_in_the_length_of_its_head_is_refused(length: int) -> None:
    body = packed(40, b"h" * 37)[2][:length]

    with pytest.raises(CacheFormatError, match="aux layout 2"):
        row.unpack_row(
            b"", body + struct.pack("<I", google_crc32c.value(body)), tokens_length=0, where="here"
        )


@pytest.mark.parametrize("length", [0, 3, 11, 50])
def test_a_cut_aux_is_refused(length: int) -> None:
    tokens, _, aux = packed(40)

    with pytest.raises(CacheFormatError, match="damaged"):
        row.unpack_row(tokens, aux[:length], tokens_length=len(tokens), where="here")


def test_too_few_token_bytes_are_refused() -> None:
    tokens, _, aux = packed(40)

    with pytest.raises(CacheFormatError, match="are needed"):
        row.unpack_row(tokens[:-1], aux, tokens_length=len(tokens), where="here")
