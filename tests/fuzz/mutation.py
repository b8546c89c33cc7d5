"""Ways to damage bytes, each decided by a random generator alone."""

import struct
from collections.abc import Callable, Sequence
from random import Random

Mutation = Callable[[bytes, Random], bytes]

_NUMBERS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 1 << 24, (1 << 31) - 1, 1 << 31)
_FORMATS = ("<B", "<H", ">H", "<I", ">I", "<Q", ">Q")


def flip_bits(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, random: Random) -> bytes:
    at, length = _span(data, random)
    fill = random.choice((b"\0" * length, b"\xff" * length, random.randbytes(length)))
    return data[:at] + fill + data[at + length :]


def truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def remove(data: bytes, random: Random) -> bytes:
    at, length = _span(data, random)
    return data[:at] + data[at + length :]


def repeat(data: bytes, random: Random) -> bytes:
    at, length = _span(data, random)
    repeated = data[at : at + length] * random.choice((1, 1, 3))
    return data[: at + length] + repeated + data[at + length :]


def insert(data: bytes, random: Random) -> bytes:
    at, length = _span(data, random)
    return data[:at] + random.randbytes(length) + data[at:]


def exchange(data: bytes, random: Random) -> bytes:
    """Let two spans of one length change places."""
    length = random.choice((1, 4, 16, 64, 512))
    if len(data) < 2 * length:
        return flip_bits(data, random)
    first = random.randrange(len(data) - 2 * length + 1)
    second = random.randrange(first + length, len(data) - length + 1)
    one, other = data[first : first + length], data[second : second + length]
    return data[:first] + other + data[first + length : second] + one + data[second + length :]


def write_number(data: bytes, random: Random) -> bytes:
    """Put a number where a length or an offset may be, or change the one there a little."""
    layout = random.choice(_FORMATS)
    size = struct.calcsize(layout)
    if len(data) < size:
        return flip_bits(data, random)
    at = random.randrange(len(data) - size + 1)
    (there,) = struct.unpack_from(layout, data, at)
    number = random.choice((*_NUMBERS, there + 1, there - 1, there * 2, len(data), (1 << 63) - 1))
    content = struct.pack(layout, number % (1 << 8 * size))
    return data[:at] + content + data[at + size :]


def damage(data: bytes, random: Random, *, others: Sequence[bytes] = ()) -> bytes:
    """Apply one to three mutations.

    Args:
        data: to be changed.
        random: decides everything.
        others: valid inputs of the same kind, of which spans may be taken.
    """
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if others and random.random() < 0.1:
            data = splice(data, random.choice(others), random)
        else:
            data = random.choice(_ALL)(data, random)
    return data


def splice(data: bytes, other: bytes, random: Random) -> bytes:
    """Put a span of another input over one of this, or its end behind the start of this."""
    if random.random() < 0.5:
        return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]
    at, length = _span(other, random)
    place = random.randrange(len(data) + 1)
    return data[:place] + other[at : at + length] + data[place + length :]


_ALL: Sequence[Mutation] = (
    *(flip_bits, flip_bits, overwrite, truncate, remove, repeat, insert, exchange),
    *(write_number, write_number),
)


def _span(data: bytes, random: Random) -> tuple[int, int]:
    """Return the start of a span and its length, short ones being more likely."""
    if not data:
        return 0, 0
    at = random.randrange(len(data))
    return at, min(len(data) - at, random.choice((1, 1, 2, 4, 8, 16, 64, 300, 1024)))
