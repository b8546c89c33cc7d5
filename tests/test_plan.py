"""What a run would do: new, changed, removed and done shards, and what they will come to."""

import builtins
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline import open_cache
from pipeline.cache import layout
from pipeline.cache.commit import Commit, claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.carve_shard import ShardCarver
from pipeline.cli import app, plan_lines
from pipeline.demo.model import copy_model
from pipeline.errors import CacheFormatError, ConfigError
from pipeline.job import Job, resolve_job
from pipeline.plan import Plan, estimate, given_up, make_plan
from pipeline.run_report import FailedShard, RunReport
from pipeline.source import shard_id
from pipeline.storage import Entry, Store, open_store
from tests.cache.indexes import commit_index
from tests.fakes import FakeEncoder, encoded_image, fake_config, write_corpus, write_tar


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "in", num_shards=3, num_images=4)


def job_of(corpus: Path, *, on_changed: str = "reprocess") -> Job:
    cache = corpus.parent / "cache"
    section = {"shards": str(corpus), "on_changed": on_changed}
    return resolve_job(fake_config(corpus, cache, input=section), encoder=FakeEncoder())


def store_of(job: Job) -> Store:
    return open_store(job.config.output.url)


def carve(job: Job) -> list[Commit]:
    """Do what a run does, in this process; return the commits."""
    store, carver = store_of(job), ShardCarver(job)
    claim_identity(store, job.identity)
    carver.load()
    plan = make_plan(job, store)
    commits = [carver.carve(shard) for shard in plan.todo]
    carver.close()
    build_snapshot(store, plan.works)
    return commits


def change(corpus: Path, shard: int) -> None:
    """Write another image in the place of a shard's images."""
    write_tar(corpus / f"shard-{shard:05d}.tar", [("other.jpg", encoded_image(77 + shard))])


def names(plan: Plan, part: str) -> list[str]:
    return [Path(shard.url).stem for shard in getattr(plan, part)]


def test_an_empty_cache_has_everything_new(corpus: Path) -> None:
    job = job_of(corpus)

    plan = make_plan(job, store_of(job))

    assert (plan.num_new, plan.num_done, names(plan, "changed")) == (3, 0, [])
    assert plan.todo_bytes == sum(path.stat().st_size for path in corpus.iterdir())


def test_new_changed_removed_and_done_shards_are_told_apart(corpus: Path) -> None:
    job = job_of(corpus)
    carve(job)
    change(corpus, 1)
    (corpus / "shard-00002.tar").unlink()
    write_tar(corpus / "shard-00009.tar", [("new.jpg", encoded_image(9))])

    plan = make_plan(job, store_of(job))

    assert names(plan, "todo") == ["shard-00001", "shard-00009"]
    assert names(plan, "changed") == ["shard-00001"]
    assert (plan.num_new, plan.num_done) == (1, 1)
    (removed,) = plan.removed
    assert removed.startswith("shard-00002")
    said = "\n".join(plan_lines(plan, None))
    assert "3 shards: 1 done, 2 to do" in said
    assert "1 are new, 1 changed" in said
    assert removed in said


def test_a_changed_shard_is_carved_again(corpus: Path) -> None:
    job = job_of(corpus)
    carve(job)
    change(corpus, 1)

    assert len(carve(job)) == 1

    keys = set(open_cache(job.config.output.url).keys())
    assert "other" in keys
    assert not any(key.startswith("s1-") for key in keys)


def test_a_changed_shard_may_be_an_error(corpus: Path) -> None:
    carve(job_of(corpus))
    change(corpus, 1)
    job = job_of(corpus, on_changed="error")

    with pytest.raises(ConfigError, match=r"1 shards have changed .*shard-00001\.tar; put them"):
        make_plan(job, store_of(job))


