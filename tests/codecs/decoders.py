"""Readers of every codec in NumPy alone, written from docs/cache_format.md."""

import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.types import PackedTokens

Options = Mapping[str, Any]
Values = NDArray[np.float32]

PLANES = {2: [2], 3: [2, 1], 4: [4], 6: [2, 4], 8: [8]}
LEVELS = {
    "int2": [-10, -3, 3, 10],
    "int3": [-88, -55, -31, -10, 10, 31, 55, 88],
    "int4": [-104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104],
}


def read_codes(rows: NDArray[np.uint8], bits: int, width: int) -> NDArray[np.uint8]:
    """Unpack (K, T) bytes to (K, width) codes, code by code as the page describes it."""
    codes = np.zeros((len(rows), width), np.uint8)
    start = shift = 0
    for plane in PLANES[bits]:
        per_byte = 8 // plane
        size = -(-width // per_byte)
        for code in range(width):
            slot, byte = divmod(code, size)
            taken = rows[:, start + byte] >> (plane * slot) & (2**plane - 1)
            codes[:, code] |= taken << shift
        start, shift = start + size, shift + plane
    assert start == rows.shape[1]
    return codes


def numbers(content: bytes, name: str) -> Values:
    """Read floats; NumPy has no bfloat16, whose bits are the upper half of a float32."""
    if name == "bfloat16":
        return (np.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(content, {"float16": "<f2", "float32": "<f4"}[name]).astype(np.float32)


def token_rows(packed: PackedTokens) -> NDArray[np.uint8]:
    return np.frombuffer(packed.tokens, np.uint8).reshape(packed.num_tokens, -1)


def random_signs(seed: int, width: int) -> NDArray[np.int64]:
    mask, signs = 2**64 - 1, []
    for place in range(1, width + 1):
        z = (seed + place * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        signs.append(-1 if (z ^ (z >> 31)) >> 63 else 1)
    return np.array(signs)


def mix(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Multiply each run of b whole numbers by Sylvester's matrix."""
    block = min(codes.shape[1] & -codes.shape[1], 1024)
    places = np.arange(block)
    ones = np.array([bin(n).count("1") for n in range(block)])
    matrix = 1 - 2 * (ones[places[:, None] & places] & 1)
    return (codes.reshape(-1, block) @ matrix).reshape(codes.shape)


def rotated(packed: PackedTokens, levels: NDArray[np.int64], options: Options) -> Values:
    scale = np.frombuffer(packed.aux, "<f4")[:, None]
    turned = mix(levels) * random_signs(options.get("seed", 0), levels.shape[1])
    return np.where(scale > 0, turned, levels).astype(np.float32) * np.abs(scale)


def int8(packed: PackedTokens, options: Options) -> Values:
    return rotated(packed, token_rows(packed).view(np.int8).astype(np.int64), options)


def few_bits(name: str) -> Callable[[PackedTokens, Options], Values]:
    def read(packed: PackedTokens, options: Options) -> Values:
        bits = int(name[-1])
        rows = token_rows(packed)
        filled = rows.shape[1] * 8 // bits
        width = filled - (packed.head[0] if packed.head else 0)
        levels = np.array(LEVELS[name])[read_codes(rows, bits, filled)][:, :width]
        return rotated(packed, levels, options)

    return read


def affine(codes: NDArray[np.uint8], packed: PackedTokens, scale: Values) -> Values:
    beside = np.frombuffer(packed.aux, "<f4").reshape(-1, 2)
    return (codes.astype(np.float32) * beside[:, 1:] + beside[:, :1]) * scale


def channel(bits: int) -> Callable[[PackedTokens, Options], Values]:
    def read(packed: PackedTokens, options: Options) -> Values:
        scale = numbers(packed.head, options.get("scales", "bfloat16"))
        return affine(read_codes(token_rows(packed), bits, len(scale)), packed, scale)

    return read


def mixed(packed: PackedTokens, options: Options) -> Values:
    kind = options.get("scales", "bfloat16")
    low_bits, high_bits = options.get("low_bits", 2), options.get("high_bits", 4)
    width, important = struct.unpack_from("<II", packed.head)
    stop = 8 + width * (2 if kind == "bfloat16" else 4)
    codes = read_codes(token_rows(packed), low_bits, width)
    here = min(important, packed.num_tokens)
    if here:
        extra = np.frombuffer(packed.head[stop:], np.uint8).reshape(important, -1)[:here]
        codes[:here] |= read_codes(extra, high_bits - low_bits, width) << low_bits
    return affine(codes, packed, numbers(packed.head[8:stop], kind))


def gear(packed: PackedTokens, options: Options) -> Values:
    kind, bits = options.get("numbers", "float16"), options.get("bits", 4)
    group, rank = options.get("group", 64), options.get("rank", 4)
    size = 2 if kind == "float16" else 4
    (width,) = struct.unpack_from("<I", packed.head)
    right = numbers(packed.head[4:], kind).reshape(rank, width)
    groups, outliers = -(-width // group), 2 * int(width * options.get("outlier_share", 0.02) / 2)
    lengths = [-(-width * bits // 8), groups * size, groups * size]
    lengths += [2 * outliers, size * outliers, size * rank]
    values = np.empty((packed.num_tokens, width), np.float32)
    for token, row in enumerate(token_rows(packed)):
        parts = np.split(row, np.cumsum(lengths))
        assert len(parts.pop()) == 0
        codes = read_codes(parts[0][None], bits, width)[0].astype(np.float32)
        minimum, step, stored, left = (
            numbers(part.tobytes(), kind) for part in (parts[1], parts[2], parts[4], parts[5])
        )
        of = np.arange(width) // group
        values[token] = codes * step[of] + minimum[of]
        values[token, np.frombuffer(parts[3].tobytes(), "<u2")] = stored
        for place in range(rank):
            values[token] += left[place] * right[place]
    return values


def floats(name: str) -> Callable[[PackedTokens, Options], Values]:
    return lambda packed, _: numbers(packed.tokens, name).reshape(packed.num_tokens, -1)


READERS: Mapping[str, Callable[[PackedTokens, Options], Values]] = {
    "fp32": floats("float32"),
    "bf16": floats("bfloat16"),
    "fp16": floats("float16"),
    "int8": int8,
    "int4": few_bits("int4"),
    "int3": few_bits("int3"),
    "int2": few_bits("int2"),
    "int8_channel": channel(8),
    "int4_channel": channel(4),
    "mixed": mixed,
    "gear": gear,
}
