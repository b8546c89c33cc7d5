"""A snapshot is a sorted view of all commits, immutable, and made only when something is new."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.cache import layout
from pipeline.cache import snapshot as snapshots
from pipeline.cache.reader import SnapshotReader
from pipeline.cache.snapshot import Snapshot, build_snapshot, latest_snapshot
from pipeline.cache.verify import find_damage
from pipeline.errors import CacheFormatError, KeyNotFoundError
from pipeline.storage import Store, open_store
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
        stored = reader.read_tokens(reader.find(f"k{i}"))
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
    assert reader.read_tokens(reader.find("same")).tokens == make_row("", seed=3).packed.tokens


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
        path
        for s in made
        for path in (s.files, s.index, layout.snapshot_path(s.number, "snapshot.json"))
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
