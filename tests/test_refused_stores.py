"""Stores that cannot tell who came first: found at start-up and refused, yet good to read from."""

import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pipeline import Batch, CarvedDataset, open_cache
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.cli import app
from pipeline.errors import ConfigError, ExitCode
from pipeline.storage import open_input, open_store, stat_input
from tests.cache.rows import IDENTITY, commit_rows, make_row
from tests.encoders.tiny_models import save_llava
from tests.fakes import write_corpus
from tests.servers.fixtures import bucket_on

REASONS = {
    "swift": r"does not support put-if-absent .*Conditional object PUTs are not supported",
    "rclone": r"ignores put-if-absent \(it let a second writer replace an object\)",
    "gcs_emulator": r"ignores put-if-absent \(it let a second writer replace an object\)",
}


@pytest.fixture(params=REASONS)
def reason(request):
    return REASONS[request.param]


@pytest.fixture
def url(request, reason):
    kind = next(kind for kind in REASONS if kind in request.node.callspec.id)
    with bucket_on(request.getfixturevalue(kind)) as url:
        yield url


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_llava(path)
    return path


def test_a_run_ends_with_2_before_anything_is_written(url, reason, tmp_path, model):
    write_corpus(tmp_path / "in", num_shards=1)
    values = {
        "input": {"shards": str(tmp_path / "in")},
        "output": {"url": f"{url}/cache"},
        "encoder": {"name": "llava", "options": {"model": str(model)}},
        "carver": {"name": "identity"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))

    result = CliRunner().invoke(app, ["run", "--config", str(tmp_path / "run.yaml")])

    assert result.exit_code == ExitCode.CONFIG, result.output
    assert re.search(f"store {url}/cache {reason}", " ".join(result.output.split()))
    assert list(open_store(url).list()) == []


def test_the_probe_names_the_store_and_the_reason_and_leaves_nothing(url, reason):
    store = open_store(url)

    with pytest.raises(ConfigError, match=f"store {url} {reason}.*could overwrite each other"):
        store.check_writable()

    assert list(store.list()) == []


def test_a_cache_put_there_by_other_means_reads_as_the_original(url, tmp_path):
    original = open_store(str(tmp_path / "cache"))
    claim_identity(original, IDENTITY)
    rows = [make_row(f"k{i:02d}", seed=i, num_tokens=10 + i) for i in range(12)]
    commit_rows(original, "a", rows[:7], row_group_bytes=12_000, part_bytes=20_000)
    commit_rows(original, "b", rows[7:])
    build_snapshot(original)
    there = open_store(f"{url}/cache")
    for entry in original.list():
        there.put(entry.path, original.read(entry.path))

    ours, theirs = open_cache(original.url), open_cache(there.url)

    assert list(theirs.keys()) == [f"k{i:02d}" for i in range(12)]
    for key in theirs:
        assert torch.equal(theirs[key].features, ours[key].features)
    assert [row.key for row in CarvedDataset(theirs)] == list(ours.keys())
    shuffled = [
        [b.keys for b in CarvedDataset(c, batch_size=5, shuffle=True)] for c in (ours, theirs)
    ]
    assert shuffled[0] == shuffled[1]
    assert Batch.of_keys(theirs, ["k07", "k03"]).keys == ["k07", "k03"]
    result = CliRunner().invoke(app, ["verify", there.url])
    assert result.exit_code == ExitCode.OK, result.output


def test_shards_are_read_from_there_to_the_last_byte(url, monkeypatch):
    monkeypatch.setattr("pipeline.storage._inputs.CHUNK_BYTES", 64 << 10)
    data = os.urandom(299_999) + b"."  # the emulator of GCS loses a line's end at the end
    open_store(url).put("x.tar", data)

    with open_input(stat_input(f"{url}/x.tar")) as stream:
        assert b"".join(iter(lambda: stream.read(10_007), b"")) == data