def test_a_changed_shard_may_stay_as_it_was(corpus: Path) -> None:
    carve(job_of(corpus))
    before = set(open_cache(str(corpus.parent / "cache")).keys())
    change(corpus, 1)
    write_tar(corpus / "shard-00009.tar", [("new.jpg", encoded_image(9))])
    job = job_of(corpus, on_changed="ignore")

    plan = make_plan(job, store_of(job))
    assert names(plan, "todo") == ["shard-00009"]
    assert "1 changed shards stay" in "\n".join(plan_lines(plan, None))
    carve(job)

    assert set(open_cache(job.config.output.url).keys()) == {*before, "new"}


def test_leaving_shards_as_they_were_gives_no_other_cache(corpus: Path) -> None:
    assert job_of(corpus).fingerprint == job_of(corpus, on_changed="ignore").fingerprint


def test_an_estimate_comes_from_the_last_run_with_images(corpus: Path) -> None:
    job = job_of(corpus)
    store = store_of(job)
    assert estimate(make_plan(job, store), store) is None
    commits = carve(job)
    report = RunReport(run_id="20260101T000000-aaaaaa", started_at=1000.0, finished_at=1036.0)
    for commit in commits:
        report.add(commit)
    report.save(store)
    RunReport(run_id="20260102T000000-bbbbbb").save(store)  # nothing to do, nothing to learn
    for shard in range(3, 6):
        members = [(f"n{shard}-{n}.jpg", encoded_image(shard * 10 + n)) for n in range(4)]
        write_tar(corpus / f"shard-{shard:05d}.tar", members)

    plan = make_plan(job, store)
    coming = estimate(plan, store)

    assert coming is not None
    assert coming.run_id == "20260101T000000-aaaaaa"
    per_image = sum(c.bytes_in for c in commits) / 12
    assert coming.images == round(plan.todo_bytes / per_image)
    assert coming.hours == pytest.approx(plan.todo_bytes / per_image * 3.0 / 3600)
    stored = sum(c.bytes_tokens for c in commits) / 12
    assert coming.output_bytes == pytest.approx(plan.todo_bytes / per_image * stored, abs=1)
    assert f"about {coming.images} images" in "\n".join(plan_lines(plan, coming))


def failed(shard: str, reason: str) -> FailedShard:
    return FailedShard(shard=shard, reason=reason, message="", attempts=1)


def test_shards_given_up_are_named_until_a_commit_covers_them(corpus: Path) -> None:
    job = job_of(corpus)
    store = store_of(job)
    first, second, third = (s.url for s in make_plan(job, store).shards)
    runs = (
        ("20260101T000000-aaaaaa", [failed(first, "truncated"), failed(second, "storage")]),
        ("20260102T000000-bbbbbb", []),
        ("20260103T000000-cccccc", [failed(first, "too_many_rejected"), failed("gone.tar", "x")]),
    )
    for run_id, failures in runs:
        RunReport(run_id=run_id, failed=failures).save(store)
    before = {entry.path: entry.etag for entry in store.list()}

    plan = make_plan(job, store)
    known = given_up(plan, store)

    assert known == {first: "too_many_rejected", second: "storage"}
    said = "\n".join(plan_lines(plan, None, known))
    assert "2 of those to do failed in earlier runs (storage 1, too_many_rejected 1)" in said
    assert first in said and second in said and third not in said
    assert {entry.path: entry.etag for entry in store.list()} == before
    carver = ShardCarver(job)
    carver.load()
    carver.carve(plan.todo[0])
    carver.close()
    plan = make_plan(job, store)
    assert given_up(plan, store) == {second: "storage"}
    (corpus / Path(second).name).unlink()
    assert given_up(make_plan(job, store), store) == {}


def test_damaged_failures_are_named(corpus: Path) -> None:
    job = job_of(corpus)
    store = store_of(job)
    store.put(layout.run_path("20260101T000000-aaaaaa", "failures.parquet"), b"PAR1")

    with pytest.raises(CacheFormatError, match=r"aaaaaa/failures\.parquet is damaged"):
        given_up(make_plan(job, store), store)


