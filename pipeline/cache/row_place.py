"""Where one row lies, as an index says."""

from dataclasses import dataclass

from pipeline.errors import CacheFormatError


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPlace:
    """Where one row lies."""

    key: str
    path: str  # of its part
    row_group: int
    row: int  # within the row group
    num_tokens: int
    grid_t: int
    grid_h: int
    grid_w: int
    width: int  # of the image, in pixels
    height: int
    tokens_offset: int  # bytes from the start of the part
    tokens_length: int
    aux_offset: int
    aux_length: int
    aux_crc32c: int | None = None  # tells this row from any other; None in older caches


def check_place(place: RowPlace, size: int, where: str) -> None:
    """Refuse a place that is not inside its part, before as much is fetched as it says."""
    spans = (
        (place.tokens_offset, place.tokens_length),
        (place.aux_offset, place.aux_length),
    )
    is_inside = all(start >= 0 and 0 < length <= size - start for start, length in spans)
    least_zero, least_one = (place.row_group, place.row), (place.grid_t, place.grid_h, place.grid_w)
    can_be = min(least_zero) >= 0 and min(*least_one, place.width, place.height) > 0
    if not is_inside or not can_be or not 0 < place.num_tokens <= place.tokens_length:
        raise CacheFormatError(
            f"{where}: the index says of key {place.key!r} what cannot be; it is damaged"
        )
