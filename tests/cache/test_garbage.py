"""What no commit and no snapshot names is found, and nothing else is."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cache import garbage
from pipeline.cache.commit import Commit, claim_identity, try_commit
from pipeline.cache.reader import SnapshotReader
from pipeline.cache.snapshot import build_snapshot, collect_snapshot
from pipeline.cache.snapshot_record import record_path
from pipeline.cli import app
from pipeline.errors import CacheFormatError, StorageError
from pipeline.storage import Entry, Store, open_store
from pipeline.storage._local import TEMPORARY_SUFFIX
from tests.cache.counting import CountingStore
from tests.cache.rows import IDENTITY, commit_rows, make_commit, make_row, make_writer

DAY = 86400.0


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    url = str(tmp_path / "cache") if request.param == "local" else f"memory://gc-{time.time_ns()}"
    store = open_store(url)
    claim_identity(store, IDENTITY)
    return store


def attempt(store: Store, shard_id: str) -> Commit:
    """Write an attempt and return the record it would have."""
    writer = make_writer(store, shard_id)
    with writer:
        writer.write(make_row("a"))
        writer.finish([])
    return make_commit(writer)


def found(store: Store, *, grace_s: float = 0.0, now: float | None = None) -> set[str]:
    # Clocks of files tick more coarsely than ours.
    at = time.time() + 1 if now is None else now
    return {g.path for g in garbage.find_garbage(store, grace_s=grace_s, now=at)}


def clear(store: Store) -> None:
    for piece in list(garbage.find_garbage(store, grace_s=0, now=time.time() + 1)):
        garbage.remove(store, piece)


def contents(store: Store) -> set[str]:
    return {entry.path for entry in store.list(temporary=True)}


def test_a_cache_that_is_whole_has_no_garbage(store: Store) -> None:
    for shard in ("a", "b"):
        commit_rows(store, shard, [make_row(shard)])
    build_snapshot(store)

    assert found(store) == set()


def test_attempts_without_a_record_go_and_those_with_one_stay(store: Store) -> None:
    kept = [commit_rows(store, shard, [make_row(shard)]) for shard in ("a", "b")]
    build_snapshot(store)
    whole = contents(store)
    left = [attempt(store, shard) for shard in ("a", "a", "c")]

    assert found(store) == {f"data/{c.shard_id}/{c.attempt}" for c in left}
    clear(store)

    assert contents(store) == whole
    assert all(store.exists(file.path) for commit in kept for file in commit.files)
    assert found(store) == set()


def test_an_attempt_goes_though_its_shard_was_committed_empty(store: Store) -> None:
    """As many records as attempts, and yet the record is not of this attempt: it has no files."""
    commit_rows(store, "a", [])
    build_snapshot(store)
    orphan = attempt(store, "a")

    assert found(store) == {f"data/a/{orphan.attempt}"}


def test_what_the_latest_snapshot_names_is_known_without_reading_its_record(store: Store) -> None:
    for shard in ("a", "b", "c"):
        commit_rows(store, shard, [make_row(shard)])
    build_snapshot(store)
    commit_rows(store, "d", [make_row("d")])
    orphan = attempt(store, "b")

    counting = CountingStore(store.url)

    assert found(counting) == {f"data/b/{orphan.attempt}"}
    # Of the shard that has an attempt too many, and of the one that no snapshot covers yet.
    assert counting.reads["commits"] == 2


def test_the_probe_of_a_killed_run_goes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents(store)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", lambda *_: None)  # it did not come to that
        store.check_writable()

    (probe,) = contents(store) - whole
    assert found(store) == {probe}
    clear(store)

    assert contents(store) == whole


def test_an_overtaken_commit_keeps_its_files(store: Store) -> None:
    old = commit_rows(store, "a", [make_row("a")], commit={"work_fingerprint": "1" * 16})
    build_snapshot(store)
    new = commit_rows(store, "a", [make_row("a")], commit={"work_fingerprint": "2" * 16})
    build_snapshot(store)
    orphan = attempt(store, "a")

    assert found(store) == {f"data/a/{orphan.attempt}"}
    clear(store)

    assert all(store.exists(file.path) for commit in (old, new) for file in commit.files)


def test_what_is_young_stays(store: Store) -> None:
    orphan = attempt(store, "a")

    assert found(store, grace_s=DAY) == set()
    later = time.time() + DAY + 60
    assert found(store, grace_s=DAY, now=later) == {f"data/a/{orphan.attempt}"}


def test_an_attempt_that_is_committed_while_garbage_is_looked_for_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing of attempts is older than that of records, however long it takes."""
    other = commit_rows(store, "a", [make_row("a")])
    record = replace(attempt(store, "b"), committed_at=time.time())
    listed = garbage.list_records

    def commit_first(of: Store) -> list[Entry]:
        try_commit(of, record)
        return listed(of)

    monkeypatch.setattr(garbage, "list_records", commit_first)

    assert found(store) == set()
    assert other.attempt != record.attempt


