"""Carved tokens on the way a cache takes them: packed, laid out as a row, read and unpacked."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.cache import row
from pipeline.cache.places import Places
from pipeline.cache.row_batch import of_stored
from pipeline.cache.row_place import RowPlace
from pipeline.carved_cache import CachedImage, unpack_images
from pipeline.codecs import Codec
from pipeline.types import CarvedTokens


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRow:
    """The bytes of one image as a part of a cache holds them."""

    tokens: bytes
    aux: bytes
    num_tokens: int
    num_source: int  # tokens before carving

    def tokens_read(self, keep_tokens: int) -> int:
        """Return the bytes of `tokens` that a reader fetches for the first tokens."""
        return row.prefix_bytes(
            len(self.tokens), num_tokens=self.num_tokens, keep_tokens=keep_tokens
        )

    def bytes_read(self, keep_tokens: int) -> int:
        """Return the bytes that a reader fetches: whole checksum blocks of tokens, and aux."""
        return self.tokens_read(keep_tokens) + len(self.aux)


def store(carved: CarvedTokens, codec: Codec, *, num_source: int) -> StoredRow:
    """Pack the tokens of one image as a carving run does, most important first.

    Args:
        carved: what a carver left.
        codec: packs it.
        num_source: tokens of the image before carving.

    Raises:
        NonFiniteError: a value does not fit the codec's type.
    """
    order = np.argsort(carved.ranks.cpu().numpy(), kind="stable")
    by_rank = torch.from_numpy(order)
    packed = codec.pack(carved.features[by_rank.to(carved.features.device)])
    aux = row.pack_aux(
        packed,
        positions=carved.positions.cpu().numpy()[order].astype(np.uint32),
        sizes=carved.sizes.cpu().numpy()[order].astype(np.float32),
    )
    return StoredRow(
        tokens=bytes(packed.tokens), aux=aux, num_tokens=packed.num_tokens, num_source=num_source
    )


def read_back(
    rows: Sequence[StoredRow],
    codec: Codec,
    *,
    keep_tokens: Sequence[int],
    device: torch.device | str,
    dtype: torch.dtype,
) -> list[CachedImage]:
    """Return what a reader of a cache gets of the first tokens of each row, in position order.

    Args:
        rows: of images of one width.
        codec: they were packed with.
        keep_tokens: of each row how many tokens are wanted, at least 1.
        device: where the features are wanted.
        dtype: of the features.
    """
    stored = [
        row.unpack_row(
            one.tokens[: one.tokens_read(keep)],
            one.aux,
            tokens_length=len(one.tokens),
            keep_tokens=keep,
            where="evaluation",
        )
        for one, keep in zip(rows, keep_tokens, strict=True)
    ]
    batch = of_stored(Places.of([_place(one) for one in rows]), stored)
    return unpack_images(codec, batch, device=device, dtype=dtype)


def _place(stored: StoredRow) -> RowPlace:
    """Return where a row that is in no file lies; of the grid only its size is of use here."""
    return RowPlace(
        key="",
        path="",
        row_group=0,
        row=0,
        num_tokens=stored.num_tokens,
        grid_t=1,
        grid_h=1,
        grid_w=stored.num_source,
        width=0,
        height=0,
        tokens_offset=0,
        tokens_length=len(stored.tokens),
        aux_offset=0,
        aux_length=len(stored.aux),
    )
