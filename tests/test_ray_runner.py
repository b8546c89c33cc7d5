"""The runner on a real local Ray: resume, killed actors, poisoned shards, errors by class."""

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import open_cache
from pipeline.cache.commit import read_commits
from pipeline.encoders import Pixels
from pipeline.errors import ConfigError, ExitCode
from pipeline.job import Job, resolve_job
from pipeline.ray_runner import run_job
from pipeline.run_report import RunReport
from pipeline.storage import open_store
from tests.fakes import FakeEncoder, encoded_image, fake_config, write_corpus, write_tar

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@dataclass(kw_only=True)
class Harmful(FakeEncoder):
    """Harms its own process when it meets a marked image, once or always."""

    folder: str = ""
    act: str = ""  # kill_once, kill_always, hang_once, raise_always, refuse_load

    def load(self, **options: object) -> None:
        if self.act == "refuse_load":
            raise ConfigError("no such weights")
        super().load(**options)

    def preprocess(self, image: Pixels) -> Pixels:
        marked = image.shape[0] == 33  # the height of the marked image
        if marked and self._due():
            if self.act.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.act.startswith("hang"):
                threading.Event().wait()
            raise RuntimeError("poison")
        return super().preprocess(image)

    def _due(self) -> bool:
        if self.act.endswith("always"):
            return True
        flag = Path(self.folder, "done")
        if flag.exists():
            return False
        flag.touch()
        return True


def write_marked_corpus(folder: Path, *, num_shards: int) -> Path:
    write_corpus(folder, num_shards=num_shards, num_images=4)
    write_tar(folder / "shard-00001.tar", [("marked.jpg", encoded_image(0, size=(40, 33)))])
    return folder


def make_job(
    tmp_path: Path, *, encoder: FakeEncoder | None = None, num_shards: int = 4, **runner
) -> Job:
    corpus = tmp_path / "in"
    if not corpus.exists():
        write_marked_corpus(corpus, num_shards=num_shards)
    settings = {"num_actors": 2, "gpus_per_actor": 0, "batch_size": 2, "progress_s": 0.5, **runner}
    config = fake_config(corpus, tmp_path / "cache", runner=settings)
    return resolve_job(config, encoder=encoder or FakeEncoder())


def run(tmp_path: Path, act: str = "", **options) -> RunReport:
    encoder = Harmful(folder=str(tmp_path), act=act) if act else None
    return run_job(make_job(tmp_path, encoder=encoder, **options))


def summary(tmp_path: Path) -> dict:
    (path,) = (tmp_path / "cache" / "runs").glob("*/summary.json")
    return json.loads(path.read_text())


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
        "not_started": 0,
    }
    assert summary(tmp_path)["peak_rss_bytes"] > 50e6


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


def test_a_shard_that_was_begun_is_tried_again_within_the_limit(tmp_path: Path) -> None:
    """The marked shard, the second, kills its actor once."""
    report = run(tmp_path, "kill_once", max_shards=2, num_actors=1)

    assert (report.num_committed, report.num_not_started) == (2, 2)
    assert report.retries["actor_lost"] >= 1


def test_after_its_hours_a_run_starts_nothing_and_finishes_what_it_began(tmp_path: Path) -> None:
    first = run(tmp_path, max_hours=1e-9)
    second = run(tmp_path, max_hours=1.0)

    # The hours were over at once, so nothing was begun.
    assert (first.num_committed, first.num_not_started) == (0, 4)
    assert first.exit_code == ExitCode.INTERRUPTED
    assert (second.num_committed, second.exit_code) == (4, ExitCode.OK)


def test_a_second_run_carves_only_what_is_new(tmp_path: Path) -> None:
    run(tmp_path)
    write_tar(tmp_path / "in" / "shard-00009.tar", [])

    second = run(tmp_path)

    assert (second.num_committed, second.num_done_before) == (1, 4)


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


def test_the_shards_of_a_killed_actor_are_done_elsewhere(tmp_path: Path) -> None:
    report = run(tmp_path, "kill_once")

    assert (report.num_committed, report.failed) == (4, [])
    assert report.retries["actor_lost"] >= 1
    assert len(open_cache(str(tmp_path / "cache"))) == 13


def test_a_shard_that_kills_every_actor_is_given_up_and_the_rest_is_done(tmp_path: Path) -> None:
    report = run(tmp_path, "kill_always", max_attempts=2)

    assert report.num_committed == 3
    assert [(Path(f.shard).name, f.reason, f.attempts) for f in report.failed] == [
        ("shard-00001.tar", "actor_lost", 2)
    ]
    assert report.exit_code == ExitCode.PARTIAL
    assert len(open_cache(str(tmp_path / "cache"))) == 12


def test_a_poisoned_shard_is_reported_without_stopping_the_rest(tmp_path: Path) -> None:
    report = run(tmp_path, "raise_always", max_attempts=2)

    assert report.num_committed == 3
    assert [(f.reason, f.attempts) for f in report.failed] == [("RuntimeError", 2)]
    assert "poison" in report.failed[0].message


