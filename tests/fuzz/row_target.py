"""Rows of every codec: damaged by accident, or with their checksums made anew."""

import struct
from random import Random

import google_crc32c
import numpy as np

from pipeline import codecs
from pipeline.cache import row
from pipeline.cache.places import Places
from pipeline.cache.row_batch import of_stored
from pipeline.cache.row_place import RowPlace
from pipeline.carved_cache import unpack_images
from pipeline.types import TileLayout
from tests.cache.rows import (
    features,
)
from tests.fuzz.cache_target import expect
from tests.fuzz.mutation import damage
from tests.fuzz.target import Target

CODECS = (
    *("bf16", "fp16", "fp32", "int8", "int4", "int3", "int2"),
    *("int8_channel", "int4_channel", "mixed", "gear"),
)

TILES = TileLayout(rows=2, columns=1, unpadded=(0, 2, 0, 1), canvas=(3, 2))


class RowTarget(Target):
    """Rows of every codec, their aux damaged: as found, or with its checksums made anew."""

    name = "row"

    def __init__(self) -> None:
        self.rows = []
        for name in CODECS:
            codec = codecs.build(name)
            for count in (1, 16, 37):
                packed = codec.pack(features(count, num_tokens=count, width=48))
                aux = row.pack_aux(
                    packed,
                    positions=np.arange(count, dtype=np.uint32),
                    sizes=np.ones(count, np.float32),
                    tiles=TILES if count == 16 else None,
                )
                self.rows.append((codec, count, packed.tokens, aux))

    def mutated(self, random: Random) -> tuple:
        codec, count, tokens, aux = random.choice(self.rows)
        others = [r[3] for r in self.rows]
        if random.random() < 0.5:
            changed = bytearray(damage(aux, random, others=others))
            if random.random() < 0.3:
                tokens = damage(tokens, random)
            keep = random.choice((None, 1, 16, 40))
            return codec, count, tokens, bytes(changed), aux, keep
        body = damage(aux[:-4], random, others=others)
        if random.random() < 0.5:  # only behind the header, so that the lengths fit
            size = min(len(aux) - 4, 8 + random.choice((4, 60, 200)))
            body = aux[:8] + random.randbytes(size - 8) + aux[size:-4]
        body = _with_block_checksums(body, tokens)
        sealed = body + struct.pack("<I", google_crc32c.value(body))
        return codec, count, tokens, sealed, sealed, random.choice((None, 1, 16, 40))

    def check(self, made: tuple) -> str:
        codec, count, tokens, changed, aux, keep = made
        stored = row.unpack_row(
            tokens, changed, tokens_length=len(tokens), keep_tokens=keep, where="row"
        )
        row.check_is_indexed(
            changed, num_tokens=count, aux_crc32c=row.aux_checksum(aux), where="row"
        )
        place = RowPlace(
            **{"key": "k", "path": "p", "row_group": 0, "row": 0, "num_tokens": count},
            **{"grid_t": 1, "grid_h": 10, "grid_w": 10, "width": 9, "height": 9},
            **{"tokens_offset": 4, "tokens_length": len(tokens)},
            **{"aux_offset": 4, "aux_length": len(aux)},
        )
        (image,) = unpack_images(codec, of_stored(Places.of([place]), [stored]))
        kept = count if keep is None else min(keep, count)
        expect(image.features.shape[0] == len(image.positions) == kept, "number of tokens")
        expect(image.features.numel() < 1 << 20, f"features of {tuple(image.features.shape)}")
        expect(bool((image.positions < 100).all()), "a position outside the grid")
        return "read"


def _with_block_checksums(body: bytes, tokens: bytes) -> bytes:
    """Make the checksums of the tokens anew, at the end of aux, for blocks of 16 tokens."""
    if len(body) < 12:
        return body
    (count,) = struct.unpack_from("<I", body, 4)
    if not 0 < count <= 64 or len(tokens) % count:
        return body
    block = 16 * (len(tokens) // count)
    sums = b"".join(
        struct.pack("<I", google_crc32c.value(tokens[at : at + block]))
        for at in range(0, len(tokens), block)
    )
    return body[: -len(sums)] + sums if block else body
