"""Runs that go on where others ended, and limits of a run."""

import os
from pathlib import Path

import pytest

from pipeline import open_cache
from pipeline.errors import ConfigError, ExitCode, StorageError
from pipeline.job import resolve_job
from pipeline.ray_runner import run_job
from pipeline.storage import Store
from tests.fakes import FakeEncoder, encoded_image, fake_config, write_corpus, write_tar
from tests.ray_runner.runs import make_job, run, summary

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_a_corpus_is_carved_and_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    first = run(tmp_path)
    second = run(tmp_path)

    assert (first.num_committed, first.num_images, first.exit_code) == (4, 13, ExitCode.OK)
    assert (second.num_committed, second.num_done_before, second.exit_code) == (0, 4, ExitCode.OK)
    assert len(open_cache(str(tmp_path / "cache"))) == 13
    assert summary(tmp_path)["shards"] == {
        "total": 4,
        "done_before": 0,
        "committed": 4,
        "failed": 0,
        "abandoned": 0,
        "not_started": 0,
        "left_out": 0,
    }
    assert summary(tmp_path)["peak_rss_bytes"] > 50e6


@pytest.mark.slow
def test_only_what_earlier_runs_gave_up_is_tried_again_if_asked_to(tmp_path: Path) -> None:
    first = run(tmp_path, "raise_always", max_attempts=2)
    write_tar(tmp_path / "in" / "shard-00009.tar", [("new.jpg", encoded_image(5))])

    again = run_job(make_job(tmp_path), retry_failed=True)
    once_more = run_job(make_job(tmp_path), retry_failed=True)
    rest = run(tmp_path)

    assert (first.num_committed, len(first.failed)) == (3, 1)
    assert (again.num_committed, again.num_left_out, again.exit_code) == (1, 1, ExitCode.OK)
    assert (once_more.num_committed, once_more.num_left_out) == (0, 1)
    assert (rest.num_committed, rest.num_left_out) == (1, 0)


@pytest.mark.slow
def test_a_run_may_be_limited_to_some_shards(tmp_path: Path) -> None:
    first = run(tmp_path, max_shards=1)
    second = run(tmp_path, max_shards=2)
    third = run(tmp_path, max_shards=1)

    assert (first.num_committed, first.num_not_started) == (1, 3)
    assert (second.num_committed, second.num_not_started) == (2, 1)
    assert (third.num_committed, third.num_not_started) == (1, 0)
    codes = [report.exit_code for report in (first, second, third)]
    assert codes == [ExitCode.INTERRUPTED, ExitCode.INTERRUPTED, ExitCode.OK]
    assert len(open_cache(str(tmp_path / "cache"))) == 13


@pytest.mark.slow
def test_a_shard_that_was_begun_is_tried_again_within_the_limit(tmp_path: Path) -> None:
    """The marked shard, the second, kills its actor once."""
    report = run(tmp_path, "kill_once", max_shards=2, num_actors=1)

    assert (report.num_committed, report.num_not_started) == (2, 2)
    assert report.retries["actor_lost"] >= 1


@pytest.mark.slow
def test_a_shard_that_ran_out_of_memory_was_begun_and_goes_on_within_the_limit(
    tmp_path: Path,
) -> None:
    job = make_job(
        tmp_path, encoder=FakeEncoder(fail_above=1), batch_size=4, num_actors=1, max_shards=1
    )
    report = run_job(job)

    assert report.retries["out_of_memory"] >= 1
    assert (report.num_committed, report.num_not_started, report.num_abandoned) == (1, 3, 0)


@pytest.mark.slow
def test_after_its_hours_a_run_starts_nothing_and_finishes_what_it_began(tmp_path: Path) -> None:
    first = run(tmp_path, max_hours=1e-9)
    second = run(tmp_path, max_hours=1.0)

    # The hours were over at once, so nothing was begun.
    assert (first.num_committed, first.num_not_started) == (0, 4)
    assert first.exit_code == ExitCode.INTERRUPTED
    assert (second.num_committed, second.exit_code) == (4, ExitCode.OK)


