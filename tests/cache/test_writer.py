"""Parts are plain Parquet, their rows can be fetched by offset, and an abort leaves nothing."""

import hashlib
import io
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import duckdb
import polars
import pyarrow.parquet as pq
import pytest

from pipeline.cache import layout, spool
from pipeline.cache.row import aux_length, row_checksum
from pipeline.errors import NotFoundError, StorageError
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


@pytest.mark.parametrize("version", layout.FORMAT_VERSIONS)
def test_the_bytes_at_the_indexed_offsets_are_the_row(store: Store, version: int) -> None:
    written(store, 30, row_group_bytes=10_000, part_bytes=30_000, format_version=version)
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
        aux = store.read_range(path, r["aux_offset"], r["aux_length"])
        if version == 1:
            assert stored["aux"][r["row"]].as_py() == aux
        else:
            assert stored["packed"][r["row"]].as_py() == aux + tokens


def test_a_part_explains_itself_and_checks_its_rows(store: Store) -> None:
    files = written(store)
    part = open_part(store, files[0].path)

    table = part.read()

    assert layout.METADATA_KEY in part.schema_arrow.metadata
    assert SETTINGS["codec"]["name"].encode() in part.schema_arrow.metadata[layout.METADATA_KEY]
    for r in table.to_pylist():
        length = aux_length(r["packed"], where="here")
        assert row_checksum(r["packed"][length:], r["packed"][:length]) == r["crc32c"]


def test_files_have_the_sizes_and_sums_that_are_reported(store: Store) -> None:
    for file in written(store):
        content = store.read(file.path)
        assert len(content) == file.size
        assert hashlib.sha256(content).hexdigest() == file.sha256


def test_duckdb_polars_and_hf_datasets_open_a_part(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "cache"))
    path = store.local_path(written(store, 12)[0].path)
    expected = [(row.key, row.packed.tokens, row.columns["txt"]) for row in rows(12)]

    by_duckdb = duckdb.sql(f"select key, packed, txt from '{path}' order by key").fetchall()
    by_polars = polars.read_parquet(path).sort("key").select("key", "packed", "txt").rows()
    by_datasets = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "hf"))

    def tokens_of(found: Iterable) -> list:
        return [(key, packed[aux_length(packed, where=key) :], txt) for key, packed, txt in found]

    assert tokens_of(by_duckdb) == expected
    assert tokens_of(by_polars) == expected
    assert tokens_of((r["key"], r["packed"], r["txt"]) for r in by_datasets) == expected


def test_text_counts_towards_the_size_of_row_groups_and_parts(store: Store) -> None:
    writer = make_writer(store, "shard", row_group_bytes=100_000, part_bytes=300_000)
    with writer:
        for number in range(30):
            writer.write(make_row(f"k{number:03d}", num_tokens=2, text="x" * 30_000))
        writer.finish([])

    parts = [e.path for e in store.list("data") if "part-" in e.path]
    groups = [open_part(store, path).metadata.num_row_groups for path in parts]
    assert groups == [3, 3, 2]  # of four rows; four and four and four, the last of two


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


class NoUpload(Store):
    """A store whose bucket has gone when a part is uploaded."""

    deleted: str | None = None
    can_delete = True

    def upload(self, path: str, local_path: str) -> None:
        raise NotFoundError(f"cannot write {self.url_of(path)}: its bucket does not exist")

    def delete_tree(self, prefix: str) -> None:
        self.deleted = prefix
        if not self.can_delete:
            raise StorageError(f"cannot delete {self.url_of(prefix)}: refused")
        super().delete_tree(prefix)


@pytest.mark.parametrize("can_delete", [True, False])
def test_a_failed_upload_is_the_error_that_is_seen_and_the_attempt_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, can_delete: bool
) -> None:
    store = NoUpload(f"memory://{tmp_path.name}")
    store.can_delete = can_delete
    writer = make_writer(store, "shard")

    def write() -> None:
        with writer:
            writer.write(rows(1)[0])
            writer.finish([])

    with caplog.at_level(logging.WARNING), pytest.raises(NotFoundError, match="its bucket"):
        write()

    assert store.deleted == layout.attempt_path("shard", writer.attempt)
    assert ("refused" in caplog.text) != can_delete


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: what a full disk does, for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [10_000, 60_000])
def test_a_full_disk_is_a_storage_error_that_names_the_part(store: Store, limit: int) -> None:
    """It fills up within a row group, or when the part is closed."""
    writer = make_writer(store, "shard", row_group_bytes=20_000)

    def write() -> None:
        with writer:
            for row in rows(30):
                writer.write(row)
            writer.finish([])

    with largest_file(limit), pytest.raises(StorageError, match=r"part-00000\.parquet.*File too"):
        write()

    assert list(store.list("data")) == []


def test_an_abort_survives_a_part_that_is_already_gone(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    writer = make_writer(store, "shard", row_group_bytes=1)

    def write_and_stop() -> None:
        with writer:
            writer.write(rows(1)[0])
            os.unlink(store.local_path(layout.part_path("shard", writer.attempt, 0)))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_stop()

    assert list(store.list("data")) == []


def test_a_killed_process_leaves_no_spool_file(tmp_path: Path) -> None:
    script = """
        import os, signal
        from pipeline.storage import open_store
        from tests.cache.rows import make_row, make_writer

        writer = make_writer(open_store("memory://killed"), "shard", row_group_bytes=1)
        writer.write(make_row("a"))
        os.kill(os.getpid(), signal.SIGKILL)
    """

    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
    )

    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_without_paths_of_descriptors_a_spool_has_a_name_and_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "DESCRIPTORS", str(tmp_path / "none"))
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    store = open_store(f"memory://{tmp_path.name}")

    writer = make_writer(store, "shard", row_group_bytes=1)
    with writer:
        writer.write(rows(1)[0])
        assert len(list((tmp_path / "spool").iterdir())) == 1
        files = writer.finish([])

    assert open_part(store, files[0].path).read().num_rows == 1
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_finished_attempt_is_on_disk_with_all_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path / "cache"))
    synced: list[str] = []
    sync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)

    files = written(store)

    part, root = store.local_path(files[0].path), store.local_path("")
    folders = [str(p) for p in Path(part).parents if p.is_relative_to(root)]
    assert len(folders) == 4
    assert part in synced
    for folder in folders:
        assert folder in synced[synced.index(part) :]
