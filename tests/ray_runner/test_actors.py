"""Actors that die, hang, stumble or never start."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import open_cache
from pipeline.errors import ConfigError, ExitCode
from pipeline.ray_runner import run_job
from tests.fakes import FakeEncoder
from tests.ray_runner.runs import make_job, run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_the_shards_of_a_killed_actor_are_done_elsewhere(tmp_path: Path) -> None:
    report = run(tmp_path, "kill_once")

    assert (report.num_committed, report.failed) == (4, [])
    assert report.retries["actor_lost"] >= 1
    assert len(open_cache(str(tmp_path / "cache"))) == 13


@pytest.mark.slow
def test_a_shard_that_kills_every_actor_is_given_up_and_the_rest_is_done(tmp_path: Path) -> None:
    report = run(tmp_path, "kill_always", max_attempts=2)

    assert report.num_committed == 3
    assert [(Path(f.shard).name, f.reason, f.attempts) for f in report.failed] == [
        ("shard-00001.tar", "actor_lost", 2)
    ]
    assert report.exit_code == ExitCode.PARTIAL
    assert len(open_cache(str(tmp_path / "cache"))) == 12


@pytest.mark.slow
def test_a_poisoned_shard_is_reported_without_stopping_the_rest(tmp_path: Path) -> None:
    report = run(tmp_path, "raise_always", max_attempts=2)

    assert report.num_committed == 3
    assert [(f.reason, f.attempts) for f in report.failed] == [("RuntimeError", 2)]
    assert "poison" in report.failed[0].message


@pytest.mark.slow
def test_a_hung_actor_is_killed_and_its_shard_done_elsewhere(tmp_path: Path) -> None:
    report = run(tmp_path, "hang_once", heartbeat_s=4.0, duplicate_tail=None)

    assert (report.num_committed, report.failed) == (4, [])
    assert report.retries["actor_hung"] >= 1


@pytest.mark.slow
def test_an_actor_that_always_hangs_is_killed_each_time_and_the_rest_is_done(
    tmp_path: Path,
) -> None:
    """It hangs with the interpreter's lock held: not even its other threads answer."""
    report = run(tmp_path, "hang_hard_always", heartbeat_s=3.0, max_attempts=2)

    assert report.num_committed == 3
    assert [(f.reason, f.error_class, f.attempts) for f in report.failed] == [
        ("actor_hung", "transient", 2)
    ]
    assert report.actors_lost == {"actor_hung": 2}
    assert len(open_cache(str(tmp_path / "cache"))) == 12


@pytest.mark.slow
def test_an_actor_that_is_stopped_is_killed_and_its_shard_done_elsewhere(tmp_path: Path) -> None:
    report = run(tmp_path, "stop_once", heartbeat_s=3.0, duplicate_tail=None)

    assert (report.num_committed, report.failed) == (4, [])
    assert report.actors_lost == {"actor_hung": 1}


@pytest.mark.slow
def test_weights_that_cannot_be_loaded_end_the_run_as_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such weights"):
        run(tmp_path, "refuse_load")


def test_an_actor_that_fits_nowhere_ends_the_run_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(tmp_path, cpus_per_actor=64, actor_start_s=3.0)

    with pytest.raises(ConfigError, match=r"no actor is ready: not ready after 3 s"):
        run_job(job)

    assert "no node of the cluster can hold an actor of 0 GPU and 64 CPU" in caplog.text


@pytest.mark.slow
def test_other_weights_on_an_actors_host_are_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, encoder=Elsewhere(folder=str(tmp_path)))
    Path(tmp_path, "other weights").touch()

    with pytest.raises(ConfigError, match="is not the one this run was planned with"):
        run_job(job)


@dataclass(kw_only=True)
@dataclass(kw_only=True)
class Elsewhere(FakeEncoder):
    """Describes other weights once a file is there."""

    folder: str = ""

    def describe(self, *args: object) -> dict:
        return {"model": "other" if Path(self.folder, "other weights").exists() else "planned"}
