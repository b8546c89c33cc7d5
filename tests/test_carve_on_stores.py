"""A whole run, as a user starts it, with shards and cache on a real object store."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from pipeline import CarvedDataset, open_cache
from pipeline.cache.commit import claim_identity, read_commits
from pipeline.carve_shard import ShardCarver
from pipeline.cli import app
from pipeline.config import load_config
from pipeline.errors import ExitCode
from pipeline.job import resolve_job
from pipeline.plan import make_plan
from pipeline.storage import open_store
from tests.conftest import ROOT
from tests.encoders.tiny_models import save_llava
from tests.fakes import write_corpus
from tests.servers.fault_proxy import FaultProxy

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(params=["s3_url", "azure_url"])
def url(request) -> str:
    return request.getfixturevalue(request.param)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save_llava(tmp_path / "model")
    values = {
        "input": {"shards": str(tmp_path / "in"), "columns": ["txt"]},
        "output": {"url": str(tmp_path / "cache")},
        "encoder": {"name": "llava", "options": {"model": str(tmp_path / "model")}},
        "carver": {"name": "tokencarve", "options": {"keep_tokens": 6}},
        "runner": {"num_actors": 2, "batch_size": 4},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def carve_locally(config: Path) -> str:
    job = resolve_job(load_config(config))
    store = open_store(job.config.output.url)
    claim_identity(store, job.identity)
    carver = ShardCarver(job)
    carver.load()
    for shard in make_plan(job, store).todo:
        carver.carve(shard)
    carver.close()
    return store.url


def run(
    config: Path, url: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/carve_dataset.py", "--config", str(config)]
    return subprocess.run(
        [*command, "--input", f"{url}/in", "--output", f"{url}/cache", *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def carve(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_shards_and_cache_may_both_be_on_the_store(tmp_path: Path, config: Path, url: str) -> None:
    corpus = write_corpus(tmp_path / "in", num_shards=3, num_images=4)
    for shard in sorted(corpus.iterdir()):
        open_store(url).upload(f"in/{shard.name}", str(shard))

    first = run(config, url)
    assert first.returncode == 0, first.stderr
    assert "3 shards committed, 0 failed" in first.stdout

    again = carve("run", "--config", config, "--input", f"{url}/in", "--output", f"{url}/cache")
    verified = carve("verify", f"{url}/cache")
    assert again.exit_code == ExitCode.OK, again.output
    assert "nothing to do: all 3 shards are in" in again.output
    assert verified.exit_code == ExitCode.OK, verified.output
    assert len(list(read_commits(open_store(f"{url}/cache")))) == 3

    expected, cache = open_cache(carve_locally(config)), open_cache(f"{url}/cache")
    assert list(cache.keys()) == list(expected.keys())
    assert len(cache) == 12
    for key in cache:
        assert torch.equal(cache[key].positions, expected[key].positions)
        torch.testing.assert_close(
            cache[key].features, expected[key].features, rtol=0, atol=0.1
        )  # other threads, other last bits, another step of int8
    assert cache.columns("s2-i003", ["txt"]) == {"txt": "caption of s2-i003"}
    assert sorted(row.key for row in CarvedDataset(cache, shuffle=True)) == list(expected.keys())


def test_a_run_leaves_no_secret_anywhere(
    tmp_path: Path, config: Path, proxied_s3: tuple[FaultProxy, str]
) -> None:
    """Not in what it prints, in Ray's logs or in the cache; retries and failures included."""
    proxy, url = proxied_s3
    planted = {"HF_TOKEN": "hf_pLaNtEd0123456789", "AZURE_STORAGE_KEY": "pLaNtEd9876543210"}
    secrets = [*planted.values(), os.environ["AWS_SECRET_ACCESS_KEY"]]
    webhook = f"http://127.0.0.1:9/hook?token={planted['HF_TOKEN']}"
    corpus = write_corpus(tmp_path / "in", num_shards=3, num_images=2)
    (corpus / "shard-00001.tar").write_bytes(b"")
    for shard in sorted(corpus.iterdir()):
        open_store(url).upload(f"in/{shard.name}", str(shard))
    proxy.answer_503(2, method="GET", path="shard-00000")
    ray_folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    values = {**yaml.safe_load(config.read_text()), "notify": {"webhook_env": "HOOK"}}
    config.write_text(yaml.safe_dump(values))

    done = run(
        *(config, url, "--set", "runner.log_format=json"),
        **planted,
        **{"HOOK": webhook, "RAY_TMPDIR": str(ray_folder), "RAY_BACKEND_LOG_LEVEL": "debug"},
    )

    assert done.returncode == ExitCode.PARTIAL, done.stderr
    assert "trying again" in done.stderr
    places = {"printed": (done.stdout + done.stderr).encode()}
    places |= {str(file): file.read_bytes() for file in ray_folder.rglob("*") if file.is_file()}
    cache = open_store(f"{url}/cache")
    places |= {file.path: cache.read(file.path) for file in cache.list("")}
    assert len(places) > 20
    for place, content in places.items():
        for secret in secrets:
            assert secret.encode() not in content, place
