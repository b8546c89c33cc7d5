"""A snapshot made from the one before says what one made from scratch says, and costs less."""

import contextlib
import itertools
import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cache import layout, segment_writer
from pipeline.cache import snapshot as snapshots
from pipeline.cache.garbage import find_garbage
from pipeline.cache.reader import SnapshotReader
from pipeline.cache.snapshot import Snapshot, build_snapshot, latest_snapshot
from pipeline.cache.snapshot_record import record_path
from pipeline.storage import Store, open_store
from tests.cache.counting import CountingStore
from tests.cache.golden_caches import folder
from tests.cache.indexes import commit_index
from tests.cache.rows import IDENTITY, commit_rows, make_row

SMALL = {
    "_FILE_ROWS": 8,
    "_MAX_SMALL": 2,
    "_GROUP_ROWS": 2,
    "_RUN_ROWS": 16,
    "_MAX_RUNS": 4,
    "_SMALL_ROWS": 2,
}


@contextlib.contextmanager
def small_tables() -> Iterator[None]:
    """Make tables so small that a few rows take several of everything."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(segment_writer, name, value)
        patch.setattr(snapshots, "_LOOKED_UP_ROWS", 5)
        yield


@pytest.fixture
def small() -> Iterator[None]:
    with small_tables():
        yield


class Overtaken(Store):
    """A store on which another driver acts just before a snapshot of ours is published."""

    def __init__(self, url: str, others: list[Any]) -> None:
        super().__init__(url)
        self.others = others

    def put_once(self, path: str, data: bytes) -> None:
        if path.endswith("snapshot.json") and self.others:
            self.others.pop()()
        super().put_once(path, data)


def new_store(kind: type[Store] = Store) -> Any:
    """Return a store in memory: what costs time on a disk is not of interest here."""
    return kind(f"memory://incremental-{uuid.uuid4().hex}")


class World:
    """A cache, and what ought to be in it."""

    def __init__(self) -> None:
        self.store = new_store()
        self.rows: dict[str, dict[str, dict[str, str]]] = {}  # path of the part by key, work, shard
        self.clock = 0.0

    def commit(self, shard: str, work: str, keys: list[str]) -> None:
        if work not in self.rows.setdefault(shard, {}):
            self.clock += 1
            made = commit_index(self.store, shard, keys, work=work, at=self.clock)
            part = layout.part_path(shard, made.attempt, 0)
            self.rows[shard][work] = dict.fromkeys(keys, part)

    def forget(self, shard: str, work: str) -> None:
        """Delete a record and, as gc would, its attempt."""
        known = self.rows.get(shard, {}).pop(work, None)
        self.store.delete(layout.commit_path(shard, work))
        for path in set((known or {}).values()):
            self.store.delete_tree(str(Path(path).parent))

    def expected(self, snapshot: Snapshot) -> tuple[dict[str, str], int]:
        """Return the part of each key, and how many rows are hidden."""
        places: dict[str, str] = {}
        hidden = 0
        for shard, works in sorted(self.rows.items()):
            if works:
                chosen = snapshot.choices[shard][0] if len(works) > 1 else next(iter(works))
                for key, path in works[chosen].items():
                    hidden += key in places
                    places.setdefault(key, path)
        return places, hidden

    def from_scratch(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot of the same commits in a cache that never had one."""
        other = new_store()
        for entry in self.store.list():
            if not entry.path.startswith(layout.SNAPSHOTS):
                other.put(entry.path, self.store.read(entry.path))
        wanted = {shard: works[0] for shard, works in snapshot.choices.items()}
        return build_snapshot(other, wanted)

    def check(self, snapshot: Snapshot) -> None:
        reader = SnapshotReader(store=self.store, snapshot=snapshot)
        places, hidden = self.expected(snapshot)
        assert list(reader.keys()) == sorted(places)
        assert {key: reader.find(key).path for key in places} == places
        assert not any(reader.contains(key) for key in ("", "a-", "zz"))
        assert len(reader) == len(places)
        assert snapshot.num_duplicates == hidden
        files, groups, rows = reader.row_groups()
        stored = [
            place
            for file, group, count in zip(files, groups, rows, strict=True)
            for place in [list(reader.part_rows(reader.files[file]).group(int(group)))]
            if len(place) == count or pytest.fail("a row group has another number of rows")
        ]
        assert sorted(p.key for some in stored for p in some) == sorted(places)
        assert all(place == reader.find(place.key) for some in stored for place in some)
        other = self.from_scratch(snapshot)
        for name in ("num_shards", "num_rows", "num_tokens", "num_duplicates", "duplicates"):
            assert getattr(snapshot, name) == getattr(other, name), name
        assert snapshot.choices == other.choices


