"""The rejected samples of a cache, through the library and `carve inspect --errors`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cache.commit import claim_identity
from pipeline.carve_shard import ShardCarver
from pipeline.cli import app
from pipeline.errors import CacheFormatError, ExitCode
from pipeline.job import resolve_job
from pipeline.plan import make_plan
from pipeline.rejections import read_rejections
from pipeline.storage import open_store
from tests.fakes import FakeEncoder, encoded_image, fake_config, write_tar

KEY = "näme\u2028with \x1b[31m"


def carve(tmp_path: Path) -> None:
    job = resolve_job(fake_config(tmp_path / "in", tmp_path / "cache"), encoder=FakeEncoder())
    store = open_store(job.config.output.url)
    claim_identity(store, job.identity)
    carver = ShardCarver(job)
    carver.load()
    for shard in make_plan(job, store).todo:
        carver.carve(shard)
    carver.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    good = [(f"{n}.jpg", encoded_image(n)) for n in range(3)]
    write_tar(tmp_path / "in" / "a.tar", [*good, (f"{KEY}.jpg", b"bad"), ("x.txt", b"alone")])
    write_tar(tmp_path / "in" / "b.tar", good)
    carve(tmp_path)
    return tmp_path / "cache"


def test_each_rejected_sample_has_its_shard_and_its_reason(cache: Path) -> None:
    found = [
        (Path(url).name, s.key, s.reason) for url, s in read_rejections(open_store(str(cache)))
    ]

    assert sorted(found) == [("a.tar", KEY, "not_an_image"), ("a.tar", "x", "no_image")]


def test_of_a_shard_that_was_carved_again_only_the_latest_counts(
    cache: Path, tmp_path: Path
) -> None:
    members = [(f"{n}.jpg", encoded_image(n)) for n in range(4)]
    write_tar(tmp_path / "in" / "a.tar", [*members, ("new.jpg", b"")])
    carve(tmp_path)

    assert [s.key for _, s in read_rejections(open_store(str(cache)))] == ["new"]


def test_the_command_prints_one_object_a_line_whatever_a_key_holds(cache: Path) -> None:
    everything = CliRunner().invoke(app, ["inspect", str(cache), "--errors"])
    one = CliRunner().invoke(app, ["inspect", str(cache), "x", "--errors"])

    lines = [json.loads(line) for line in everything.stdout.splitlines()]
    assert {line["key"] for line in lines} == {KEY, "x"}
    assert lines[0].keys() == {"shard", "key", "stage", "reason", "message"}
    assert everything.stdout.isascii()
    assert [json.loads(line)["key"] for line in one.stdout.splitlines()] == ["x"]


def test_a_damaged_table_is_an_error_not_a_list(cache: Path) -> None:
    (table,) = cache.rglob("errors.parquet")
    table.write_bytes(table.read_bytes()[:-9])

    with pytest.raises(CacheFormatError, match="that were written"):
        list(read_rejections(open_store(str(cache))))
    assert CliRunner().invoke(app, ["inspect", str(cache), "--errors"]).exit_code == ExitCode.CONFIG
