"""A shard is done or absent: one record, put if absent, after everything else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cache import commit as commits
from pipeline.cache import layout
from pipeline.errors import CacheFormatError, ConfigError
from pipeline.storage import Store, open_store
from tests.cache.rows import IDENTITY, commit_rows, make_commit, make_row, make_writer


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "cache"))


def attempt_paths(store: Store, attempt: str) -> list[str]:
    return [entry.path for entry in store.list("data") if f"/{attempt}/" in entry.path]


def test_a_record_reads_back_as_it_was_written(store: Store) -> None:
    committed = commit_rows(store, "s", [make_row("a")])

    assert list(commits.read_commits(store)) == [committed]


def test_the_second_attempt_at_the_same_work_loses_and_removes_its_files(store: Store) -> None:
    first = commit_rows(store, "s", [make_row("a")])
    writer = make_writer(store, "s")
    with writer:
        writer.write(make_row("a"))
        writer.finish([])

    standing = commits.try_commit(store, make_commit(writer))

    assert standing == first
    assert attempt_paths(store, writer.attempt) == []
    assert attempt_paths(store, first.attempt) != []


def test_finding_ones_own_record_in_place_is_success(store: Store) -> None:
    committed = commit_rows(store, "s", [make_row("a")])

    again = commits.try_commit(store, committed)

    assert again == committed
    assert attempt_paths(store, committed.attempt) != []


def test_files_without_a_record_are_not_committed(store: Store) -> None:
    with make_writer(store, "s") as writer:
        writer.write(make_row("a"))
        writer.finish([])

    assert commits.list_committed(store) == set()


def test_the_newest_commit_of_a_changed_shard_counts(store: Store) -> None:
    old = commit_rows(store, "s", [make_row("a")])
    new = replace(old, work_fingerprint="0" * 16, committed_at=old.committed_at + 1)

    assert commits.select_current([new, old]) == [new]
    assert commits.select_current([old, new]) == [new]


def test_the_wanted_commit_of_a_shard_counts_and_of_others_the_newest(store: Store) -> None:
    old = commit_rows(store, "s", [make_row("a")])
    new = replace(old, work_fingerprint="0" * 16, committed_at=old.committed_at + 1)
    others = [replace(c, shard_id="t") for c in (old, new)]

    chosen = commits.select_current([*others, old, new], {"s": old.work_fingerprint, "u": "x"})

    assert chosen == [old, others[1]]
    assert commits.select_current([old, new], {"s": "no such record"}) == [new]


def test_a_claimed_cache_refuses_other_settings_and_names_the_difference(store: Store) -> None:
    commits.claim_identity(store, IDENTITY)
    settings = {**IDENTITY["settings"], "carver": {"name": "random", "options": {}}}

    with pytest.raises(ConfigError, match=r"carver\.name: 'uniform_grid' there, 'random' here"):
        commits.claim_identity(store, {**IDENTITY, "fingerprint": "1", "settings": settings})


def test_claiming_again_with_the_same_settings_is_fine(store: Store) -> None:
    first = commits.claim_identity(store, IDENTITY)

    assert commits.claim_identity(store, IDENTITY) == first


def test_a_folder_without_identity_is_no_cache(store: Store) -> None:
    with pytest.raises(CacheFormatError, match="is not a cache"):
        commits.read_identity(store)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"format_version": 1}'])
def test_a_damaged_record_is_named(store: Store, content: bytes) -> None:
    store.put(layout.commit_path("s", "f"), content)

    with pytest.raises(CacheFormatError, match=r"commits/s\.f\.json"):
        list(commits.read_commits(store))


def test_a_newer_format_is_refused(store: Store) -> None:
    committed = commit_rows(store, "s", [make_row("a")])
    newer = {**json.loads(committed.to_json()), "format_version": 2}

    with pytest.raises(CacheFormatError, match="format version 2 is not known"):
        commits.parse_commit(json.dumps(newer).encode(), where="here")