SHARDS = st.sampled_from("abcdef")
WORKS = st.sampled_from(["w1", "w2", "w3"])
KEYS = st.lists(st.text("ab\u00e9\U0001f40b", min_size=1, max_size=3), max_size=12, unique=True)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), SHARDS, WORKS, KEYS),
        st.tuples(st.just("commit"), SHARDS, WORKS, KEYS),
        st.tuples(st.just("forget"), SHARDS, WORKS),
        st.tuples(st.just("build"), st.dictionaries(SHARDS, WORKS, max_size=2)),
        st.tuples(st.just("race"), st.dictionaries(SHARDS, WORKS, max_size=2), SHARDS, WORKS, KEYS),
    ),
    max_size=14,
)


def play(steps: list[Any]) -> None:
    """Let a cache live, and look at every snapshot of it."""
    world = World()
    for what, *details in [*steps, ("build", {})]:
        if what == "race":
            wanted, *commit = details

            def other(commit: list[Any] = commit) -> None:
                world.commit(*commit)
                build_snapshot(world.store)

            made = build_snapshot(Overtaken(world.store.url, [other]), wanted)
            world.check(made)
            assert made == latest_snapshot(world.store)
        elif what == "build":
            world.check(build_snapshot(world.store, *details))
        else:
            getattr(world, what)(*details)


