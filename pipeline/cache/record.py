"""The JSON records of a cache: sealed by a checksum, and refused where damaged.

A record that was changed by accident must not open another cache than the one that was written: a
digit of a codec's option, say, would change every value. So each holds a checksum of the rest of
it; records of older versions of this package have none.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cache import layout
from pipeline.errors import CacheFormatError
from pipeline.storage import Store

MAX_RECORD_BYTES = 256 << 20
_CHECKSUM = "checksum"


def dump_record(values: Mapping[str, Any], version: int = layout.RECORD_VERSION) -> bytes:
    """Return a record of a version with its checksum."""
    record = {"format_version": version, **values}
    return layout.dump_json({**record, _CHECKSUM: layout.fingerprint(record)})


def parse_record(
    content: bytes,
    *,
    where: str,
    kind: str = "record",
    versions: Sequence[int] = (layout.RECORD_VERSION,),
) -> dict[str, Any]:
    """Return what a record holds, without its checksum; `format_version` where several are known.

    Args:
        content: its bytes.
        where: the file, for messages.
        kind: of record, for messages.
        versions: that are known of this kind.

    Raises:
        CacheFormatError: it is damaged, too large, or of a version this package does not know.
    """
    if len(content) > MAX_RECORD_BYTES:
        raise CacheFormatError(
            f"{where} has more bytes than records have, which is at most {MAX_RECORD_BYTES}"
        )
    try:
        values = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError) as err:  # also of bytes that are no text
        raise CacheFormatError(f"{where} is damaged: not a {kind}: {_line(err)}") from err
    if not isinstance(values, dict) or "format_version" not in values:
        raise CacheFormatError(f"{where} is damaged: not a {kind}: no format_version")
    if values["format_version"] not in versions:
        raise CacheFormatError(
            f"{where}: format version {values['format_version']!r} is not known; install a newer "
            "carvecache"
        )
    if _CHECKSUM in values:
        expected = values.pop(_CHECKSUM)
        try:
            found = layout.fingerprint(values)
        except (ValueError, RecursionError) as err:  # lone surrogates, say
            raise CacheFormatError(f"{where} is damaged: {_line(err)}") from err
        if found != expected:
            raise CacheFormatError(f"{where} does not match its checksum; the file is damaged")
    if len(versions) == 1:
        del values["format_version"]
    return values


def read_record(
    store: Store, path: str, *, versions: Sequence[int] = (layout.RECORD_VERSION,)
) -> dict[str, Any]:
    """Read a record; arguments as of `parse_record`.

    Raises:
        NotFoundError: there is none.
        CacheFormatError: as for `parse_record`.
    """
    content = store.read(path, most=MAX_RECORD_BYTES + 1)
    return parse_record(content, where=store.url_of(path), versions=versions)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:200] or type(err).__name__
