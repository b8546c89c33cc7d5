"""Small tables are refused where they are not what they should be."""

import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache import layout, parquet
from pipeline.errors import CacheFormatError, StorageError

REQUIRED = pa.schema([field for field in layout.FAILURES_SCHEMA if not field.nullable])
"""Columns that may be missing are left out: one whose name is damaged reads as missing."""

ROWS = pa.table(
    [
        pa.array([f"shard-{i}" for i in range(50)]),
        pa.array(["storage"] * 50),
        pa.array(["cannot"] * 50),
        pa.array(range(50), pa.int32()),
    ],
    schema=REQUIRED,
)


def as_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def read(content: bytes, schema: pa.Schema = REQUIRED) -> pa.Table:
    return parquet.read_table(content, schema, where="here")


def test_a_table_comes_back_as_it_was() -> None:
    assert read(as_parquet(ROWS)) == ROWS


def test_columns_that_are_not_known_are_passed_over_and_optional_ones_are_null() -> None:
    schema = ROWS.schema.append(pa.field("added", pa.int64()))

    found = read(as_parquet(ROWS.append_column("later", pa.nulls(50))), schema)

    assert found.schema == schema
    assert found["added"].null_count == 50


@pytest.mark.parametrize(
    "table",
    [
        ROWS.drop_columns(["shard"]),
        ROWS.set_column(0, "shard", pa.array(range(50))),
        ROWS.set_column(0, "shard", pa.array([None] * 50, pa.string())),
        ROWS.append_column("shard", ROWS["shard"]),
        ROWS.set_column(0, "shard", pa.array([b"\xff"] * 50, pa.binary()).view(pa.string())),
    ],
    ids=["missing", "another type", "null", "twice", "no text"],
)
def test_a_table_of_another_kind_is_refused(table: pa.Table) -> None:
    with pytest.raises(CacheFormatError, match="here"):
        read(as_parquet(table))


def test_rows_that_cannot_be_in_so_few_bytes_are_refused_before_they_are_unpacked() -> None:
    count = 2_000_000
    column = pa.DictionaryArray.from_arrays(pa.nulls(count, pa.int8()).fill_null(0), ["x"])
    table = pa.table({name: column for name in ("shard", "reason", "message")})
    content = as_parquet(table.append_column("attempts", pa.nulls(count, pa.int32()).fill_null(0)))
    assert len(content) < 100_000

    with pytest.raises(CacheFormatError, match=f"claims {count} rows in {len(content)} bytes"):
        read(content)


def test_no_changed_byte_gives_another_table() -> None:
    content, generator = as_parquet(ROWS), random.Random(0)
    outcomes = []

    for place in generator.sample(range(len(content)), 400):
        changed = bytearray(content)
        changed[place] ^= 1 << generator.randrange(8)
        try:
            outcomes.append(read(bytes(changed)) == ROWS)
        except CacheFormatError:
            outcomes.append(None)

    assert outcomes.count(None) > 200
    assert outcomes.count(False) == 0


def test_what_a_store_says_stays_what_it_is() -> None:
    with pytest.raises(StorageError, match="gone"), parquet.parsing("here"):
        raise StorageError("gone")
    with pytest.raises(StorageError, match="cannot read here"), parquet.parsing("here"):
        raise PermissionError(13, "no")
