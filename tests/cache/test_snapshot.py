"""A snapshot is a sorted view of all commits, immutable, and made only when something is new."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.cache import layout
from pipeline.cache import snapshot as snapshots
from pipeline.cache.reader import SnapshotReader
from pipeline.cache.record import dump_record, parse_record
from pipeline.cache.snapshot import Snapshot, build_snapshot, latest_snapshot
from pipeline.errors import CacheFormatError, KeyNotFoundError
from pipeline.storage import Store, open_store
from tests.cache.counting import CountingStore
from tests.cache.rows import commit_rows, make_row


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    places = {"local": str(tmp_path / "cache"), "memory": f"memory://snap-{tmp_path.name}"}
    return open_store(places[request.param])


def fill(store: Store) -> None:
    commit_rows(store, "s2", [make_row(f"k{i}", seed=i) for i in (3, 1, 5)])
    commit_rows(store, "s1", [make_row(f"k{i}", seed=i) for i in (4, 2)], row_group_bytes=1)


def test_keys_of_all_shards_are_sorted_and_found(store: Store) -> None:
    fill(store)

    reader = SnapshotReader(store=store, snapshot=build_snapshot(store))

    assert list(reader.keys()) == [f"k{i}" for i in range(1, 6)]
    for i in range(1, 6):
        (stored,) = reader.read_many(reader.find_many([f"k{i}"]))
        assert stored.tokens == make_row(f"k{i}", seed=i).packed.tokens


@pytest.mark.parametrize("key", ["", "k", "k0", "k33", "z", "\u00e9"])
def test_a_missing_key_is_a_key_error_that_names_it(store: Store, key: str) -> None:
    fill(store)
    reader = SnapshotReader(store=store, snapshot=build_snapshot(store))

    with pytest.raises(KeyNotFoundError, match=f"no image {key!r}"):
        reader.find(key)


def test_nothing_new_makes_no_new_snapshot(store: Store) -> None:
    fill(store)
    first = build_snapshot(store)

    assert build_snapshot(store) == first
    commit_rows(store, "s3", [make_row("k9")])
    assert build_snapshot(store).number == first.number + 1


def test_an_open_reader_does_not_see_later_commits(store: Store) -> None:
    fill(store)
    reader = SnapshotReader(store=store, snapshot=build_snapshot(store))

    commit_rows(store, "s3", [make_row("k9")])
    build_snapshot(store)

    assert "k9" not in list(reader.keys())
    assert not reader.contains("k9")


def test_of_two_equal_keys_the_shard_that_sorts_first_keeps_it(store: Store) -> None:
    commit_rows(store, "b", [make_row("same", seed=1), make_row("other", seed=2)])
    commit_rows(store, "a", [make_row("same", seed=3)])

    snapshot = build_snapshot(store)

    reader = SnapshotReader(store=store, snapshot=snapshot)
    assert list(reader.keys()) == ["other", "same"]
    assert snapshot.duplicates == (("same", "b"),)
    (stored,) = reader.read_many(reader.find_many(["same"]))
    assert stored.tokens == make_row("", seed=3).packed.tokens


def test_a_cache_of_empty_shards_has_an_empty_snapshot(store: Store) -> None:
    commit_rows(store, "s", [])

    snapshot = build_snapshot(store)

    assert (snapshot.num_shards, snapshot.num_rows, snapshot.num_tokens) == (1, 0, 0)
    assert list(SnapshotReader(store=store, snapshot=snapshot).keys()) == []


def test_a_damaged_snapshot_is_named(store: Store) -> None:
    fill(store)
    store.put(layout.snapshot_path(0, "snapshot.json"), b"{}")

    with pytest.raises(CacheFormatError, match=r"snapshots/00000000/snapshot\.json is damaged"):
        latest_snapshot(store)


def test_builders_racing_for_a_number_all_end_with_a_whole_snapshot(store: Store) -> None:
    fill(store)
    start = threading.Barrier(4)

    def build(_: int) -> Snapshot:
        start.wait()
        return build_snapshot(store)

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(build, range(4)))

    stored = {e.path for e in store.list("snapshots")}
    assert stored == {
        path for s in made for path in (*s.paths, layout.snapshot_path(s.number, "snapshot.json"))
    }
    for snapshot in made:
        assert len(list(SnapshotReader(store=store, snapshot=snapshot).keys())) == 5


def test_a_builder_that_lost_its_number_covers_what_was_committed_meanwhile(tmp_path: Path) -> None:
    fill(open_store(str(tmp_path)))

    class Overtaken(Store):
        """Another builder commits a shard and takes the number just before ours is put."""

        overtaken = False

        def put_once(self, path: str, data: bytes) -> None:
            if path.endswith("snapshot.json") and not self.overtaken:
                self.overtaken = True
                other = open_store(self.url)
                commit_rows(other, "s3", [make_row("k9")])
                build_snapshot(other)
            super().put_once(path, data)

    store = Overtaken(str(tmp_path))

    made = build_snapshot(store)

    latest = latest_snapshot(store)
    assert made == latest
    assert "k9" in list(SnapshotReader(store=store, snapshot=latest).keys())


def test_commits_made_while_the_latest_snapshot_is_looked_up_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    fill(store)
    look_up = snapshots.latest_snapshot
    late = ["s3"]

    def overtaken(where: Store) -> Snapshot | None:
        if late:
            commit_rows(where, late.pop(), [make_row("k9")])
            build_snapshot(where)
        return look_up(where)

    monkeypatch.setattr(snapshots, "latest_snapshot", overtaken)

    build_snapshot(store)

    reader = SnapshotReader(store=store, snapshot=look_up(store))
    assert "k9" in list(reader.keys())


def test_records_and_indexes_are_read_at_once_and_give_what_reading_in_turn_gives(
    tmp_path: Path,
) -> None:
    url = f"memory://at-once-{tmp_path.name}"
    store = CountingStore(url, pause_s=0.01)
    for i in range(20):
        commit_rows(store, f"s{i:02d}", [make_row(f"k{i}", num_tokens=2)])

    snapshot = build_snapshot(store)

    assert store.reads == {"commits": 20, "data": 20}
    assert store.most_at_once > 10
    shards = [r["shard"] for r in SnapshotReader(store=store, snapshot=snapshot).file_records()]
    assert shards == [f"s{i:02d}" for i in range(20)]


def test_where_nothing_is_new_the_listing_tells_and_no_record_is_read(tmp_path: Path) -> None:
    store = CountingStore(str(tmp_path))
    fill(store)
    first = build_snapshot(store)
    store.reads.clear()

    assert build_snapshot(store) == first
    assert store.reads == {"snapshots": 1}


def test_work_done_again_after_its_record_was_removed_is_new(store: Store) -> None:
    fill(store)
    first = build_snapshot(store)
    store.delete(layout.commit_path("s1", "f" * 16))

    again = commit_rows(store, "s1", [make_row("k2", seed=2)])

    second = build_snapshot(store)
    assert second.number == first.number + 1
    paths = {r["path"] for r in SnapshotReader(store=store, snapshot=second).file_records()}
    assert again.files[0].path in paths


def test_a_snapshot_without_what_was_added_since_counts_as_the_latest(store: Store) -> None:
    fill(store)
    first = build_snapshot(store)
    path = layout.snapshot_path(0, "snapshot.json")
    record = json.loads(store.read(path))
    for added in ("records", "choices", "checksum"):
        record.pop(added)
    store.put(path, layout.dump_json(record))

    assert build_snapshot(store).segments == first.segments


def test_a_key_of_snapshot_json_that_is_not_known_is_passed_over(store: Store) -> None:
    fill(store)
    first = build_snapshot(store)
    path = layout.snapshot_path(0, "snapshot.json")
    known = parse_record(store.read(path), where=path)
    store.put(path, dump_record({**known, "of a later version": 1}))

    assert latest_snapshot(store) == first


def both_versions(store: Store, *, newest: str = "v2") -> None:
    """Commit shard "s" with two contents of its input, and a shard beside it."""
    commit_rows(store, "other", [make_row("o")])
    for version in ("v1", "v2"):
        commit_rows(
            store,
            "s",
            [make_row(version)],
            commit={"work_fingerprint": version, "committed_at": 2.0 if version == newest else 1.0},
        )


def keys_of(store: Store, snapshot: Snapshot) -> list[str]:
    return list(SnapshotReader(store=store, snapshot=snapshot).keys())


def test_the_work_that_the_run_wants_counts_although_another_is_newer(store: Store) -> None:
    both_versions(store)
    assert keys_of(store, build_snapshot(store)) == ["o", "v2"]

    rolled_back = build_snapshot(store, wanted={"s": "v1"})

    assert keys_of(store, rolled_back) == ["o", "v1"]
    assert rolled_back.number == 1
    assert build_snapshot(store, wanted={"s": "v1", "other": "f" * 16}) == rolled_back
    assert keys_of(store, build_snapshot(store, wanted={"s": "v2"})) == ["o", "v2"]


@pytest.mark.parametrize("wanted", [None, {}, {"s": "v3"}, {"other": "f" * 16}])
def test_a_choice_stands_until_the_shard_is_committed_again(
    store: Store, wanted: dict[str, str] | None
) -> None:
    both_versions(store)
    chosen = build_snapshot(store, wanted={"s": "v1"})
    assert build_snapshot(store, wanted=wanted) == chosen

    commit_rows(store, "later", [make_row("x")])

    assert keys_of(store, build_snapshot(store, wanted=wanted)) == ["o", "v1", "x"]

    third = {"work_fingerprint": "v3", "committed_at": 3.0}
    commit_rows(store, "s", [make_row("v3")], commit=third)
    assert keys_of(store, build_snapshot(store, wanted=wanted)) == ["o", "v3", "x"]


def test_a_choice_that_is_also_the_newest_is_remembered(store: Store) -> None:
    both_versions(store, newest="v1")
    first = build_snapshot(store)
    assert keys_of(store, first) == ["o", "v1"]

    assert build_snapshot(store, wanted={"s": "v1"}) == first
    assert latest_snapshot(store).choices == {"s": ("v1", "v2")}


def test_a_wanted_work_without_a_record_leaves_the_newest(store: Store) -> None:
    both_versions(store)

    assert keys_of(store, build_snapshot(store, wanted={"s": "v9", "unknown": "v1"})) == ["o", "v2"]


@pytest.mark.parametrize("values", [[], [["a", "\u00e9"]], [["a", ""], ["b", "x"], [1, None]]])
def test_a_list_has_the_fingerprint_it_has_as_a_whole(values: list[list[object]]) -> None:
    assert layout.fingerprint_of_list(iter(values)) == layout.fingerprint(values)