def test_a_hung_actor_is_killed_and_its_shard_done_elsewhere(tmp_path: Path) -> None:
    report = run(tmp_path, "hang_once", heartbeat_s=4.0)

    assert (report.num_committed, report.failed) == (4, [])
    assert report.retries["actor_hung"] >= 1


def test_out_of_memory_halves_the_batch(tmp_path: Path) -> None:
    job = make_job(tmp_path, encoder=FakeEncoder(fail_above=1), batch_size=4, num_actors=1)

    report = run_job(job)

    assert (report.num_committed, report.failed) == (4, [])
    assert report.retries["out_of_memory"] >= 2


def test_a_damaged_shard_is_not_tried_twice(tmp_path: Path) -> None:
    write_marked_corpus(tmp_path / "in", num_shards=3)
    shard = tmp_path / "in" / "shard-00002.tar"
    shard.write_bytes(shard.read_bytes()[:700])

    report = run(tmp_path)

    assert [(f.reason, f.attempts) for f in report.failed] == [("truncated", 1)]
    assert report.num_committed == 2
    assert report.exit_code == ExitCode.PARTIAL


def test_when_every_shard_fails_nothing_is_committed_and_the_code_says_so(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / "in" / f"{number}.tar", [("a.jpg", b"bad")])

    report = run(tmp_path, fail_fast_after=3)

    assert report.exit_code == ExitCode.NOTHING_COMMITTED
    assert 3 <= len(report.failed) < 12


def test_weights_that_cannot_be_loaded_end_the_run_as_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such weights"):
        run(tmp_path, "refuse_load")


def test_other_settings_are_refused_before_anything_starts(tmp_path: Path) -> None:
    run(tmp_path)

    with pytest.raises(ConfigError, match=r"made with other settings \(encoder.salt: 0 there, 5"):
        run_job(make_job(tmp_path, encoder=FakeEncoder(salt=5)))


def test_equal_keys_in_two_shards_are_reported(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / "in" / f"{number}.tar", [("same.jpg", encoded_image(number))])

    report = run(tmp_path)

    assert (report.num_duplicates, report.exit_code) == (1, ExitCode.PARTIAL)
    assert len(open_cache(str(tmp_path / "cache"))) == 1


def test_a_signal_stops_the_run_and_the_next_one_finishes_it(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", num_shards=40, num_images=30)
    job = make_job(tmp_path)
    store = open_store(job.config.output.url)

    def stop_after_the_first_commit() -> None:
        while not list(store.list("commits")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_the_first_commit).start()
    first = run_job(job)
    second = run_job(make_job(tmp_path))

    assert first.exit_code == ExitCode.INTERRUPTED
    assert 0 < first.num_committed < 40
    assert second.exit_code == ExitCode.OK
    assert len(open_cache(str(tmp_path / "cache"))) == 1200
    assert len(list(read_commits(store))) == 40


def test_good_shards_behind_broken_ones_are_still_carved(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"a{number}.tar").write_bytes(b"")
    write_corpus(tmp_path / "in", num_shards=3, num_images=4)

    report = run(tmp_path, fail_fast_after=3, num_actors=2)

    assert report.num_committed == 3
    assert len(report.failed) == 3


def test_a_fault_in_every_shard_stops_the_run_early(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", num_shards=12, num_images=1)
    job = make_job(tmp_path, encoder=Failing(), fail_fast_after=2, max_attempts=2)

    report = run_job(job)

    assert report.exit_code == ExitCode.NOTHING_COMMITTED
    assert report.num_not_started >= 6
    assert {f.reason for f in report.failed} <= {"RuntimeError", "stopped", "actor_replaced"}


def test_an_actor_that_fits_nowhere_ends_the_run_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(tmp_path, cpus_per_actor=64, actor_start_s=3.0)

    with pytest.raises(ConfigError, match=r"no actor is ready: not ready after 3 s"):
        run_job(job)

    assert "no node of the cluster can hold an actor of 0 GPU and 64 CPU" in caplog.text


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


def test_commits_the_driver_cannot_see_are_failures(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=2)
    settings = {"num_actors": 1, "gpus_per_actor": 0, "batch_size": 2}
    # Every process has a memory store of its own, as nodes have disks of their own.
    config = fake_config(corpus, f"memory://{tmp_path.name}", runner=settings)

    report = run_job(resolve_job(config, encoder=FakeEncoder()))

    assert report.exit_code == ExitCode.NOTHING_COMMITTED
    assert {f.reason for f in report.failed} == {"not_shared"}


def test_other_weights_on_an_actors_host_are_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, encoder=Elsewhere(folder=str(tmp_path)))
    Path(tmp_path, "other weights").touch()

    with pytest.raises(ConfigError, match="is not the one this run was planned with"):
        run_job(job)


@dataclass(kw_only=True)
class Failing(FakeEncoder):
    """Fails at every image."""

    def preprocess(self, image: Pixels) -> Pixels:
        raise RuntimeError("a bug")


@dataclass(kw_only=True)
class Elsewhere(FakeEncoder):
    """Describes other weights once a file is there."""

    folder: str = ""

    def describe(self, *args: object) -> dict:
        return {"model": "other" if Path(self.folder, "other weights").exists() else "planned"}