def test_the_command_shows_what_failed_and_changes_nothing(tmp_path: Path) -> None:
    copy_model(tmp_path / "model")
    write_corpus(tmp_path / "in", num_shards=2, num_images=1)
    values = {
        "input": {"shards": str(tmp_path / "in")},
        "output": {"url": str(tmp_path / "cache")},
        "encoder": {"name": "llava", "options": {"model": str(tmp_path / "model")}},
        "carver": {"name": "uniform_grid", "options": {"keep_tokens": 4}},
        "codec": {"name": "int8"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    store = open_store(str(tmp_path / "cache"))
    report = RunReport(failed=[failed(str(tmp_path / "in" / "shard-00001.tar"), "truncated")])
    report.save(store)
    before = {entry.path: entry.etag for entry in store.list()}

    result = CliRunner().invoke(app, ["plan", "--config", str(tmp_path / "run.yaml")])

    assert result.exit_code == 0, result.output
    assert "1 of those to do failed in earlier runs (truncated 1)" in result.output
    assert {entry.path: entry.etag for entry in store.list()} == before


class Watched(Store):
    """Counts what is asked of it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked: Counter[str] = Counter()

    def read(self, path: str, *, most: int | None = None) -> bytes:
        self.asked[f"read {path.split('/')[0]}"] += 1
        return super().read(path, most=most)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        self.asked[f"read {path.split('/')[0]}"] += 1
        return super().read_range(path, offset, length)

    def list(self, prefix: str = "", *, temporary: bool = False) -> Iterator[Entry]:
        self.asked[f"list {prefix}"] += 1
        return super().list(prefix, temporary=temporary)

    def list_names(self, prefix: str = "") -> builtins.list[str]:
        self.asked[f"list {prefix}"] += 1
        return super().list_names(prefix)

    def size(self, path: str) -> int:
        self.asked[f"stat {path.split('/')[0]}"] += 1
        return super().size(path)


def test_a_run_with_nothing_to_do_asks_the_store_as_little_for_400_shards_as_for_one(
    tmp_path: Path,
) -> None:
    asked = []
    for count in (1, 400):
        corpus = tmp_path / f"{count}" / "in"
        corpus.mkdir(parents=True)
        for number in range(count):
            (corpus / f"shard-{number:05d}.tar").write_bytes(bytes(1024))
        store = Watched(f"memory://no-op-{count}-{tmp_path.name}")
        config = fake_config(corpus, tmp_path, output={"url": store.url})
        job = resolve_job(config, encoder=FakeEncoder())
        claim_identity(store, job.identity)
        for shard in make_plan(job, store).todo:
            keys = [f"{shard_id(shard)}-{row}" for row in range(2)]
            commit_index(store, shard_id(shard), keys, work=job.work_fingerprint(shard))
        snapshot = build_snapshot(store)
        assert snapshot.num_rows == 2 * count
        store.asked.clear()

        plan = make_plan(job, store)
        assert (len(plan.shards), plan.num_done, plan.todo) == (count, count, [])
        assert given_up(plan, store) == {}
        assert build_snapshot(store, plan.works) == snapshot
        asked.append(store.asked)

    assert asked[0] == asked[1]
    assert asked[1] == {
        "stat carve.json": 1,
        "read carve.json": 1,
        "list commits": 2,  # of the plan, of the snapshot
        "list snapshots": 1,
        "read snapshots": 1,
    }


def test_a_damaged_summary_is_named(corpus: Path) -> None:
    job = job_of(corpus)
    store = store_of(job)
    store.put(layout.run_path("20260101T000000-aaaaaa", "summary.json"), b"{}")

    with pytest.raises(CacheFormatError, match=r"20260101T000000-aaaaaa/summary\.json is damaged"):
        estimate(make_plan(job, store), store)
