"""A cache's state is told from its store alone, while a run is at work and after."""

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cache import layout
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.cli import app
from pipeline.errors import CacheFormatError
from pipeline.run_report import FailedShard, RunReport
from pipeline.status import read_status, status_lines
from pipeline.storage import Store, open_store
from tests.cache.rows import IDENTITY, commit_rows, make_row, make_writer


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "cache"))
    claim_identity(store, IDENTITY)
    return store


def lines(store: Store, **options: float) -> str:
    return "\n".join(status_lines(read_status(store), "here", **options))


def test_a_new_cache_has_nothing(store: Store) -> None:
    said = lines(store)

    assert "fake, uniform_grid, int8; 0 shards in 0 commits" in said
    assert "no snapshot yet" in said


def test_commits_snapshot_and_runs_are_told(store: Store) -> None:
    for shard in ("a", "b"):
        commit_rows(store, shard, [make_row(f"{shard}{n}", num_tokens=5) for n in range(3)])
    snapshot = build_snapshot(store)
    commit_rows(store, "c", [make_row("c")])
    commit_rows(store, "a", [make_row("a9")], commit={"work_fingerprint": "9" * 16})
    failed = FailedShard(shard="d.tar", reason="truncated", message="", attempts=1)
    for number, failures in ((1, [failed]), (2, [failed, failed])):
        run_id = f"2026010{number}T000000-aaaaaa"
        RunReport(run_id=run_id, started_at=0, finished_at=10, failed=failures).save(store)

    status = read_status(store)

    assert (status.num_shards, status.num_commits, status.num_open) == (3, 4, 0)
    assert status.snapshot == snapshot
    assert [run["run_id"][:8] for run in status.runs] == ["20260102", "20260101"]
    assert status.failures == {"truncated": 2}
    said = lines(store, now=snapshot.created_at + 7200)
    assert f"snapshot {snapshot.number}, 2 h ago: 2 shards, 6 images, 30 tokens" in said
    assert "1 shards are committed and not in it yet" in said
    assert "run 20260102T000000-aaaaaa: exit code 4, 0 committed, 2 failed" in said
    assert "failed in the last run: truncated 2" in said


def test_an_attempt_at_work_is_seen(store: Store) -> None:
    commit_rows(store, "a", [make_row("a")])
    with make_writer(store, "b") as writer:
        writer.write(make_row("b"))
        writer.finish([])

        status = read_status(store)

    assert status.num_open == 1
    assert status.newest_open == pytest.approx(time.time(), abs=60)
    said = lines(store, now=time.time() + 600)
    assert "1 attempts without a commit, the last changed 10 min ago" in said


def test_a_damaged_summary_is_named(store: Store) -> None:
    store.put(layout.run_path("20260101T000000-aaaaaa", "summary.json"), b"[]")

    with pytest.raises(CacheFormatError, match=r"summary\.json is damaged"):
        read_status(store)


def test_the_command_reads_and_changes_nothing(store: Store) -> None:
    commit_rows(store, "a", [make_row("a")])
    before = list(store.list(temporary=True))

    result = CliRunner().invoke(app, ["status", store.url])
    nowhere = CliRunner().invoke(app, ["status", f"{store.url}/nowhere"])

    assert result.exit_code == 0, result.output
    assert "1 shards in 1 commits" in result.output
    assert list(store.list(temporary=True)) == before
    assert nowhere.exit_code == 2
    assert "is not a cache" in nowhere.output
