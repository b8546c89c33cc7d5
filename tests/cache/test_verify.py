"""Verify reads each part once and finds what does not fit: bytes, checksums, places."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.cache.commit import Commit, try_commit
from pipeline.cache.reader import SnapshotReader
from pipeline.cache.snapshot import build_snapshot, collect_snapshot
from pipeline.cache.verify import find_damage
from pipeline.storage import Store, open_store
from pipeline.types import RejectedSample
from tests.cache.counting import CountingStore
from tests.cache.rows import commit_rows, make_commit, make_row, make_writer


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    places = {"local": str(tmp_path / "cache"), "memory": f"memory://verify-{tmp_path.name}"}
    return open_store(places[request.param])


def fill(store: Store) -> None:
    commit_rows(store, "s2", [make_row(f"k{i}", seed=i) for i in (3, 1, 5)])
    commit_rows(store, "s1", [make_row(f"k{i}", seed=i) for i in (4, 2)], row_group_bytes=1)


def test_verify_finds_a_flipped_byte_and_a_missing_part(store: Store) -> None:
    fill(store)
    reader = SnapshotReader(store=store, snapshot=build_snapshot(store))
    assert list(find_damage(reader)) == []
    place = reader.find("k3")
    content = bytearray(store.read(place.path))
    content[place.tokens_offset + 5] ^= 1
    store.put(place.path, bytes(content))
    store.delete(reader.find("k2").path)

    damage = list(find_damage(SnapshotReader(store=store, snapshot=reader.snapshot)))

    assert any("sha256" in line for line in damage)
    assert any("missing" in line for line in damage)
    assert any("'k3'" in line and "checksum" in line for line in damage)


def test_a_whole_cache_has_no_damage_whatever_lies_in_it(store: Store) -> None:
    fill(store)
    commit_rows(store, "s3", [make_row("k1", seed=9), make_row("k6")])  # one hidden
    commit_rows(store, "s4", [])
    many = [make_row(f"m{i}", seed=i, num_tokens=1 + i) for i in range(40)]
    commit_rows(store, "s5", many, row_group_bytes=5000, part_bytes=20_000)

    reader = SnapshotReader(store=store, snapshot=build_snapshot(store))

    assert reader.snapshot.num_duplicates == 1
    assert list(find_damage(reader)) == []


def with_index(reader: SnapshotReader, column: str, change: int) -> SnapshotReader:
    """Return a reader whose index is wrong by `change` in one column of its first row."""
    found, tables = collect_snapshot(reader.store)
    (path,) = (file.table.path for file in found.segments[0].index)
    index = tables[path]
    number = index.column_names.index(column)
    changes = pa.array([change] + [0] * (index.num_rows - 1), index[column].type)
    changed = index.set_column(number, index.field(number), pc.add(index[column], changes))
    return SnapshotReader(store=reader.store, snapshot=found, tables={**tables, path: changed})


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("tokens_offset", 1),
        ("tokens_offset", 1 << 40),
        ("tokens_length", -1),
        ("aux_offset", -1),
        ("aux_length", 1),
        ("num_tokens", 1),
        ("grid_w", 1),
        ("height", 1),
        ("row", 1),
        ("row_group", 7),
    ],
)
def test_an_index_that_points_elsewhere_is_damage(store: Store, column: str, change: int) -> None:
    fill(store)
    reader = SnapshotReader(store=store, snapshot=build_snapshot(store))

    damage = list(find_damage(with_index(reader, column, change)))

    assert damage
    assert all("'k1'" in line and "index" in line for line in damage)


def rewritten(store: Store, commit: Commit, content: bytes) -> SnapshotReader:
    """Return a reader that takes other bytes of a part for those that were committed."""
    store.put(commit.files[0].path, content)
    found, tables = collect_snapshot(store)
    path = found.segments[0].files.path
    sha256 = hashlib.sha256(content).hexdigest()
    number = tables[path].column_names.index("sha256")
    field = tables[path].field(number)
    files = tables[path].set_column(number, field, pa.array([sha256]))
    return SnapshotReader(store=store, snapshot=found, tables={**tables, path: files})


@pytest.mark.parametrize("column", ["tokens_offset", "aux_offset"])
def test_a_row_written_wrong_is_found_by_its_checksums(store: Store, column: str) -> None:
    commit = commit_rows(store, "s", [make_row("a", seed=1), make_row("b", seed=2)])
    found, tables = collect_snapshot(store)
    place = tables[found.segments[0].index[0].table.path][column][1].as_py()
    content = bytearray(store.read(commit.files[0].path))
    content[place + 9] ^= 4

    damage = list(find_damage(rewritten(store, commit, bytes(content))))

    assert len(damage) == 2  # of the row, and of its block or its aux
    assert all("'b'" in line and "checksum" in line for line in damage)


@pytest.mark.parametrize("content", [b"", b"PAR1 is how it begins"])
def test_a_part_that_is_no_parquet_file_is_named(store: Store, content: bytes) -> None:
    commit = commit_rows(store, "s", [make_row("a")])

    damage = list(find_damage(rewritten(store, commit, content)))

    assert len(damage) == 1
    assert "part-00000.parquet is damaged" in damage[0]


def test_a_cut_part_is_damage_of_the_rows_behind_the_cut(store: Store) -> None:
    fill(store)
    reader = SnapshotReader(store=store, snapshot=build_snapshot(store))
    place = reader.find("k5")
    store.put(place.path, store.read(place.path)[: place.tokens_offset + 10])

    damage = list(find_damage(reader))

    assert "sha256" in damage[0]
    assert any("'k5'" in line for line in damage)


def test_each_part_is_fetched_once(tmp_path: Path) -> None:
    store = CountingStore(f"memory://once-{tmp_path.name}")
    fill(store)
    reader = SnapshotReader(store=store, snapshot=build_snapshot(store))
    store.reads.clear()

    assert list(find_damage(reader)) == []

    # Two parts, and the two indexes that only their commits name.
    assert store.reads == {"data": 4, "commits": 2}
    assert store.ranges == 2  # footers of the snapshot's two tables


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("index.parquet", None, "missing, though a commit names it"),
        ("index.parquet", b"short", "has 5 bytes, not the"),
        ("errors.parquet", b"flip", "does not match the sha256 of its commit"),
    ],
)
def test_files_beside_the_parts_are_checked_too(
    store: Store, name: str, content: bytes | None, problem: str
) -> None:
    rejected = [RejectedSample(key="bad", stage="decode", reason="corrupt_image", message="m")]
    with make_writer(store, "s") as writer:
        writer.write(make_row("a"))
        writer.finish(rejected)
    commit = try_commit(store, make_commit(writer))
    reader = SnapshotReader(store=store, snapshot=build_snapshot(store))
    (path,) = [file.path for file in commit.files if file.path.endswith(name)]
    whole = store.read(path)
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    if content is None:
        store.delete(path)
    else:
        store.put(path, flipped if content == b"flip" else content)

    (line,) = find_damage(reader)

    assert line.startswith(f"{store.url}/{path}: {problem}")


def test_commits_that_no_snapshot_has_are_checked_too(store: Store) -> None:
    fill(store)
    reader = SnapshotReader(store=store, snapshot=build_snapshot(store))
    later = commit_rows(store, "s9", [make_row("z")])
    part = later.files[0].path
    store.put(part, store.read(part)[:-1])
    (record,) = [e.path for e in store.list("commits") if "/s1." in e.path]
    store.put(record, store.read(record)[:-2])

    damage = list(find_damage(reader))

    assert len(damage) == 2
    assert record in damage[0]
    assert damage[1].startswith(f"{store.url}/{part}: has ")


def test_parts_are_checked_at_once_and_named_in_order(tmp_path: Path) -> None:
    store = CountingStore(f"memory://together-{tmp_path.name}")
    for number in range(8):
        commit_rows(store, f"s{number}", [make_row(f"k{number}")])
    reader = SnapshotReader(store=store, snapshot=build_snapshot(store))
    for record in reader.file_records():
        store.put(record["path"], store.read(record["path"])[:-1])
    store.pause_s, store.most_at_once = 0.1, 0

    damage = list(find_damage(reader, threads=4))

    named = [line for line in damage if "sha256" in line]
    assert len(named) == 8
    assert named == sorted(named)
    assert 1 < store.most_at_once <= 4
