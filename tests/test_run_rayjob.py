"""The nightly job against a small Kubernetes API of the tests' own: none can be installed here."""

import datetime
import importlib.util
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner, Result

from jobs.run_rayjob import main
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.run_report import RunReport
from pipeline.storage import open_store
from tests.cache.rows import IDENTITY, commit_rows, make_row
from tests.conftest import ROOT

MANIFEST = ROOT / "configs" / "kuberay" / "rayjob.yaml"
PATH = "/apis/ray.io/v1/namespaces/carve/rayjobs"
COMPLETE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "message": ""}
LOGS = "last available logs (truncated to 20,000 chars):\nfailed with exit code 0\n"


def failed(message: str, *, reason: str = "AppFailed", job: str = "FAILED") -> dict[str, str]:
    return {
        "jobDeploymentStatus": "Failed",
        "jobStatus": job,
        "reason": reason,
        "message": message,
    }


class Api(ThreadingHTTPServer):
    """RayJobs by name; each look at one takes the next of the statuses, the last one stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, dict[str, Any]] = {}
        self.statuses: list[dict[str, str]] = [COMPLETE]
        self.failures: list[int] = []  # answers before the API works; 0: the connection ends
        self.answers_lost = 0  # of creations that took place
        self.is_deleted_once_seen = False


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._fails():
            return
        name = body["metadata"]["name"]
        if name in self.server.objects:
            self._send(409, {"message": f'rayjobs.ray.io "{name}" already exists'})
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        body["metadata"]["creationTimestamp"] = now
        self.server.objects[name] = body
        if self.server.answers_lost:
            self.server.answers_lost -= 1
            self.close_connection = True
            return
        self._send(201, body)

    def do_GET(self) -> None:
        if self._fails():
            return
        found = self.server.objects.get(self.path.removeprefix(f"{PATH}/"))
        if found is None:
            self._send(404, {"message": "not found"})
            return
        statuses = self.server.statuses
        found["status"] = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        if self.server.is_deleted_once_seen:
            self.server.objects.clear()
        self._send(200, found)

    def _fails(self) -> bool:
        if self.server.failures:
            code = self.server.failures.pop(0)
            if code:
                self._send(code, {"message": "etcd is away"})
            self.close_connection = True
            return True
        if self.headers["Authorization"] != "Bearer night-token":
            self._send(401, {"message": "Unauthorized"})
            return True
        return not self.path.startswith(PATH)

    def _send(self, code: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.setattr("jobs.run_rayjob._PAUSE_S", 0.01)
    with Api() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    folder = tmp_path / "account"
    folder.mkdir()
    (folder / "token").write_text("night-token\n")
    (folder / "namespace").write_text("carve")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    values = yaml.safe_load((MANIFEST.parent / "run.yaml").read_text())
    values["output"]["url"] = str(tmp_path / "cache")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def night(api: Api, account: Path, config: Path) -> Any:
    app = typer.Typer()
    app.command()(main)

    def run(*options: str, manifest: Path = MANIFEST) -> Result:
        given = [str(manifest), "--config", str(config), "--server", api.url, "--poll-s", "0.01"]
        given += ["--account", str(account), *options]
        environment = {"JOB_NAME": "carve-nightly-1", "JOB_UID": "uid-1"}
        return CliRunner().invoke(app, given, env=environment)

    return run


def make_certificate(folder: Path) -> Path:
    """Write a certificate of 127.0.0.1 that is its own authority, and its key behind it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path = folder / "server.pem"
    path.write_bytes(private + (folder / "ca.crt").read_bytes())
    return path


def test_it_trusts_the_api_by_the_authority_of_the_service_account_alone(
    api: Api, night: Any, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_certificate(account))
    api.socket = context.wrap_socket(api.socket, server_side=True)
    monkeypatch.setattr("jobs.run_rayjob._PATIENCE_S", 0.0)
    url = api.url.replace("http:", "https:")

    trusted = night("--server", url)
    make_certificate(account)
    foreign = night("--server", url, "--job", "another")

    assert trusted.exit_code == 0, trusted.output
    assert foreign.exit_code == 1
    assert "certificate verify failed" in foreign.output
    assert [*api.objects] == ["carve-nightly-1-run"]


