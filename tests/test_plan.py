"""What a run would do: new, changed, removed and done shards, and what they will come to."""

from pathlib import Path

import pytest

from pipeline import open_cache
from pipeline.cache import layout
from pipeline.cache.commit import Commit, claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.carve_shard import ShardCarver
from pipeline.cli import plan_lines
from pipeline.errors import CacheFormatError, ConfigError
from pipeline.job import Job, resolve_job
from pipeline.plan import Plan, estimate, make_plan
from pipeline.run_report import RunReport
from pipeline.storage import Store, open_store
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


def test_a_damaged_summary_is_named(corpus: Path) -> None:
    job = job_of(corpus)
    store = store_of(job)
    store.put(layout.run_path("20260101T000000-aaaaaa", "summary.json"), b"{}")

    with pytest.raises(CacheFormatError, match=r"20260101T000000-aaaaaa/summary\.json is damaged"):
        estimate(make_plan(job, store), store)
