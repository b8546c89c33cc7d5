"""The three ways to start a run, each as a user starts it: in a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import open_cache
from pipeline.cache.commit import read_commits
from pipeline.storage import open_store
from tests.conftest import ROOT
from tests.encoders.tiny_models import save_llava
from tests.fakes import encoded_image, write_corpus, write_tar
from tests.servers.process import free_ports

pytestmark = pytest.mark.ray

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_llava(path)
    return path


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    write_corpus(tmp_path / "in", num_shards=3, num_images=4)
    values = {
        "input": {"shards": str(tmp_path / "in")},
        "output": {"url": str(tmp_path / "cache")},
        "encoder": {"name": "llava", "options": {"model": str(model)}},
        "carver": {"name": "tokencarve", "options": {"keep_tokens": 6}},
        "runner": {"num_actors": 2, "batch_size": 4, "progress_s": 0.5},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_script_runs_a_config_and_says_when_nothing_is_left(
    tmp_path: Path, config: Path
) -> None:
    settings = ("--config", config, "--set", "runner.num_actors=1")  # a start takes seconds
    first = start(sys.executable, "jobs/carve_dataset.py", *settings)
    second = start(sys.executable, "jobs/carve_dataset.py", *settings)

    assert first.returncode == 0, first.stderr
    assert "3 shards committed, 0 failed" in first.stdout
    assert second.returncode == 0, second.stderr
    assert f"nothing to do: all 3 shards are in {tmp_path / 'cache'}" in second.stdout
    image = open_cache(str(tmp_path / "cache"))["s2-i003"]
    assert image.features.shape == (6, 32)


class Hook(BaseHTTPRequestHandler):
    """Keeps what is posted to it."""

    def do_POST(self) -> None:
        self.server.posted.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep stderr clean."""


@pytest.fixture
def hook() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.posted = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_command_takes_input_output_and_settings_and_reports_failures(
    tmp_path: Path, config: Path, hook: ThreadingHTTPServer
) -> None:
    """With a log of JSON, each line of stderr is one; the summary is posted; no secret is left."""
    write_tar(tmp_path / "other" / "good.tar", [("a.jpg", encoded_image(1)), ("b.jpg", b"bad")])
    (tmp_path / "other" / "bad.tar").write_bytes(b"not a tar" * 200)
    secret = "T0KEN"

    result = start(
        BIN / "carve",
        "run",
        *("--config", config, "--log-format", "json"),
        *("--input", tmp_path / "other", "--output", tmp_path / "there"),
        *("--set", "runner.num_actors=1", "--set", "codec.name=bf16"),
        *("--set", "notify.webhook_env=CARVE_HOOK"),
        CARVE_HOOK=f"http://127.0.0.1:{hook.server_port}/{secret}",
    )

    assert result.returncode == 3, result.stderr
    assert "1 shards committed, 1 failed" in result.stdout
    assert "bad.tar" in result.stdout
    assert open_cache(str(tmp_path / "there")).identity["settings"]["codec"]["name"] == "bf16"
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert len({line["run_id"] for line in lines}) == 1
    (failed,) = [line for line in lines if line["level"] == "ERROR"]
    assert (failed["shard"], failed["attempt"]) == (str(tmp_path / "other" / "bad.tar"), 1)
    (rejected,) = [line for line in lines if line.get("key") == "b"]
    assert (rejected["actor"], rejected["logger"]) == ("actor-0", "pipeline.carve_shard")
    (posted,) = hook.posted
    (stored,) = (tmp_path / "there" / "runs").glob("*/summary.json")
    assert json.loads(posted) == json.loads(stored.read_text())
    files = [path.read_bytes() for path in (tmp_path / "there").rglob("*") if path.is_file()]
    output = (result.stdout + result.stderr).encode()
    assert not any(secret.encode() in content for content in (*files, output))


def test_a_mistake_in_the_config_is_a_line_of_the_log_too(config: Path) -> None:
    command = [BIN / "carve", "run", "--config", config, "--set", "runner.batch_size=0"]

    result = start(*command, "--log-format", "json")

    (line,) = [json.loads(line) for line in result.stderr.splitlines()]
    assert result.returncode == 2
    assert (line["level"], "runner.batch_size" in line["message"]) == ("ERROR", True)


