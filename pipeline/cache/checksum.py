"""CRC-32C (Castagnoli, RFC 3720 appendix B.4), the checksum of all bytes in a cache."""

from functools import lru_cache

import numpy as np
from fastcrc import crc32
from numpy.typing import NDArray

Sums = NDArray[np.uint32]
Numbers = NDArray[np.int64]

_GROUP = 64  # blocks that are put together at once: their tables fit into a processor's cache


def crc32c(data: bytes | bytearray | memoryview, before: int = 0) -> int:
    """Return the checksum of some bytes, or of all bytes where `before` is that of those before."""
    return int(crc32.iscsi(data, before))


def joined_crc32c(sums: Sums, counts: Numbers, *, block_bytes: int, last_bytes: Numbers) -> Sums:
    """Return the checksums of R > 0 runs of blocks from those of the blocks, without the bytes.

    A checksum is linear over GF(2): that of a run is the sum of its blocks' checksums, each
    carried over the bytes behind it. What carrying does is a table for each byte of a checksum.

    Args:
        sums: (sum of counts,) of all blocks, run after run.
        counts: (R,) blocks of each run, at least 1.
        block_bytes: of every block but the last of a run.
        last_bytes: (R,) of that.
    """
    ends = np.cumsum(counts)
    most = int(counts.max(initial=1)) - 1
    back = np.arange(-most, 0) + counts[:, None] - 1  # below 0: before the first of a run
    numbers = (ends - counts)[:, None] + np.maximum(back, 0)
    before = _joined(np.where(back >= 0, sums[numbers], np.uint32(0)), block_bytes)
    lengths, kinds = np.unique(last_bytes, return_inverse=True)
    tables = np.concatenate([_carrying(length) for length in lengths.tolist()])
    return _sum(tables, before, 4 * kinds[:, None] + np.arange(4)) ^ sums[ends - 1]


def _joined(sums: Sums, block_bytes: int) -> Sums:
    """Return the checksums of (R, N) blocks of one length; 0 where a run has no block yet."""
    count = sums.shape[1]
    if count <= _GROUP:
        return _sum(_carried(block_bytes)[4 * (_GROUP - count) :], sums, np.arange(4 * count))
    groups = -(-count // _GROUP)
    padded = np.zeros((len(sums), groups * _GROUP), np.uint32)
    padded[:, padded.shape[1] - count :] = sums
    grouped = _joined(padded.reshape(-1, _GROUP), block_bytes)
    return _joined(grouped.reshape(-1, groups), block_bytes * _GROUP)


def _sum(tables: Sums, sums: Sums, numbers: Numbers) -> Sums:
    """Look up each byte of R runs of checksums, and return the sum of what was found for each run.

    Args:
        tables: (T, 256).
        sums: (R,) or (R, N).
        numbers: (4 N,) or (R, 4 N), which table is for each byte; the lowest of a checksum first.
    """
    octets = np.ascontiguousarray(sums, "<u4").view(np.uint8).reshape(len(sums), -1)
    found = tables.reshape(-1).take(octets + 256 * numbers)
    added: Sums = np.bitwise_xor.reduce(found, axis=1)
    return added


@lru_cache(maxsize=256)
def _carrying(num_bytes: int) -> Sums:
    """Return (4, 256): what each byte of a checksum becomes by carrying it over so many bytes."""
    zeros = bytes(num_bytes)
    none = crc32c(zeros)
    bits = np.array([crc32c(zeros, 1 << bit) ^ none for bit in range(32)], np.uint32)
    table = np.zeros((4, 256), np.uint32)
    for bit in range(8):
        table[:, 1 << bit : 2 << bit] = table[:, : 1 << bit] ^ bits[bit::8, None]
    return table


@lru_cache(maxsize=32)
def _carried(block_bytes: int) -> Sums:
    """Return (4 * `_GROUP`, 256): the same over 63 blocks, then 62, down to none."""
    once = _carrying(block_bytes)
    tables = np.empty((_GROUP, 4, 256), np.uint32)
    tables[-1] = np.arange(256, dtype=np.uint32) << 8 * np.arange(4, dtype=np.uint32)[:, None]
    for number in range(_GROUP - 2, -1, -1):
        behind = tables[number + 1].reshape(-1)
        tables[number] = _sum(once, behind, np.arange(4)).reshape(4, 256)
    return tables.reshape(-1, 256)
