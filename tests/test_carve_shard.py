"""One shard from its bytes to its commit, in one process."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import open_cache
from pipeline.cache import layout
from pipeline.cache.commit import claim_identity, list_committed, read_commits
from pipeline.cache.record import dump_record
from pipeline.carve_shard import ShardCarver
from pipeline.encoders import Pixels
from pipeline.errors import EncodeError, ShardError, StorageError
from pipeline.job import Job, resolve_job
from pipeline.plan import make_plan
from pipeline.source import read_shard
from pipeline.storage import open_store
from pipeline.types import RejectedSample, Sample, VisualTokens
from tests.fakes import FakeEncoder, encoded_image, fake_config, write_corpus, write_tar


def make_job(corpus: Path, cache: Path | str, *, encoder: FakeEncoder | None = None, **sections):
    config = fake_config(corpus, cache, **sections)
    return resolve_job(config, encoder=encoder or FakeEncoder())


def carve_all(job: Job, **options) -> list:
    store = open_store(job.config.output.url)
    claim_identity(store, job.identity)
    carver = ShardCarver(job)
    carver.load()
    commits = [carver.carve(shard, **options) for shard in make_plan(job, store).todo]
    carver.close()
    return commits


def test_every_image_of_a_shard_comes_back_by_key(tmp_path: Path) -> None:
    job = make_job(write_corpus(tmp_path / "in", num_shards=2, num_images=7), tmp_path / "cache")

    commits = carve_all(job)

    assert [c.num_written for c in commits] == [7, 7]
    cache = open_cache(str(tmp_path / "cache"))
    assert list(cache.keys()) == [f"s{s}-i{i:03d}" for s in range(2) for i in range(7)]
    image = cache["s1-i004"]
    assert image.features.shape == (8, 64)
    assert (image.grid, image.width, image.height) == ((1, 4, 4), 48, 40)
    assert cache.columns("s1-i004", ["txt"]) == {"txt": "caption of s1-i004"}


def test_stored_tokens_are_what_encoder_and_carver_gave(tmp_path: Path) -> None:
    job = make_job(
        write_corpus(tmp_path / "in", num_shards=1), tmp_path / "cache", codec={"name": "fp32"}
    )
    carve_all(job)
    encoder = FakeEncoder()
    encoder.load(signals=job.carver.needs)
    from pipeline.decode import DecodeOptions, decode_image

    pixels = decode_image(encoded_image(3), key="k", options=DecodeOptions())
    expected = job.carver.carve(encoder.encode([pixels])[0])[0]

    image = open_cache(str(tmp_path / "cache"))["s0-i003"]

    assert torch.equal(image.features, expected.features)
    assert torch.equal(image.positions, expected.positions)
    assert torch.equal(image.sizes, expected.sizes)
    assert torch.equal(image.ranks, expected.ranks)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_does_not_change_what_is_stored(tmp_path: Path, batch_size: int) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=1, num_images=7)
    carve_all(make_job(corpus, tmp_path / "a"))
    carve_all(make_job(corpus, tmp_path / "b"), batch_size=batch_size)

    a, b = (
        next(open_cache(str(tmp_path / name)).scan(["key", "tokens", "aux", "crc32c"]))
        for name in "ab"
    )

    assert a.to_pylist() == b.to_pylist()


def test_shards_are_added_to_a_cache_in_the_version_it_was_made_with(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=2)
    job = make_job(corpus, tmp_path / "old")
    store = open_store(job.config.output.url)
    store.put_once(layout.IDENTITY_PATH, dump_record({**job.identity}, version=1))

    carve_all(job)
    carve_all(make_job(corpus, tmp_path / "new"))

    columns = {
        name: {
            c
            for part in tmp_path.glob(f"{name}/data/*/*/part-*")
            for c in pq.read_schema(part).names
        }
        for name in ("old", "new")
    }
    assert {"tokens", "aux"} <= columns["old"] and "packed" not in columns["old"]
    assert {"tokens", "aux"}.isdisjoint(columns["new"]) and "packed" in columns["new"]
    old, new = open_cache(str(tmp_path / "old")), open_cache(str(tmp_path / "new"))
    assert (old.identity["format_version"], new.identity["format_version"]) == (1, 2)
    assert [b.to_pylist() for b in old.scan()] == [b.to_pylist() for b in new.scan()]
    assert all(torch.equal(old[key].features, new[key].features) for key in old)


def test_one_bad_image_costs_only_itself(tmp_path: Path) -> None:
    whole = encoded_image(1)
    write_tar(
        tmp_path / "in" / "s.tar",
        [
            ("a.jpg", whole),
            ("b.jpg", whole[: len(whole) // 2]),
            ("c.jpg", b""),
            ("d.jpg", b"not an image at all"),
            ("e.txt", b"no image"),
            ("f.jpg", whole),
            ("g.jpg", whole),
            ("g.txt", b"\xff\xfe not text"),
            ("h.jpg", whole),
        ],
    )
    runner = {"batch_size": 2, "max_bad_ratio": 0.9}

    (commit,) = carve_all(make_job(tmp_path / "in", tmp_path / "cache", runner=runner))

    assert commit.num_read == 8
    assert commit.rejected == {
        "column_not_utf8": 1,
        "corrupt_image": 1,
        "empty_image": 1,
        "no_image": 1,
        "not_an_image": 1,
    }
    assert list(open_cache(str(tmp_path / "cache")).keys()) == ["a", "f", "h"]


def test_an_image_the_encoder_refuses_costs_only_itself_and_keeps_its_key(tmp_path: Path) -> None:
    class Picky(FakeEncoder):
        def preprocess(self, image: Pixels) -> Pixels:
            if image.shape[0] == 33:
                raise EncodeError("too flat", key="", reason="too_elongated")
            return super().preprocess(image)

    members = [("a.jpg", encoded_image(1)), ("flat.jpg", encoded_image(2, size=(40, 33)))]
    write_tar(tmp_path / "in" / "s.tar", members)

    (commit,) = carve_all(make_job(tmp_path / "in", tmp_path / "cache", encoder=Picky()))

    assert (commit.num_written, commit.rejected) == (1, {"too_elongated": 1})
    (errors,) = (tmp_path / "cache" / "data").rglob("errors.parquet")
    assert pq.read_table(errors).to_pylist() == [
        {"key": "flat", "stage": "encode", "reason": "too_elongated", "message": "too flat"}
    ]


def test_a_shard_that_is_mostly_bad_is_not_committed(tmp_path: Path) -> None:
    members = [("a.jpg", encoded_image(1)), ("b.jpg", b"bad"), ("c.jpg", b"bad")]
    write_tar(tmp_path / "in" / "s.tar", members)
    job = make_job(tmp_path / "in", tmp_path / "cache")

    with pytest.raises(ShardError, match=r"2 of 3 samples are bad .*max_bad_ratio"):
        carve_all(job)

    assert list_committed(open_store(job.config.output.url)) == set()
    assert list(open_store(job.config.output.url).list("data")) == []


def test_an_empty_shard_commits_and_is_not_done_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "s.tar", [])
    job = make_job(tmp_path / "in", tmp_path / "cache")

    (commit,) = carve_all(job)

    assert (commit.num_read, commit.files) == (0, ())
    assert make_plan(job, open_store(job.config.output.url)).todo == []
    assert len(open_cache(str(tmp_path / "cache"))) == 0


def test_a_truncated_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=1, num_images=20)
    shard = corpus / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-20000])
    job = make_job(corpus, tmp_path / "cache")

    with pytest.raises(ShardError, match=r"shard-00000\.tar"):
        carve_all(job)

    store = open_store(job.config.output.url)
    assert list_committed(store) == set()
    assert list(store.list("data")) == []


def test_the_whole_part_of_a_truncated_shard_is_committed_if_asked(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=1, num_images=20)
    shard = corpus / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-20000])
    source = {"shards": str(corpus), "on_truncated": "commit_partial"}
    job = make_job(corpus, tmp_path / "cache", input=source)

    (commit,) = carve_all(job)

    assert 0 < commit.num_written < 20
    assert commit.rejected == {"truncated": 1}


@pytest.mark.parametrize("carver", ["uniform_grid", "tokencarve"])
def test_a_non_finite_feature_costs_that_image(tmp_path: Path, carver: str) -> None:
    class Spoiling(FakeEncoder):
        def encode_pixels(self, prepared):
            groups = super().encode_pixels(prepared)
            groups[0].features[0, 0, 0] = float("nan")
            return groups

    corpus = write_corpus(tmp_path / "in", num_shards=1, num_images=8)
    plugin = {"name": carver, "options": {"keep_ratio": 1.0}}
    job = make_job(corpus, tmp_path / "cache", encoder=Spoiling(), carver=plugin)

    (commit,) = carve_all(job)

    assert commit.rejected == {"non_finite": 2}
    assert commit.num_written == 6


class Stumbling(FakeEncoder):
    """Fails in the stage it is told to."""

    def preprocess(self, image: Pixels) -> Pixels:
        if self.salt == 1:
            raise RuntimeError("preprocess failed")
        return super().preprocess(image)

    def encode_pixels(self, prepared):
        if self.salt == 2:
            raise RuntimeError("encode failed")
        return super().encode_pixels(prepared)


@pytest.mark.parametrize(("salt", "message"), [(1, "preprocess failed"), (2, "encode failed")])
def test_a_fault_in_any_stage_ends_all_threads_and_leaves_nothing(
    tmp_path: Path, salt: int, message: str
) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=1, num_images=30)
    runner = {"batch_size": 2, "queue_mib": 1}
    job = make_job(corpus, tmp_path / "cache", encoder=Stumbling(salt=salt), runner=runner)
    before = {t.name for t in threading.enumerate()}

    with pytest.raises(RuntimeError, match=message):
        carve_all(job)

    assert {t.name for t in threading.enumerate() if t.name.startswith("shard")} <= before
    assert list(open_store(job.config.output.url).list("data")) == []


def test_an_output_that_vanishes_is_a_storage_error(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=1)
    job = make_job(corpus, f"memory://gone-{tmp_path.name}")
    store = open_store(job.config.output.url)
    claim_identity(store, job.identity)
    carver = ShardCarver(job)
    carver.load()
    (shard,) = make_plan(job, store).todo
    (corpus / "shard-00000.tar").unlink()

    with pytest.raises(StorageError, match="shard-00000"):
        carver.carve(shard)


def test_two_attempts_at_once_commit_one(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=1, num_images=20)
    job = make_job(corpus, tmp_path / "cache")
    store = open_store(job.config.output.url)
    claim_identity(store, job.identity)
    carvers = [ShardCarver(replace(job, encoder=FakeEncoder())) for _ in range(2)]
    (shard,) = make_plan(job, store).todo
    standing = []

    def carve(carver: ShardCarver) -> None:
        carver.load()
        standing.append(carver.carve(shard))

    threads = [threading.Thread(target=carve, args=(c,)) for c in carvers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert standing[0] == standing[1]
    (commit,) = read_commits(store)
    assert {e.path.split("/")[2] for e in store.list("data")} == {commit.attempt}


def test_a_prefix_of_a_nested_carving_equals_carving_to_that_many(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=1, num_images=5)
    for keep in (5, 12):
        carver = {"name": "uniform_grid", "options": {"keep_tokens": keep}}
        carve_all(make_job(corpus, tmp_path / str(keep), carver=carver))

    large = open_cache(str(tmp_path / "12"), keep_tokens=5)
    small = open_cache(str(tmp_path / "5"))

    for key in small.keys():  # noqa: SIM118  (a cache is no dict)
        assert torch.equal(large[key].features, small[key].features)
        assert torch.equal(large[key].positions, small[key].positions)
        assert torch.equal(large[key].ranks, small[key].ranks)


def test_a_prefix_of_a_merging_carver_is_announced_as_an_approximation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=1)
    carver = {"name": "average_pool", "options": {"keep_tokens": 4}}
    carve_all(make_job(corpus, tmp_path / "cache", carver=carver))

    cache = open_cache(str(tmp_path / "cache"), keep_tokens=2)

    assert "not nested" in caplog.text
    assert cache["s0-i000"].features.shape[0] == 2


def test_images_of_several_grids_keep_their_order(tmp_path: Path) -> None:
    class TwoGrids(FakeEncoder):
        def encode_pixels(self, prepared):
            groups = []
            for parity in (0, 1):
                chosen = [i for i, p in enumerate(prepared) if int(p[0, 0, 0]) % 2 == parity]
                if chosen:
                    (group,) = super().encode_pixels([prepared[i] for i in chosen])
                    groups.append(replace(group, image_indices=tuple(chosen)))
            return groups

    corpus = write_corpus(tmp_path / "in", num_shards=1, num_images=9)
    carve_all(make_job(corpus, tmp_path / "plain"))
    carve_all(make_job(corpus, tmp_path / "mixed", encoder=TwoGrids()))

    plain, mixed = (open_cache(str(tmp_path / n)) for n in ("plain", "mixed"))

    for key in plain.keys():  # noqa: SIM118
        assert np.allclose(plain[key].features, mixed[key].features, atol=1e-6)


def test_text_beside_the_images_counts_towards_what_is_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"x" * (1 << 20)
    members = [
        (f"k{number:02d}.{suffix}", content)
        for number in range(40)
        for suffix, content in (("jpg", encoded_image(number)), ("txt", text))
    ]
    write_tar(tmp_path / "in" / "shard.tar", members)
    read: list[str] = []
    ahead: list[int] = []

    def watched(*args: object) -> Iterator[Sample | RejectedSample]:
        for sample in read_shard(*args):
            read.append(sample.key)
            yield sample

    @dataclass(kw_only=True)
    class Slow(FakeEncoder):
        def encode_pixels(self, prepared: Sequence[Pixels]) -> list[VisualTokens]:
            if not ahead:
                before = -1
                while before != len(read):  # until the reader waits
                    before = len(read)
                    time.sleep(0.3)
                ahead.append(len(read))
            return super().encode_pixels(prepared)

    monkeypatch.setattr("pipeline.shard_pipeline.read_shard", watched)
    runner = {"num_actors": 1, "gpus_per_actor": 0, "batch_size": 4, "queue_mib": 4}
    job = make_job(tmp_path / "in", tmp_path / "cache", encoder=Slow(), runner=runner)
    (commit,) = carve_all(job)

    assert commit.num_written == 40
    assert ahead[0] <= 4 + 4 + 2  # a batch at the encoder, the queue, one at either end of it