def test_tables_of_a_snapshot_that_was_not_published_go(store: Store) -> None:
    commit_rows(store, "a", [make_row("a")])
    snapshot = build_snapshot(store)
    lost, _ = collect_snapshot(store)
    for path in lost.paths:
        store.put(path, b"of a driver that lost the number")
    before = {*snapshot.paths}

    gone = found(store)

    assert gone == {*lost.paths}
    assert len(gone) == 3
    assert not gone & before
    clear(store)
    assert before <= contents(store)


def test_tables_that_later_snapshots_took_over_stay(store: Store) -> None:
    commit_rows(store, "a", [make_row(f"a{n}", num_tokens=1) for n in range(3)])
    first = build_snapshot(store)
    commit_rows(store, "b", [make_row("a0", num_tokens=1)])
    second = build_snapshot(store)
    store.delete(record_path(first.number))  # as one who wants to be rid of old snapshots may

    clear(store)

    left = {e.path for e in store.list("snapshots")}
    assert left == {*second.paths, record_path(second.number)}
    assert list(SnapshotReader(store=store, snapshot=second).keys()) == ["a0", "a1", "a2"]


def test_what_a_killed_writer_left_on_a_disk_goes(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "cache"))
    claim_identity(store, IDENTITY)
    committed = commit_rows(store, "a", [make_row("a")])
    folder = tmp_path / "cache" / Path(committed.files[0].path).parent
    (folder / f"part-00001.parquet.x{TEMPORARY_SUFFIX}").write_bytes(b"half")

    assert len(found(store)) == 1
    clear(store)
    assert found(store) == set()
    assert all(store.exists(file.path) for file in committed.files)


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data" / "a" / "b").mkdir(parents=True)
    (tmp_path / "data" / "a" / "b" / "thesis.txt").write_text("the only copy")

    with pytest.raises(CacheFormatError, match="is not a cache"):
        found(open_store(str(tmp_path)))


def test_a_damaged_record_stops_it_all(store: Store) -> None:
    committed = commit_rows(store, "a", [make_row("a")])
    attempt(store, "a")
    store.put(f"commits/a.{committed.work_fingerprint}.json", b"{")

    with pytest.raises(CacheFormatError, match="not a commit record"):
        found(store)


def test_a_store_that_tells_no_times_is_not_cleared() -> None:
    piece = garbage.Garbage(path="data/a/b", entries=[Entry("x", 1, "", None)], reason="")

    with pytest.raises(StorageError, match="does not say when"):
        _ = piece.modified


def test_the_command_deletes_and_says_what(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "cache"))
    claim_identity(store, IDENTITY)
    commit_rows(store, "a", [make_row("a")])
    orphan = attempt(store, "a")
    whole = contents(store)

    def call(*options: str) -> str:
        result = CliRunner().invoke(app, ["gc", store.url, *options])
        assert result.exit_code == 0, result.output
        return result.output

    assert "0 files" in call()  # within a day of grace
    said = call("--grace", "0", "--dry-run")
    assert f"data/a/{orphan.attempt}: 2 files" in said
    assert "would be deleted" in said
    assert contents(store) == whole
    assert "2 files" in call("--grace", "0")
    assert not (tmp_path / "cache" / "data" / "a" / orphan.attempt).exists()
