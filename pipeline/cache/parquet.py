"""Parquet files of a cache, read so that damaged bytes cost an error: not the process, not a value.

Small tables are compared with the SHA-256 that the record naming them holds, and footers of parts
with a checksum, before they are parsed. All pages have checksums of their own.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import layout
from pipeline.cache.checksum import crc32c
from pipeline.errors import CacheFormatError, PipelineError, StorageError

MAX_FOOTER_BYTES = 64 << 20
_MAGIC = b"PAR1"
_TAIL = 8  # length of the footer, and the magic number
_FREE_ROWS = 1 << 20
_ROWS_PER_BYTE = 4  # keys are unique: fewer bytes a row cannot be

_LIMITS: dict[str, Any] = {
    "thrift_string_size_limit": MAX_FOOTER_BYTES,
    "thrift_container_size_limit": 1 << 22,
    "page_checksum_verification": True,
}


@contextmanager
def parsing(where: str) -> Iterator[None]:
    """Turn what Arrow raises about bytes that it cannot parse into `CacheFormatError`.

    Raises:
        StorageError: they cannot be read.
    """
    try:
        yield
    except PipelineError:
        raise
    except pa.ArrowException as err:  # ArrowInvalid, ArrowMemoryError and others
        raise CacheFormatError(f"{where} is damaged: {_line(err)}") from err
    except OSError as err:
        if err.errno is None:  # what Arrow says of a page or footer that makes no sense
            raise CacheFormatError(f"{where} is damaged: {_line(err)}") from err
        raise StorageError(f"cannot read {where}: {_line(err)}") from err
    except (ValueError, OverflowError, MemoryError) as err:  # text that is not UTF-8, say
        raise CacheFormatError(f"{where} is damaged: {_line(err)}") from err


def check_content(content: bytes, *, size: int, sha256: str, where: str) -> None:
    """Compare bytes with what the record that names them says.

    Raises:
        CacheFormatError: they are others.
    """
    if len(content) != size:
        raise CacheFormatError(
            f"{where} has {len(content)} bytes, not the {size} that were written"
        )
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CacheFormatError(f"{where} does not match its sha256; the file is damaged")


def read_table(content: bytes, schema: pa.Schema, *, where: str) -> pa.Table:
    """Read a small Parquet file that must have the columns of a schema.

    Columns that may be null may be missing; those that the schema does not have are passed over.

    Raises:
        CacheFormatError: it is damaged or of another kind.
    """
    with parsing(where):
        file = pq.ParquetFile(pa.BufferReader(content), **_LIMITS)
        found, num_rows = file.schema_arrow, file.metadata.num_rows
        check_claim(num_rows, len(content), where=where)
        names = [f.name for f in schema if _has(found, f, where)]
        table = file.read(columns=names, use_threads=False)
        if table.num_rows != num_rows:
            raise CacheFormatError(f"{where} holds {table.num_rows} rows, not {num_rows}")
        return conform(table, schema, where=where)


def check_claim(num_rows: int, size: int, *, where: str) -> None:
    """Refuse a table that claims more rows than its bytes can hold, before they are made.

    Raises:
        CacheFormatError: it does.
    """
    if num_rows > max(_FREE_ROWS, _ROWS_PER_BYTE * size):
        raise CacheFormatError(f"{where} claims {num_rows} rows in {size} bytes")


def conform(table: pa.Table, schema: pa.Schema, *, where: str) -> pa.Table:
    """Return what was read as a table of a schema; columns that may be null may be missing.

    Raises:
        CacheFormatError: it has a null that may not be, or its values make no sense.
    """
    with parsing(where):
        table.validate(full=True)
        columns = [
            table[f.name] if f.name in table.column_names else pa.nulls(len(table), f.type)
            for f in schema
        ]
        for field, column in zip(schema, columns, strict=True):
            if column.null_count and not field.nullable:
                raise CacheFormatError(f"{where} has a null in column {field.name!r}")
        return pa.Table.from_arrays(columns, schema=schema)


def footer_of(tail: bytes, *, where: str) -> bytes | int:
    """Return the footer with all behind it, or how many bytes to read where the tail is short.

    Raises:
        CacheFormatError: the file does not end as a Parquet file does.
    """
    if len(tail) < _TAIL or tail[-4:] != _MAGIC:
        raise CacheFormatError(f"{where} is damaged: it does not end as a Parquet file does")
    needed = int.from_bytes(tail[-_TAIL:-4], "little") + _TAIL
    if needed > MAX_FOOTER_BYTES:
        raise CacheFormatError(f"{where} is damaged: it claims a footer of {needed} bytes")
    return tail[-needed:] if needed <= len(tail) else needed


def footer_checksum(footer: bytes) -> int:
    """Return the crc32c of a footer with its length and the magic number behind it."""
    return crc32c(footer)


def parse_footer(footer: bytes, *, where: str) -> pq.FileMetaData:
    """Parse what `footer_of` returned.

    Raises:
        CacheFormatError: it is damaged.
    """
    with parsing(where):
        return pq.ParquetFile(pa.BufferReader(_MAGIC + footer), **_LIMITS).metadata


def open_part(
    source: Any,  # noqa: ANN401  (a file)
    metadata: pq.FileMetaData | None = None,
    *,
    where: str,
    columns: Sequence[pa.Field] | None = None,
    check_pages: bool = True,
) -> pq.ParquetFile:
    """Open a part, or a table of a snapshot.

    Args:
        source: a file that can be read from any place.
        metadata: its footer where that is known; else it is read.
        where: the file, for messages.
        columns: that it must have; None for those of a part, of any version.
        check_pages: try the checksums of pages when they are read.

    Raises:
        CacheFormatError: it is no such file, by its footer.
    """
    with parsing(where):
        options = {**_LIMITS, "page_checksum_verification": check_pages}
        part = pq.ParquetFile(source, metadata=metadata, **options)
        if columns is None:
            columns = layout.fixed_columns(2 if layout.PACKED in part.schema_arrow.names else 1)
        for field in columns:
            _has(part.schema_arrow, field, where)
        return part


def _has(found: pa.Schema, field: pa.Field, where: str) -> bool:
    places = found.get_all_field_indices(field.name)
    if not places and field.nullable:
        return False
    if len(places) != 1 or found.field(places[0]).type != field.type:
        raise CacheFormatError(f"{where} has no column {field.name!r} of type {field.type}")
    return True


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:300] or type(err).__name__
