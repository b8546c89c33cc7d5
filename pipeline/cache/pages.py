"""Byte offsets of values in a Parquet column chunk whose pages hold one row each.

pyarrow writes such pages but has no call that tells where they lie, so the page headers are
walked: a header is a Thrift compact-protocol struct (apache/parquet-format, `PageHeader`).
"""

from collections.abc import Iterator
from mmap import mmap

from pipeline.errors import CacheFormatError

_COMPRESSED_PAGE_SIZE = 3  # field id in PageHeader
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12


def byte_array_offsets(file: mmap, start: int, num_rows: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of each value of a required, PLAIN, uncompressed BYTE_ARRAY column.

    Args:
        file: the whole Parquet file.
        start: where the column chunk's first data page begins.
        num_rows: pages to walk, one row each.

    Raises:
        CacheFormatError: a page does not hold exactly one value.
    """
    place = start
    for row in range(num_rows):
        data, page_size = _page_header(file, place)
        length = int.from_bytes(file[data : data + 4], "little")
        if length + 4 != page_size:
            raise CacheFormatError(
                f"page at byte {place} (row {row}) has {page_size} bytes, not one value of {length}"
            )
        yield data + 4, length
        place = data + page_size


def _page_header(file: mmap, place: int) -> tuple[int, int]:
    """Return where the page's data begins and how many bytes it has."""
    page_size = 0
    field = 0
    while True:
        byte = file[place]
        place += 1
        if byte == _STOP:
            return place, page_size
        kind, delta = byte & 0x0F, byte >> 4
        if delta:
            field += delta
        else:
            raw, place = _varint(file, place)
            field = (raw >> 1) ^ -(raw & 1)
        if field == _COMPRESSED_PAGE_SIZE:
            raw, place = _varint(file, place)
            page_size = raw >> 1
        else:
            place = _skip(file, place, kind)


def _skip(file: mmap, place: int, kind: int) -> int:
    if kind in (_TRUE, _FALSE):
        return place
    if kind == _BYTE:
        return place + 1
    if kind == _DOUBLE:
        return place + 8
    if kind == _BINARY:
        length, place = _varint(file, place)
        return place + length
    if kind == _STRUCT:
        while file[place] != _STOP:
            byte = file[place]
            place += 1
            if not byte >> 4:
                _, place = _varint(file, place)
            place = _skip(file, place, byte & 0x0F)
        return place + 1
    if kind in (_LIST, _SET):
        raise CacheFormatError(f"unexpected list in the page header before byte {place}")
    return _varint(file, place)[1]


def _varint(file: mmap, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = file[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