@given(steps=STEPS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_happens_a_snapshot_says_what_one_from_scratch_says(steps: list[Any]) -> None:
    with small_tables():
        play(steps)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@given(steps=STEPS)
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_happens_for_long(steps: list[Any]) -> None:
    with small_tables():
        play(steps)


def test_one_more_shard_reads_one_record_and_one_index_whatever_there_is() -> None:
    store = new_store(CountingStore)
    for i in range(300):
        commit_index(store, f"s{i:03d}", [f"k{i:03d}-{n}" for n in range(5)])
    first = build_snapshot(store)
    commit_index(store, "s150x", ["k150-3x", "k150-4x"])
    commit_index(store, "s007", ["other"], work="changed", at=2.0)
    store.reads.clear()
    store.ranges = 0

    second = build_snapshot(store)

    assert (first.number, second.number) == (0, 1)
    # Of shard s007 both records: which one is the newer, only they say.
    assert store.reads == {"snapshots": 1, "commits": 3, "data": 2}
    assert store.ranges == 3  # tables, each whole
    assert (second.num_shards, second.num_rows) == (301, 300 * 5 + 2 - 5 + 1)


def test_segments_stay_few_and_rows_are_rewritten_seldom(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_writer, "_FILE_ROWS", 10_000)
    store = new_store()
    written = 0
    for i in range(32):
        commit_index(store, f"s{i:02d}", [f"k{(i * 37) % 32:02d}-{n}" for n in range(4)])
        snapshot = build_snapshot(store)
        here = layout.snapshot_path(snapshot.number, "")
        written += sum(f.rows for s in snapshot.segments for f in s.index if here in f.table.path)

        sizes = [segment.num_rows for segment in snapshot.segments]
        assert sum(sizes) == 4 * (i + 1)
        assert all(large >= 2 * less for large, less in itertools.pairwise(sizes))

    assert len(snapshot.segments) <= 6
    assert written <= 128 * 6  # each row as often as the segments double, and no more


def test_a_segment_that_is_mostly_dropped_is_written_again(tmp_path: Path, small: None) -> None:
    store = open_store(str(tmp_path))
    for shard in "abc":
        commit_index(store, shard, [f"{shard}{n}" for n in range(20)])
    build_snapshot(store)
    for shard in "ab":
        store.delete(layout.commit_path(shard, "f" * 16))

    snapshot = build_snapshot(store)

    assert [s.num_rows for s in snapshot.segments] == [20]
    assert not snapshot.segments[0].dropped
    keys = list(SnapshotReader(store=store, snapshot=snapshot).keys())
    assert keys == sorted(f"c{n}" for n in range(20))


def test_tables_of_the_base_and_of_a_lost_race_are_told_apart(tmp_path: Path, small: None) -> None:
    store = open_store(str(tmp_path))
    store.put(layout.IDENTITY_PATH, layout.dump_json({"format_version": 1, **IDENTITY}))
    for shard in "abc":
        commit_index(store, shard, [f"{shard}{n}" for n in range(20)])
    build_snapshot(store)
    commit_index(store, "d", ["d"])

    def other() -> None:
        commit_index(store, "e", ["e"])
        build_snapshot(store)

    made = build_snapshot(Overtaken(str(tmp_path), [other]))

    assert made.num_rows == 62
    named = {path for number in range(made.number + 1) for path in paths_of(store, number)}
    assert {entry.path for entry in store.list("snapshots")} == named
    assert list(find_garbage(store, grace_s=-1e9)) == []


def paths_of(store: Store, number: int) -> list[str]:
    return [record_path(number), *snapshots.read_snapshot(store, number).paths]


def test_a_cache_that_was_copied_is_known_again_by_its_attempts(tmp_path: Path) -> None:
    before = CountingStore(str(tmp_path / "a"))
    for shard in "abc":
        commit_index(before, shard, [f"{shard}{n}" for n in range(5)])
    first = build_snapshot(before)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    store = CountingStore(str(tmp_path / "b"))

    again = build_snapshot(store)

    assert store.reads == {"snapshots": 1, "commits": 3}  # and no index
    assert [s.index for s in again.segments] == [s.index for s in first.segments]
    store.reads.clear()
    assert build_snapshot(store) == again
    assert store.reads == {"snapshots": 1}


@pytest.fixture
def first_layout(tmp_path: Path) -> CountingStore:
    """A cache whose snapshot has one table each of files and index."""
    shutil.copytree(folder(1) / "int8", tmp_path / "v1")
    return CountingStore(str(tmp_path / "v1"))


def test_a_snapshot_of_the_first_layout_is_read_and_grows(first_layout: CountingStore) -> None:
    store = first_layout
    old = latest_snapshot(store)
    (segment,) = old.segments
    assert segment.shards is None
    reader = SnapshotReader(store=store, snapshot=old)
    places = {key: reader.find(key) for key in ("k0", "k1", "k2", "k3")}
    stored = [
        place
        for file, group, _ in zip(*reader.row_groups(), strict=True)
        for place in reader.part_rows(reader.files[file]).group(int(group))
    ]
    assert stored == [places[key] for key in ("k0", "k1", "k2", "k3")]
    commit_rows(store, "c", [make_row("k00"), make_row("k3")])
    store.reads.clear()

    grown = build_snapshot(store)

    assert store.reads == {"snapshots": 1, "commits": 3, "data": 1}
    reader = SnapshotReader(store=store, snapshot=grown)
    assert list(reader.keys()) == ["k0", "k00", "k1", "k2", "k3"]
    assert {key: reader.find(key) for key in places} == places
    assert grown.duplicates == (("k3", "c"),)
    assert grown.num_tokens == old.num_tokens + 40
    assert build_snapshot(store) == grown


def test_rows_that_the_first_layout_left_out_come_back(first_layout: CountingStore) -> None:
    """It has no trace of hidden rows; so nothing is built upon it."""
    store = first_layout
    record = json.loads(store.read(record_path(0)))
    commit_rows(store, "c", [make_row("k3", seed=8)])
    table = {**record, "num_duplicates": 1, "duplicates": [["k3", "c"]], "num_shards": 3}
    files = segment_writer.parquet_bytes(first_layout_files(store))
    store.put(record["files"], files)
    store.put(record_path(0), layout.dump_json(table))
    reader = SnapshotReader(store=store, snapshot=latest_snapshot(store))
    assert sum(reader.row_groups()[2]) == 4
    store.delete(layout.commit_path("b", "f" * 16))

    grown = build_snapshot(store)

    reader = SnapshotReader(store=store, snapshot=grown)
    assert list(reader.keys()) == ["k0", "k1", "k2", "k3"]
    assert reader.find("k3").path.startswith("data/c/")
    assert grown.num_duplicates == 0


def first_layout_files(store: Store) -> Any:
    """Return the files table of the first layout for all commits there are."""
    found, tables = snapshots.collect_snapshot(store)
    return tables[found.segments[0].files.path].drop_columns(["row_groups"])


def test_more_runs_than_are_merged_at_once_give_the_same() -> None:
    store = new_store()
    shards = {f"s{i:02d}": [f"k{(7 * i + n) % 50:02d}" for n in range(12)] for i in range(30)}
    for shard, keys in shards.items():
        commit_index(store, shard, keys)
    at_once = build_snapshot(store)
    rows = SnapshotReader(store=store, snapshot=at_once).index.to_pylist()
    store.delete_tree("snapshots")

    with small_tables():
        in_runs = build_snapshot(store)

    assert len(in_runs.segments[0].index) > 4
    assert SnapshotReader(store=store, snapshot=in_runs).index.to_pylist() == rows
    same = {"created_at": 0.0, "segments": (), "hidden": None}
    assert replace(in_runs, **same) == replace(at_once, **same)
