"""What operators see of a run: metrics, log lines of actors, the summary, a notification."""

import io
import json
import logging
import platform
import re
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from pipeline.errors import ConfigError
from pipeline.ray_runner import METRICS, run_job
from pipeline.run_report import RunReport
from pipeline.storage import open_store
from tests.fakes import encoded_image, write_tar
from tests.ray_runner.runs import Harmful, make_job, run, summary, write_marked_corpus

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@dataclass(frozen=True, kw_only=True)
class Eventful:
    """A run in which a sample is bad, a shard is damaged, and an actor dies."""

    folder: Path
    report: RunReport
    log: list[logging.LogRecord]


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Eventful:
    folder = tmp_path_factory.mktemp("eventful")
    corpus = write_marked_corpus(folder / "in", num_shards=4)
    shard = corpus / "shard-00002.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    good = [(f"g{n}.jpg", encoded_image(n)) for n in range(3)]
    write_tar(corpus / "shard-00003.tar", [*good, ("bad.jpg", b"bad")])
    kept, logger = Kept(), logging.getLogger("pipeline")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(kept)
    report = run(folder, "kill_once", log_format="json")
    logger.removeHandler(kept)
    logger.setLevel(level)
    return Eventful(folder=folder, report=report, log=kept.records)


def scrape(run_id: str) -> Mapping[str, Mapping[str, float]]:
    """Return the values of a run's metrics by name and by tag, "" where there is none."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        text = reply.read().decode()
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, labels, value in re.findall(r"(?m)^ray_(carve_\w+)\{(.*)\} (\S+)$", text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        base = name.removesuffix("_total")
        if tags["run"] == run_id:
            found[base][tags.get(METRICS[base].tag, "")] = float(value)
    return found


def scrape_until(run_id: str, name: str, value: float, seconds: float = 90) -> object:
    deadline = time.monotonic() + seconds
    while (found := scrape(run_id)).get(name, {}).get("") != value:
        assert time.monotonic() < deadline, found
        time.sleep(0.3)
    return found


@pytest.mark.slow
def test_metrics_reach_the_prometheus_endpoint(eventful: Eventful) -> None:
    report = eventful.report

    found = scrape_until(report.run_id, "carve_images", report.num_images)

    assert found["carve_shards"] == {"committed": 3, "failed": 1}
    assert found["carve_shards_failed"] == {"truncated": 1}
    assert found["carve_samples_rejected"] == {"not_an_image": 1}
    assert found["carve_actors_lost"] == {"actor_lost": 1}
    assert found["carve_retries"] == report.retries
    assert found["carve_tokens"] == {"full": report.tokens_full, "kept": report.tokens_kept}
    assert found["carve_read_bytes"] == {"": report.bytes_in}
    assert found["carve_token_bytes"] == {"": report.bytes_tokens}
    spent = {stage: seconds for stage, seconds in report.stage_seconds.items() if seconds}
    assert found["carve_stage_seconds"] == pytest.approx(spent)
    assert found["carve_shards_left"] == {"": 0}
    assert found["carve_batch_size"] == {"": 2}
    gauges = {name for name, metric in METRICS.items() if metric.kind == "gauge"}
    assert gauges < found.keys()


def test_the_summary_and_the_failures_say_what_happened(eventful: Eventful) -> None:
    report = eventful.report

    said = summary(eventful.folder)
    assert (said["run_id"], said["host"]) == (report.run_id, platform.node())
    assert said["versions"].keys() >= {"carvecache", "torch", "ray", "pyarrow"}
    assert re.fullmatch("[0-9a-f]{16}", said["fingerprint"])
    assert said["exit_code"] == 3
    assert said["finished_at"] - said["started_at"] == pytest.approx(said["seconds"], abs=0.01)
    assert said["images_per_second"] == pytest.approx(8 / said["seconds"], abs=0.02)
    assert said["failed_by_reason"] == {"truncated": 1}
    assert said["rejected_by_reason"] == {"not_an_image": 1}
    assert said["actors_lost_by_reason"] == {"actor_lost": 1}
    assert said["retries_by_reason"]["actor_lost"] >= 1
    assert said["snapshot"] == report.snapshot is not None
    store = open_store(str(eventful.folder / "cache"))
    content = store.read(f"runs/{report.run_id}/failures.parquet")
    (failure,) = pq.read_table(io.BytesIO(content)).to_pylist()
    assert failure.pop("message") == report.failed[0].message
    assert failure == {
        "shard": str(eventful.folder / "in" / "shard-00002.tar"),
        "reason": "truncated",
        "error_class": "permanent",
        "attempts": 1,
        "host": platform.node(),
    }


def test_what_actors_log_reaches_the_driver_with_its_place(eventful: Eventful) -> None:
    (rejected,) = [r for r in eventful.log if getattr(r, "key", None) == "bad"]
    assert rejected.shard.endswith("shard-00003.tar")
    assert rejected.run_id == eventful.report.run_id
    assert re.fullmatch(r"actor-\d", rejected.actor)
    assert (rejected.host, rejected.name) == (platform.node(), "pipeline.carve_shard")
    done = [r for r in eventful.log if hasattr(r, "attempt_id")]
    assert "shard-00003.tar" in {Path(r.shard).name for r in done}


@pytest.mark.slow
def test_a_run_that_fails_tells_so_too(tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    code = "import sys; open(sys.argv[1], 'wb').write(sys.stdin.buffer.read())"
    notify = {"command": [sys.executable, "-c", code, str(told)], "timeout_s": 60.0}
    job = make_job(tmp_path, encoder=Harmful(act="refuse_load"), notify=notify)

    with pytest.raises(ConfigError):
        run_job(job)

    said = json.loads(told.read_text())
    assert said["exit_code"] == 2
    assert "no such weights" in said["error"]
    assert said == summary(tmp_path)
