"""The bytes of one row: any prefix can be read and is checked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache import row
from pipeline.errors import CacheFormatError

TOKEN_BYTES, CODEC_AUX = 24, 4


def packed(num_tokens: int) -> tuple[bytes, bytes, bytes]:
    generator = np.random.default_rng(num_tokens)
    tokens = generator.bytes(num_tokens * TOKEN_BYTES)
    codec_aux = generator.bytes(num_tokens * CODEC_AUX)
    aux = row.pack_aux(
        tokens,
        codec_aux,
        positions=np.arange(num_tokens, dtype=np.uint32)[::-1],
        sizes=np.ones(num_tokens, np.float32),
    )
    return tokens, codec_aux, aux


@given(num_tokens=st.integers(1, 100), keep=st.integers(1, 120))
def test_a_prefix_needs_only_its_blocks_and_equals_the_start_of_the_row(
    num_tokens: int, keep: int
) -> None:
    tokens, codec_aux, aux = packed(num_tokens)
    fetched = row.prefix_bytes(len(tokens), num_tokens=num_tokens, keep_tokens=keep)

    stored = row.unpack_row(
        tokens[:fetched], aux, tokens_length=len(tokens), keep_tokens=keep, where="here"
    )

    kept = min(keep, num_tokens)
    assert stored.num_tokens == kept
    assert stored.tokens == tokens[: kept * TOKEN_BYTES]
    assert stored.codec_aux == codec_aux[: kept * CODEC_AUX]
    assert stored.positions.tolist() == list(range(num_tokens))[::-1][:kept]
    assert fetched <= (kept + row.BLOCK_TOKENS - 1) * TOKEN_BYTES


@given(data=st.data())
def test_any_changed_byte_is_noticed(data: st.DataObject) -> None:
    tokens, _, aux = packed(40)
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


@pytest.mark.parametrize("length", [0, 3, 11, 50])
def test_a_cut_aux_is_refused(length: int) -> None:
    tokens, _, aux = packed(40)

    with pytest.raises(CacheFormatError, match="damaged"):
        row.unpack_row(tokens, aux[:length], tokens_length=len(tokens), where="here")


def test_too_few_token_bytes_are_refused() -> None:
    tokens, _, aux = packed(40)

    with pytest.raises(CacheFormatError, match="are needed"):
        row.unpack_row(tokens[:-1], aux, tokens_length=len(tokens), where="here")
