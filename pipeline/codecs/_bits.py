"""Codes of 1, 2, 3, 4, 6 or 8 bits in whole bytes, token by token.

Codes of 1, 2 and 4 bits fill a token's bytes from the low bits up: with n = 8 / bits codes a byte
and B = ceil(D / n) bytes, byte j holds code j in its lowest bits, then code j + B, j + 2 B, and so
on, so that every step of packing and unpacking is one long contiguous one. Places past D hold 0.
Codes of 3 and 6 bits are stored as their low two bits, then the others.

D features; K tokens; B bytes of a token.
"""

import torch
from torch import Tensor

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (2, 4), 8: (8,)}
"""Bits that are packed together, low ones first, by the bits of a code."""


def packed_bytes(width: int, bits: int) -> int:
    """Return the bytes that `width` codes of `bits` bits take."""
    return sum(-(-width * plane // 8) for plane in _PLANES[bits])


def pack_codes(codes_KD: Tensor, bits: int) -> Tensor:
    """Return (K, B) bytes.

    Args:
        codes_KD: (K, D) uint8, each below 2^bits.
        bits: a key of the table above.
    """
    shift, planes = 0, []
    for plane in _PLANES[bits]:
        planes.append(_pack_plane((codes_KD >> shift) & ((1 << plane) - 1), plane))
        shift += plane
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=1)


def unpack_codes(bytes_KB: Tensor, bits: int, *, width: int) -> Tensor:
    """Return the (K, D) uint8 codes of tokens of `width` features."""
    codes_KD, start, shift = None, 0, 0
    for plane in _PLANES[bits]:
        stop = start + packed_bytes(width, plane)
        part_KD = _unpack_plane(bytes_KB[:, start:stop], plane, width) << shift
        codes_KD = part_KD if codes_KD is None else codes_KD | part_KD
        start, shift = stop, shift + plane
    if codes_KD is None:
        raise AssertionError("every number of bits has a plane")
    return codes_KD


def _pack_plane(codes_KD: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    count, width = codes_KD.shape
    size = -(-width // per_byte)
    filled_KD = torch.nn.functional.pad(codes_KD, (0, size * per_byte - width))
    parts = filled_KD.reshape(count, per_byte, size)
    packed_KB = parts[:, 0].clone()
    for place in range(1, per_byte):
        packed_KB |= parts[:, place] << (bits * place)
    return packed_KB


def _unpack_plane(bytes_KB: Tensor, bits: int, width: int) -> Tensor:
    if bits == 8:
        return bytes_KB
    mask = (1 << bits) - 1
    parts = [(bytes_KB >> shift) & mask for shift in range(0, 8, bits)]
    return torch.cat(parts, dim=1)[:, :width]