@pytest.mark.slow
def test_a_second_run_carves_only_what_is_new(tmp_path: Path) -> None:
    run(tmp_path)
    write_tar(tmp_path / "in" / "shard-00009.tar", [])

    second = run(tmp_path)

    assert (second.num_committed, second.num_done_before) == (1, 4)


@pytest.mark.slow
def test_a_shard_put_back_to_its_earlier_content_counts_as_it_is(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=1, num_images=2)
    shard = corpus / "shard-00000.tar"
    first, times = shard.read_bytes(), shard.stat()
    job = make_job(tmp_path)
    run_job(job)
    write_tar(shard, [("changed.jpg", encoded_image(9))])
    run_job(job)
    changed = set(open_cache(str(tmp_path / "cache")).keys())

    shard.write_bytes(first)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    back = run_job(job)

    assert changed == {"changed"}
    assert back.num_done_before == 1
    assert set(open_cache(str(tmp_path / "cache")).keys()) == {"s0-i000", "s0-i001"}


def test_other_settings_are_refused_before_anything_starts(tmp_path: Path) -> None:
    run(tmp_path, num_actors=1)

    with pytest.raises(ConfigError, match=r"made with other settings \(encoder.salt: 0 there, 5"):
        run_job(make_job(tmp_path, encoder=FakeEncoder(salt=5)))


@pytest.mark.slow
def test_equal_keys_in_two_shards_are_reported(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / "in" / f"{number}.tar", [("same.jpg", encoded_image(number))])

    report = run(tmp_path)

    assert (report.num_duplicates, report.exit_code) == (1, ExitCode.PARTIAL)
    assert len(open_cache(str(tmp_path / "cache"))) == 1


@pytest.mark.slow
def test_a_relative_output_is_one_place_for_driver_and_actors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=2)
    monkeypatch.chdir(tmp_path)
    settings = {"num_actors": 1, "gpus_per_actor": 0, "batch_size": 2}
    config = fake_config(corpus, "relative/cache", runner=settings)

    report = run_job(resolve_job(config, encoder=FakeEncoder()))

    assert report.exit_code == ExitCode.OK
    assert len(open_cache(str(tmp_path / "relative" / "cache"))) == 10


@pytest.mark.slow
def test_commits_the_driver_cannot_see_are_failures(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=2)
    settings = {"num_actors": 1, "gpus_per_actor": 0, "batch_size": 2}
    # Every process has a memory store of its own, as nodes have disks of their own.
    config = fake_config(corpus, f"memory://{tmp_path.name}", runner=settings)

    report = run_job(resolve_job(config, encoder=FakeEncoder()))

    assert report.exit_code == ExitCode.NOTHING_COMMITTED
    assert {f.reason for f in report.failed} == {"not_shared"}


@pytest.mark.slow
def test_a_store_that_is_away_at_the_end_costs_no_more_than_the_snapshot_and_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put = Store.put

    def refuse(*_: object) -> None:
        raise StorageError("cannot list: 503")

    def put_but_summaries(store: Store, path: str, data: bytes) -> None:
        if path.endswith("summary.json"):
            raise StorageError("cannot write: 503")
        put(store, path, data)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.ray_runner.list_committed", refuse)
        patch.setattr(Store, "put", put_but_summaries)
        first = run(tmp_path)
    second = run(tmp_path)

    assert (first.exit_code, first.num_committed, first.snapshot) == (ExitCode.PARTIAL, 4, None)
    assert (first.snapshot_error, first.summary_error) == ("cannot list: 503", "cannot write: 503")
    assert "the summary could not be stored: cannot write: 503" in caplog.text
    assert (second.exit_code, second.num_done_before) == (ExitCode.OK, 4)
    assert second.snapshot is not None


@pytest.mark.slow
def test_an_error_that_nobody_foresaw_at_the_end_is_in_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("pipeline.ray_runner.build_snapshot", crash)
    with pytest.raises(KeyError):
        run(tmp_path)

    found = summary(tmp_path)
    assert (found["exit_code"], found["error"]) == (ExitCode.CRASHED, "'a bug'")
    assert found["shards"]["committed"] == 4
