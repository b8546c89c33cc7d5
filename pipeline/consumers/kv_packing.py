"""Prefixes as bytes: every layer's keys, and its values, as one codec call each.

What is packed are the image's tokens and the fixed text behind it. The text before it is the same
for every image: `text_states` makes its keys and values anew, in full precision. So they take no
room, and the first token of a prompt, whose states are unlike all others' (an attention sink: Xiao
et al., arXiv 2309.17453), costs the image's tokens no bits.

M = 2 L matrices, in the order keys of layer 0, values of layer 0, keys of layer 1, ...; each has a
row of D = h d numbers, heads one after the other, for each of N packed tokens. Packed tokens stand
in the order that the codecs ask for, most important first: the text, then the image's by rank. Of
each, `tokens` holds for every matrix the codes and what the codec keeps beside them; `head` holds
for every matrix a uint32 length and the codec's own head of this length, little-endian.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.codecs import Codec
from pipeline.consumers.kv_prefix import FixedPrompt, KeyValues, KVPrefix
from pipeline.errors import CacheFormatError
from pipeline.types import PackedTokens, Placement

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedPrefix:
    """A prefix without the text before its image, most important token first."""

    packed: PackedTokens  # N tokens of M packed rows each; nothing in `aux`
    positions: NDArray[np.uint32]  # (N,)
    sizes: NDArray[np.float32]  # (N,)
    end: int  # position of what stands behind


def pack_prefix(prefix: KVPrefix, codec: Codec) -> PackedPrefix:
    """Pack what a decoder remembers of an image, and of the fixed text behind it.

    Args:
        prefix: of T tokens, P of them text before the image.
        codec: packs each of the M matrices (N, D) for itself, N = T - P.

    Raises:
        NonFiniteError: a value is NaN or infinite, or does not fit the codec's type.
    """
    first, after = len(prefix.prompt.before), len(prefix.prompt.after)
    image_K = prefix.ranks.argsort()
    order_N = torch.cat([torch.arange(after) + len(image_K), image_K])
    both = torch.stack([prefix.states.keys, prefix.states.values], dim=1)  # (L, 2, h, T, d)
    rows = both[:, :, :, first:].transpose(2, 3)  # (L, 2, N, h, d)
    rows_MND = rows.reshape(-1, len(order_N), rows.shape[3] * rows.shape[4])
    packed = [codec.pack(rows_ND) for rows_ND in rows_MND[:, order_N.to(rows.device)].cpu()]
    columns = [part for matrix in packed for part in (matrix.tokens, matrix.aux) if part]
    table = [np.frombuffer(part, np.uint8).reshape(len(order_N), -1) for part in columns]
    return PackedPrefix(
        packed=PackedTokens(
            tokens=np.concatenate(table, axis=1).tobytes(),
            aux=b"",
            num_tokens=len(order_N),
            head=b"".join(_LENGTH.pack(len(matrix.head)) + matrix.head for matrix in packed),
        ),
        positions=prefix.positions[first:][order_N].numpy().astype(np.uint32),
        sizes=prefix.sizes[first:][order_N].numpy().astype(np.float32),
        end=prefix.end,
    )


def unpack_prefixes(
    stored: Sequence[PackedPrefix],
    codec: Codec,
    *,
    prompt: FixedPrompt,
    placement: Placement,
    text: KeyValues,
) -> list[KVPrefix]:
    """Unpack several prefixes at once, on the device and in the type of the text's states.

    Args:
        stored: what `pack_prefix` gave, whole; not only its first tokens, because the states of
            the others were made with all of them in sight.
        codec: they were packed with.
        prompt: they were made with.
        placement: likewise.
        text: what the model remembers of the text before the image; of `text_states`.

    Raises:
        CacheFormatError: the bytes are not what the codec packs of such a model.
    """
    if not stored:
        return []
    layers, heads, _, head_width = text.keys.shape
    width = heads * head_width
    matrices = [m for one in stored for m in _matrices(one.packed, codec, 2 * layers, width)]
    rows = codec.unpack(matrices, device=text.keys.device, dtype=text.keys.dtype)
    if rows.shape[1] != width:
        raise CacheFormatError(
            f"packed rows are {rows.shape[1]} wide, expected {width} ({heads} heads of "
            f"{head_width}); they are damaged or of another model"
        )
    parts = torch.split(rows, [2 * layers * one.packed.num_tokens for one in stored])
    prefixes = []
    for one, part in zip(stored, parts, strict=True):
        positions_N = torch.from_numpy(one.positions.astype(np.int64))
        order_N = positions_N.argsort()
        sizes_N = torch.from_numpy(one.sizes.astype(np.float32))[order_N]
        before, after = len(prompt.before), len(prompt.after)
        prefixes.append(
            KVPrefix(
                prompt=prompt,
                placement=placement,
                states=_behind(text, part.view(layers, 2, -1, heads, head_width), order_N),
                positions=torch.cat([torch.arange(before), positions_N[order_N]]),
                sizes=torch.cat([torch.ones(before), sizes_N]),
                # Stored behind the text; the first of them is the most important.
                ranks=order_N[: len(order_N) - after] - after,
                end=one.end,
            )
        )
    return prefixes


def _behind(text: KeyValues, rows_L2Nhd: Tensor, order_N: Tensor) -> KeyValues:
    """Return the text's states, and behind them the stored ones in the order given."""
    ordered = rows_L2Nhd[:, :, order_N.to(rows_L2Nhd.device)].transpose(2, 3)
    keys, values = ordered.unbind(dim=1)
    return KeyValues(
        keys=torch.cat([text.keys, keys], dim=2), values=torch.cat([text.values, values], dim=2)
    )


def _matrices(packed: PackedTokens, codec: Codec, count: int, width: int) -> list[PackedTokens]:
    """Return the M matrices of a prefix as the codec packed them."""
    heads = _heads(packed.head, count)
    sizes = [codec.token_bytes(width), codec.aux_bytes] * count
    if packed.num_tokens < 1 or len(packed.tokens) != packed.num_tokens * sum(sizes):
        raise CacheFormatError(
            f"{len(packed.tokens)} bytes for {packed.num_tokens} tokens of {count} matrices, "
            f"expected {packed.num_tokens * sum(sizes)}; they are damaged or of another codec or "
            "model"
        )
    rows = np.frombuffer(packed.tokens, np.uint8).reshape(packed.num_tokens, -1)
    parts = [part.tobytes() for part in np.split(rows, np.cumsum(sizes)[:-1], axis=1)]
    return [
        PackedTokens(tokens=tokens, aux=aux, num_tokens=packed.num_tokens, head=head)
        for tokens, aux, head in zip(parts[::2], parts[1::2], heads, strict=True)
    ]


def _heads(head: bytes, count: int) -> list[bytes]:
    """Return the codec's heads of the matrices."""
    heads, start = [], 0
    while start + _LENGTH.size <= len(head):
        (length,) = _LENGTH.unpack_from(head, start)
        start += _LENGTH.size
        heads.append(head[start : start + length])
        start += length
    if len(heads) != count or start != len(head):
        raise CacheFormatError(
            f"a head of {len(head)} bytes holds {len(heads)} heads of matrices, expected {count}; "
            "it is damaged or of another model"
        )
    return heads