@pytest.mark.slow
def test_sigterm_ends_the_script_with_75_and_the_same_command_resumes(
    tmp_path: Path, config: Path
) -> None:
    write_corpus(tmp_path / "in", num_shards=60, num_images=40)
    command = [sys.executable, "jobs/carve_dataset.py", "--config", str(config)]

    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as script:
        while not any((tmp_path / "cache" / "commits").glob("*.json")):
            assert script.poll() is None
            time.sleep(0.05)
        script.send_signal(signal.SIGTERM)
        _, log = script.communicate(timeout=60)
    again = start(*command)

    assert script.returncode == 75, log
    assert "SIGTERM: stopping; the same command resumes" in log
    assert again.returncode == 0, again.stderr
    assert " 0 done before" not in again.stdout
    assert len(open_cache(str(tmp_path / "cache"))) == 2400


@contextlib.contextmanager
def head_node(folder: Path) -> Iterator[tuple[str, str]]:
    """Start a Ray head with two pretended GPUs; yield the addresses of cluster and dashboard."""
    names = ("gcs", "dashboard", "client", "agent", "metrics")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    low = 20000 + os.getpid() % 10000  # below the ports that free_ports() is given
    command = [
        *(BIN / "ray", "start", "--head", "--block", "--num-cpus=4", "--num-gpus=2"),
        *("--node-ip-address=127.0.0.1", f"--port={ports['gcs']}"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1"),
        *(f"--dashboard-port={ports['dashboard']}", f"--temp-dir={folder}"),
        *(f"--ray-client-server-port={ports['client']}", "--disable-usage-stats"),
        *(f"--dashboard-agent-listen-port={ports['agent']}",),
        *(f"--metrics-export-port={ports['metrics']}", "--object-store-memory=150000000"),
        *(f"--min-worker-port={low}", f"--max-worker-port={low + 200}"),
    ]
    with open(folder / "head.log", "w") as log:
        head = subprocess.Popen(
            [str(part) for part in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    dashboard = f"http://127.0.0.1:{ports['dashboard']}"
    try:
        wait_for(f"{dashboard}/api/version", head, folder / "head.log")
        yield f"127.0.0.1:{ports['gcs']}", dashboard
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.3)
    raise AssertionError(f"{url} did not answer: {log.read_text()}")


def wait_for_job(url: str, seconds: float = 300) -> tuple[str, str]:
    """Return the last status of a submitted job, and its log."""
    deadline = time.monotonic() + seconds
    while (status := fetch_json(url)["status"]) in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline, f"still {status} after {seconds} s"
        time.sleep(0.5)
    return status, fetch_json(f"{url}/logs")["logs"]


def fetch_json(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return json.load(reply)


@pytest.mark.slow
def test_a_submitted_job_gives_each_actor_its_own_gpu(tmp_path: Path, config: Path) -> None:
    # Enough of them that the second actor, which loads beside the first, still finds some.
    write_corpus(tmp_path / "in", num_shards=40, num_images=40)
    environment = {
        name: os.environ[name]
        for name in ("HOME", "HF_HUB_OFFLINE", "RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE")
    }

    with head_node(Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))) as (_, dashboard):
        # Without --no-wait the command follows the log through a chain of two web sockets, and
        # on a slow machine Ray's own agent may not be up yet: it then fails though the job runs.
        submitted = start(
            *(BIN / "ray", "job", "submit", "--no-wait", "--address", dashboard),
            *("--submission-id", "carve", "--working-dir", "."),
            *("--runtime-env-json", json.dumps({"env_vars": environment})),
            *("--", sys.executable, "jobs/carve_dataset.py", "--config", config),
            RAY_ADDRESS="",
        )
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        status, log = wait_for_job(f"{dashboard}/api/jobs/carve")

    assert status == "SUCCEEDED", log
    assert "40 shards committed, 0 failed" in log
    commits = list(read_commits(open_store(str(tmp_path / "cache"))))
    gpus_by_process = {(c.details["pid"], c.details["cuda_visible_devices"]) for c in commits}
    assert {gpu for _, gpu in gpus_by_process} == {"0", "1"}
    assert len(gpus_by_process) == 2
