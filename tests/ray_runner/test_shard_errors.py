"""Errors by class: what is tried again, what is given up, what ends the run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipeline.cache.commit import read_commits
from pipeline.encoders import Pixels
from pipeline.errors import ExitCode
from pipeline.ray_runner import run_job
from pipeline.storage import open_store
from pipeline.types import VisualTokens
from tests.fakes import FakeEncoder, encoded_image, write_corpus, write_tar
from tests.ray_runner.runs import MARKED_HEIGHT, make_job, run, summary, write_marked_corpus

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_out_of_memory_halves_the_batch(tmp_path: Path) -> None:
    job = make_job(tmp_path, encoder=FakeEncoder(fail_above=1), batch_size=4, num_actors=1)

    report = run_job(job)

    assert (report.num_committed, report.failed) == (4, [])
    assert report.retries["out_of_memory"] >= 2


@pytest.mark.slow
def test_whatever_the_words_out_of_memory_halves_the_batch(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", num_shards=1, num_images=70)
    job = make_job(tmp_path, encoder=Hungry(), batch_size=64, num_actors=1, max_attempts=1)

    report = run_job(job)

    assert (report.num_committed, report.num_images, report.failed) == (1, 70, [])
    assert report.retries == {"out_of_memory": 6}
    assert (report.batch_size, report.actors_lost) == (1, {})


@pytest.mark.slow
def test_a_batch_of_one_that_does_not_fit_is_a_named_failure_and_no_loop(tmp_path: Path) -> None:
    job = make_job(tmp_path, encoder=Hungry(too_large=33), max_attempts=2, num_actors=1)

    report = run_job(job)

    assert report.num_committed == 3
    assert [(f.reason, f.error_class, f.attempts) for f in report.failed] == [
        ("out_of_memory", "permanent", 2)
    ]
    assert "the large one" in report.failed[0].message
    assert report.exit_code == ExitCode.PARTIAL


@pytest.mark.slow
def test_a_run_that_loses_too_much_commits_nothing_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of each shard a third is bad: too little to fail the shard, too much for the run."""
    for number in range(12):
        good = [(f"{number}-{i}.jpg", encoded_image(i)) for i in range(2)]
        write_tar(tmp_path / "in" / f"{number:02d}.tar", [*good, (f"{number}-bad.jpg", b"bad")])

    report = run(tmp_path, max_bad_ratio_run=0.1, num_actors=1)

    standing = len(list(read_commits(open_store(str(tmp_path / "cache")))))
    assert report.stopped_by == "error_budget"
    assert 8 <= report.num_committed == standing < 12
    assert report.num_not_started >= 1
    assert report.exit_code == ExitCode.PARTIAL
    assert "more than runner.max_bad_ratio_run=0.1 allows" in caplog.text
    assert summary(tmp_path)["stopped_by"] == "error_budget"


def test_a_damaged_shard_is_not_tried_twice(tmp_path: Path) -> None:
    write_marked_corpus(tmp_path / "in", num_shards=3)
    shard = tmp_path / "in" / "shard-00002.tar"
    shard.write_bytes(shard.read_bytes()[:700])

    report = run(tmp_path, num_actors=1)

    assert [(f.reason, f.attempts) for f in report.failed] == [("truncated", 1)]
    assert report.num_committed == 2
    assert report.exit_code == ExitCode.PARTIAL


@pytest.mark.slow
def test_when_every_shard_fails_nothing_is_committed_and_the_code_says_so(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / "in" / f"{number}.tar", [("a.jpg", b"bad")])

    report = run(tmp_path, fail_fast_after=3)

    assert report.exit_code == ExitCode.NOTHING_COMMITTED
    assert 3 <= len(report.failed) < 12


@pytest.mark.slow
def test_good_shards_behind_broken_ones_are_still_carved(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"a{number}.tar").write_bytes(b"")
    write_corpus(tmp_path / "in", num_shards=3, num_images=4)

    report = run(tmp_path, fail_fast_after=3, num_actors=2)

    assert report.num_committed == 3
    assert len(report.failed) == 3


def test_a_fault_in_every_shard_stops_the_run_early_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_corpus(tmp_path / "in", num_shards=12, num_images=1)
    job = make_job(tmp_path, encoder=Failing(), fail_fast_after=2, max_attempts=2)

    report = run_job(job)

    assert report.exit_code == ExitCode.NOTHING_COMMITTED
    assert report.num_not_started >= 6
    assert {f.reason for f in report.failed} <= {"RuntimeError", "actor_replaced"}
    assert {f.message for f in report.failed} == {"a bug"}
    assert re.search(r"stopping: .*RuntimeError.*a bug", caplog.text)


@pytest.mark.slow
def test_one_actor_that_is_lost_says_nothing_about_the_shards_it_had(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", num_shards=4, num_images=4)
    marked = encoded_image(0, size=(40, MARKED_HEIGHT))
    write_tar(tmp_path / "in" / "shard-00000.tar", [("marked.jpg", marked)])

    report = run(tmp_path, "kill_once", num_actors=1, fail_fast_after=1)

    assert (report.num_committed, report.exit_code) == (4, ExitCode.OK)
    assert report.retries["actor_lost"] >= 1


@pytest.mark.slow
def test_a_node_that_is_set_up_wrongly_ends_the_run_and_its_shard_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", num_shards=4, num_images=4)
    marked = encoded_image(0, size=(40, MARKED_HEIGHT))
    write_tar(tmp_path / "in" / "shard-00003.tar", [("marked.jpg", marked)])

    report = run(tmp_path, "misconfigure_always", num_actors=1)

    assert (report.exit_code, report.stopped_by) == (ExitCode.PARTIAL, "config")
    shards = {f.shard.rpartition("/")[2]: f for f in report.failed}
    assert "no driver on this node" in shards["shard-00003.tar"].message
    settled = report.num_committed + len(report.failed)
    assert settled + report.num_abandoned + report.num_not_started == 4


@dataclass(kw_only=True)
class Failing(FakeEncoder):
    """Fails at every image."""

    def preprocess(self, image: Pixels) -> Pixels:
        raise RuntimeError("a bug")


_WORDINGS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
    ),
    MemoryError("Unable to allocate 2.00 GiB for an array"),
)


@dataclass(kw_only=True)
class Hungry(FakeEncoder):
    """Fits one image a batch; says that it is too much in other words for each batch size."""

    too_large: int = 0  # height of an image that does not fit alone either

    def preprocess(self, image: Pixels) -> Pixels:
        if image.shape[0] == self.too_large:
            raise torch.OutOfMemoryError("the large one")
        return super().preprocess(image)

    def encode_pixels(self, prepared: Sequence[Pixels]) -> list[VisualTokens]:
        if len(prepared) > 1 and not self.too_large:
            raise _WORDINGS[len(prepared).bit_length() - 2]
        return super().encode_pixels(prepared)
