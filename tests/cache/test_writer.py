"""Parts are plain Parquet, their rows can be fetched by offset, and an abort leaves nothing."""

import hashlib
import io
from pathlib import Path

import datasets
import duckdb
import polars
import pyarrow.parquet as pq
import pytest

from pipeline.cache import layout
from pipeline.cache.row import row_checksum
from pipeline.storage import Store, open_store
from pipeline.types import RejectedSample
from tests.cache.rows import SETTINGS, make_row, make_writer


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    places = {"local": str(tmp_path / "cache"), "memory": f"memory://{tmp_path.name}"}
    return open_store(places[request.param])


def rows(count: int) -> list:
    sizes = [(i * 7) % 40 + 1 for i in range(count)]
    return [make_row(f"k{i:03d}", seed=i, num_tokens=n, text=f"t{i}") for i, n in enumerate(sizes)]


def open_part(store: Store, path: str) -> pq.ParquetFile:
    return pq.ParquetFile(io.BytesIO(store.read(path)))


def written(store: Store, count: int = 30, **options: int) -> list:
    writer = make_writer(store, "shard", **options)
    with writer:
        for row in rows(count):
            writer.write(row)
        return writer.finish([])


def test_the_bytes_at_the_indexed_offsets_are_the_row(store: Store) -> None:
    written(store, 30, row_group_bytes=10_000, part_bytes=30_000)
    attempt = next(store.list("data")).path.rsplit("/", 1)[0]

    index = open_part(store, f"{attempt}/index.parquet").read().to_pylist()

    assert [r["key"] for r in index] == [f"k{i:03d}" for i in range(30)]
    assert max(r["part"] for r in index) > 0
    assert max(r["row_group"] for r in index) > 0
    expected = {row.key: row for row in rows(30)}
    for r in index:
        path = f"{attempt}/part-{r['part']:05d}.parquet"
        tokens = store.read_range(path, r["tokens_offset"], r["tokens_length"])
        assert tokens == expected[r["key"]].packed.tokens
        stored = open_part(store, path).read_row_group(r["row_group"])
        assert stored["aux"][r["row"]].as_py() == store.read_range(
            path, r["aux_offset"], r["aux_length"]
        )


def test_a_part_explains_itself_and_checks_its_rows(store: Store) -> None:
    files = written(store)
    part = open_part(store, files[0].path)

    table = part.read()

    assert layout.METADATA_KEY in part.schema_arrow.metadata
    assert SETTINGS["codec"]["name"].encode() in part.schema_arrow.metadata[layout.METADATA_KEY]
    for r in table.to_pylist():
        assert row_checksum(r["tokens"], r["aux"]) == r["crc32c"]


def test_files_have_the_sizes_and_sums_that_are_reported(store: Store) -> None:
    for file in written(store):
        content = store.read(file.path)
        assert len(content) == file.size
        assert hashlib.sha256(content).hexdigest() == file.sha256


def test_duckdb_polars_and_hf_datasets_open_a_part(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "cache"))
    path = store.local_path(written(store, 12)[0].path)
    expected = [(row.key, row.packed.tokens, row.columns["txt"]) for row in rows(12)]

    by_duckdb = duckdb.sql(f"select key, tokens, txt from '{path}' order by key").fetchall()
    by_polars = polars.read_parquet(path).sort("key").select("key", "tokens", "txt").rows()
    by_datasets = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "hf"))

    assert by_duckdb == expected
    assert by_polars == expected
    assert [(r["key"], r["tokens"], r["txt"]) for r in by_datasets] == expected


def test_an_error_removes_the_attempt(store: Store) -> None:
    writer = make_writer(store, "shard", row_group_bytes=1, part_bytes=4000)

    def write_and_stop() -> None:
        with writer:
            for row in rows(5):
                writer.write(row)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_stop()

    assert list(store.list("data")) == []


def test_rejected_samples_are_written_beside_the_rows(store: Store) -> None:
    writer = make_writer(store, "shard")
    bad = RejectedSample(key="k", stage="decode", reason="corrupt_image", message="half a file")

    with writer:
        files = writer.finish([bad])

    assert [f.kind for f in files] == ["errors"]
    assert open_part(store, files[0].path).read().to_pylist() == [
        {"key": "k", "stage": "decode", "reason": "corrupt_image", "message": "half a file"}
    ]


def test_an_empty_shard_writes_no_file(store: Store) -> None:
    with make_writer(store, "shard") as writer:
        assert writer.finish([]) == []