def test_it_creates_the_rayjob_for_its_job_under_a_name_of_its_own(api: Api, night: Any) -> None:
    api.statuses = [{}, {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, COMPLETE]

    result = night()

    assert result.exit_code == 0, result.output
    made = api.objects["carve-nightly-1-run"]
    assert "generateName" not in made["metadata"]
    assert made["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "carve-nightly-1", "uid": "uid-1"}
    ]
    assert made["spec"] == yaml.safe_load(MANIFEST.read_text())["spec"]
    assert "carve-nightly-1-run: Running, job RUNNING" in result.output


def test_a_second_pod_waits_for_the_run_of_the_first(api: Api, night: Any) -> None:
    night()
    api.statuses = [failed(f"Job entrypoint command failed with exit code 3, {LOGS}")]

    result = night()

    assert result.exit_code == 3
    assert "is there already" in result.output
    assert len(api.objects) == 1


def test_a_creation_whose_answer_is_lost_counts_once(api: Api, night: Any) -> None:
    api.answers_lost = 1

    assert night().exit_code == 0
    assert [*api.objects] == ["carve-nightly-1-run"]


def test_it_outlasts_an_api_that_is_away(api: Api, night: Any) -> None:
    api.failures = [503, 0, 429, 500]

    result = night()

    assert result.exit_code == 0, result.output
    assert "etcd is away; trying again" in result.output


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (failed(f"Job entrypoint command failed with exit code 4, {LOGS}"), 4),
        (failed(f"Job entrypoint command failed with exit code 75, {LOGS}"), 75),
        (failed("Job entrypoint command failed with exit code -9. No logs available."), 137),
        (
            failed("The RayJob has passed the deadline", reason="DeadlineExceeded", job="RUNNING"),
            75,
        ),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 75),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "The RayJob spec is invalid"}, 2),
        (failed("Submitter completed but Ray job not found", job=""), 1),
        (failed("log says: Job entrypoint command failed with exit code 3, not at its start"), 1),
    ],
)
def test_it_exits_as_the_run_did(api: Api, night: Any, status: dict[str, str], code: int) -> None:
    api.statuses = [status]

    result = night()

    assert result.exit_code == code, result.output
    assert f"carve-nightly-1-run: exit code {code}" in result.output


def test_where_ray_says_no_code_the_summary_of_the_run_does(
    api: Api, night: Any, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path / "cache"))
    claim_identity(store, IDENTITY)
    commit_rows(store, "s", [make_row("k", seed=0, num_tokens=5)])
    build_snapshot(store)
    api.statuses = [failed("The head is gone", job="RUNNING")]

    before = RunReport(run_id="1", started_at=time.time() - 3600, interrupted=True)
    before.save(store)
    without = night("--job", "carve-nightly-2")
    RunReport(run_id="2", started_at=time.time() + 5, num_duplicates=1).save(store)
    summed_up = night("--job", "carve-nightly-3")

    assert without.exit_code == 1, without.output
    assert "1 shards in 1 commits" in without.output
    assert summed_up.exit_code == 3, summed_up.output


def test_a_deleted_rayjob_is_an_interrupted_run(api: Api, night: Any) -> None:
    api.statuses = [{"jobDeploymentStatus": "Running"}]
    api.is_deleted_once_seen = True

    assert night().exit_code == 75


def test_it_does_not_wait_for_ever(api: Api, night: Any) -> None:
    api.statuses = [{"jobDeploymentStatus": "Initializing"}]

    result = night("--max-hours", "0")

    assert result.exit_code == 1
    assert "Initializing, job not started after 0 hours" in result.output


def test_a_refusal_says_what_kubernetes_said(api: Api, night: Any, account: Path) -> None:
    (account / "token").write_text("of-somebody-else")

    result = night()

    assert result.exit_code == 2
    assert "401 Unauthorized" in result.output
    assert "of-somebody-else" not in result.output


def test_another_kind_of_manifest_is_refused(night: Any) -> None:
    result = night(manifest=MANIFEST.parent / "cronjob.yaml")

    assert result.exit_code == 2
    assert "of a 'CronJob', not of a RayJob" in result.output


def test_ray_still_words_a_failure_so() -> None:
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.submodule_search_locations
    (folder,) = ray.submodule_search_locations
    source = Path(folder, "dashboard", "modules", "job", "job_supervisor.py").read_text()

    assert '"Job entrypoint command "' in source
    assert 'f"failed with exit code {return_code}' in source
