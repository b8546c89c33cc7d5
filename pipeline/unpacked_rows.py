"""Tokens of many rows as tensors: unpacked together, in position order."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache.row_batch import RowBatch
from pipeline.codecs import Codec
from pipeline.errors import CacheFormatError
from pipeline.types import PackedTokens


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpackedRows:
    """The tokens of B images, image after image, each in position order; N = sum of K."""

    features: Tensor  # (N, D), on the device asked for
    positions: Tensor  # (N,) int64, ascending within an image
    sizes: Tensor  # (N,) float32
    ranks: Tensor  # (N,) int64: 0 is the most important of its image
    starts: NDArray[np.int64]  # (B + 1,) where the tokens of each image begin, and N


def unpack_rows(
    codec: Codec,
    rows: RowBatch,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> UnpackedRows:
    """Unpack rows; the codes travel to the device, not the floats.

    Where the codes are in pinned memory and `device` is a GPU they travel asynchronously.

    Args:
        codec: they were packed with.
        rows: at least one.
        device: where the features are wanted; all else stays on the CPU.
        dtype: of the features.

    Raises:
        CacheFormatError: a row has positions or sizes that cannot be, or fits no such codec.
    """
    _check(rows)
    features = codec.unpack(_packed(codec, rows), device=device, dtype=dtype)
    starts = rows.starts
    image = np.repeat(np.arange(len(rows)), rows.num_tokens)
    order = np.argsort(image << 32 | rows.positions.astype(np.int64), kind="stable")
    order_N = torch.from_numpy(order)
    return UnpackedRows(
        features=features[order_N.to(features.device, non_blocking=True)],
        positions=torch.from_numpy(rows.positions[order].astype(np.int64)),
        sizes=torch.from_numpy(rows.sizes[order].astype(np.float32)),
        ranks=torch.from_numpy(order - starts[image]),
        starts=starts,
    )


def _packed(codec: Codec, rows: RowBatch) -> list[PackedTokens]:
    """Return what a codec unpacks: all rows as one image where a token needs nothing of its image.

    Then the codes are not copied, and a batch costs one call.
    """
    tokens, aux = rows.tokens.data, rows.codec_aux.data
    if not codec.whole_image:
        head, total = rows.heads[0] if rows.heads else b"", int(rows.num_tokens.sum())
        if all(other == head for other in rows.heads):
            return [PackedTokens(tokens=tokens, aux=aux, num_tokens=total, head=head)]
    width = codec.aux_bytes
    spans = zip(rows.starts[:-1].tolist(), rows.starts[1:].tolist(), strict=True)
    return [
        PackedTokens(
            tokens=tokens[start * rows.token_bytes : stop * rows.token_bytes],
            aux=aux[start * width : stop * width],
            num_tokens=stop - start,
            head=rows.heads[number] if rows.heads else b"",
        )
        for number, (start, stop) in enumerate(spans)
    ]


def _check(rows: RowBatch) -> None:
    places = rows.places
    num_places = np.prod([places.column(f"grid_{axis}") for axis in "thw"], axis=0)
    bad = rows.positions >= np.repeat(num_places, rows.num_tokens)
    bad |= ~np.isfinite(rows.sizes)
    for token in np.flatnonzero(bad)[:1].tolist():
        number = int(np.searchsorted(rows.starts, token, side="right")) - 1
        place = places.place(number)
        raise CacheFormatError(
            f"{place.path} key {place.key!r}: a token at place {rows.positions[token]} of "
            f"{num_places[number]}, or of no finite size; the row is damaged"
        )
