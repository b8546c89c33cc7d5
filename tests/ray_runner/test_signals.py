"""SIGTERM at every stage of a run."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import open_cache
from pipeline.cache.commit import read_commits
from pipeline.errors import ExitCode
from pipeline.ray_runner import run_job
from pipeline.storage import open_store
from tests.fakes import write_corpus
from tests.ray_runner.runs import Harmful, make_job, run, summary

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def signal_when(is_time: Callable[[], bool]) -> None:
    """Send this process a SIGTERM once something is so."""

    def wait_and_send() -> None:
        while not is_time():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_and_send, daemon=True).start()


@pytest.mark.slow
def test_a_signal_stops_the_run_and_the_next_one_finishes_it(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", num_shards=40, num_images=30)
    job = make_job(tmp_path)
    store = open_store(job.config.output.url)

    signal_when(lambda: any(store.list("commits")))
    first = run_job(job)
    second = run_job(make_job(tmp_path))

    assert first.exit_code == ExitCode.INTERRUPTED
    assert 0 < first.num_committed < 40
    assert second.exit_code == ExitCode.OK
    assert len(open_cache(str(tmp_path / "cache"))) == 1200
    assert len(list(read_commits(store))) == 40


@pytest.mark.slow
def test_a_signal_while_actors_load_ends_the_run_before_anything_is_begun(tmp_path: Path) -> None:
    encoder = Harmful(folder=str(tmp_path), act="load_for_ever")
    job = make_job(tmp_path, encoder=encoder)

    signal_when((tmp_path / "loading").exists)
    report = run_job(job)

    assert (report.exit_code, report.num_committed) == (ExitCode.INTERRUPTED, 0)
    assert (report.num_not_started, report.num_abandoned) == (4, 0)
    assert summary(tmp_path)["exit_code"] == 75


@pytest.mark.slow
def test_after_a_signal_shards_in_flight_may_have_time_to_finish(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", num_shards=40, num_images=30)
    job = make_job(tmp_path, drain_s=200.0)

    signal_when(lambda: any((tmp_path / "cache" / "commits").glob("*.json")))
    report = run_job(job)

    assert report.exit_code == ExitCode.INTERRUPTED
    assert report.num_abandoned == 0
    assert report.num_committed + report.num_not_started == 40
    assert report.num_not_started > 0


def test_a_signal_while_planning_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_for_ever(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()

    monkeypatch.setattr("pipeline.ray_runner.make_plan", plan_for_ever)

    report = run(tmp_path)

    assert report.exit_code == ExitCode.INTERRUPTED
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_signal_while_the_snapshot_is_made_costs_only_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_for_ever(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.ray_runner.build_snapshot", build_for_ever)
        first = run(tmp_path)
    second = run(tmp_path)

    assert (first.exit_code, first.num_committed) == (ExitCode.INTERRUPTED, 4)
    assert (second.exit_code, second.num_done_before) == (ExitCode.OK, 4)
    assert second.snapshot is not None
