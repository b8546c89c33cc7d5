"""Create a RayJob, wait for its end, exit as its run did: what `configs/kuberay/cronjob.yaml` runs.

The RayJob is named after the Kubernetes Job around this process and is created only if absent, so
that a pod in the place of an evicted one waits for the run that is on. It belongs to that Job and
is deleted with it. Its name is the Job's with `-run` behind: KubeRay submits by a Job of the
RayJob's own name, and would take ours for that.

Ray and KubeRay tell only success from failure. The run's exit code is in what they say of a
failure, or in its `summary.json`. Exit codes: those of the run; 1 where it left none; 2 where the
RayJob cannot be created.
"""

import json
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.config import load_config, read_yaml
from pipeline.errors import ConfigError, ExitCode, PipelineError
from pipeline.status import Status, read_status, status_lines
from pipeline.storage import open_store

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
NO_CODE = 1
_TRANSIENT = (408, 429)
_REQUEST_S = 30.0
_PATIENCE_S, _PAUSE_S = 900.0, 5.0  # with an API that is away
_ENDED = ("Complete", "Failed", "ValidationFailed")
_CODE = re.compile(r"Job entrypoint command failed with exit code (-?\d+)")  # Ray's words


class RunUnknownError(PipelineError):
    """It cannot be told how the run ended."""


class RefusedError(PipelineError):
    """Kubernetes will not do what was asked, now or later.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class RayJobs:
    """The RayJobs of this pod's namespace.

    Args:
        server: URL of the Kubernetes API.
        account: folder with `token`, `namespace` and `ca.crt` of the service account.
    """

    def __init__(self, server: str, account: Path) -> None:
        namespace = (account / "namespace").read_text().strip()
        self._url = f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account = account
        self._tls = None
        if server.startswith("https:"):
            self._tls = ssl.create_default_context(cafile=str(account / "ca.crt"))

    def create(self, manifest: Mapping[str, Any]) -> bool:
        """Create a RayJob; return False if there is one of its name."""
        try:
            self._ask("POST", self._url, manifest)
        except RefusedError as err:
            if err.status == 409:
                return False
            raise
        return True

    def get(self, name: str) -> Mapping[str, Any] | None:
        """Return a RayJob, or None if there is none of this name."""
        try:
            return self._ask("GET", f"{self._url}/{name}")
        except RefusedError as err:
            if err.status == 404:
                return None
            raise

    def _ask(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the answer, asking again while the API is not there.

        A repeated POST whose first reply was lost is answered 409, which `create` understands.

        Raises:
            RefusedError: the answer is no.
            RunUnknownError: there was none in time.
        """
        give_up_at = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self._ask_once(method, url, body)
            except urllib.error.HTTPError as err:
                message = f"{method} {url}: {err.code} {_reason(err)}"
                if err.code < 500 and err.code not in _TRANSIENT:
                    raise RefusedError(message, status=err.code) from err
            except (OSError, json.JSONDecodeError) as err:
                message = f"{method} {url}: {err}"
            if time.monotonic() > give_up_at:
                raise RunUnknownError(message)
            print(f"{message}; trying again", file=sys.stderr, flush=True)
            time.sleep(_PAUSE_S)

    def _ask_once(self, method: str, url: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        request = urllib.request.Request(url, method=method)
        # Read each time: Kubernetes renews it.
        token = (self._account / "token").read_text().strip()
        request.add_header("Authorization", f"Bearer {token}")
        request.add_header("Accept", "application/json")
        if body is not None:
            request.add_header("Content-Type", "application/json")
            request.data = json.dumps(body).encode()
        with urllib.request.urlopen(request, timeout=_REQUEST_S, context=self._tls) as reply:
            answer: dict[str, Any] = json.load(reply)
            return answer


def named(manifest: Mapping[str, Any], name: str, *, job: str, uid: str | None) -> dict[str, Any]:
    """Return a RayJob's manifest with a name in place of `generateName`, and a Job as its owner.

    Args:
        manifest: of a RayJob.
        name: of the RayJob.
        job: name of the Job.
        uid: of the Job; None if there is none to own it.

    Raises:
        ConfigError: it is not of a RayJob.
    """
    if manifest.get("kind") != "RayJob":
        raise ConfigError(f"the manifest is of a {manifest.get('kind')!r}, not of a RayJob")
    meta = {k: v for k, v in manifest.get("metadata", {}).items() if k != "generateName"}
    meta["name"] = name
    if uid:
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid}
        meta["ownerReferences"] = [owner]
    return {**manifest, "metadata": meta}


def wait(rayjobs: RayJobs, name: str, *, poll_s: float, hours: float) -> Mapping[str, Any] | None:
    """Return a RayJob once it has ended; None if it was deleted.

    Raises:
        RunUnknownError: it has not ended in so many hours.
    """
    give_up_at, said = time.monotonic() + hours * 3600, ""
    while (rayjob := rayjobs.get(name)) is not None:
        status = rayjob.get("status", {})
        phase = status.get("jobDeploymentStatus", "")
        words = f"{name}: {phase or 'New'}, job {status.get('jobStatus') or 'not started'}"
        if words != said:
            print(words, flush=True)
            said = words
        if phase in _ENDED:
            return rayjob
        if time.monotonic() > give_up_at:
            raise RunUnknownError(f"{said} after {hours:g} hours")
        time.sleep(poll_s)
    return None


def exit_code(rayjob: Mapping[str, Any] | None, cache: Status | None) -> int:
    """Return the exit code of the run of a RayJob that has ended.

    Args:
        rayjob: None if it was deleted.
        cache: what the run wrote to, if it can be read.
    """
    if rayjob is None:
        return int(ExitCode.INTERRUPTED)
    status = rayjob["status"]
    if status["jobDeploymentStatus"] == "ValidationFailed":
        return int(ExitCode.CONFIG)
    if status.get("jobStatus") == "SUCCEEDED":
        return int(ExitCode.OK)
    if found := _CODE.match(status.get("message") or ""):
        code = int(found[1])
        return code if code >= 0 else 128 - code  # killed by a signal: as a shell says it
    created = datetime.fromisoformat(rayjob["metadata"]["creationTimestamp"]).timestamp()
    for run in cache.runs if cache is not None else ():
        if run["started_at"] >= created:
            return int(run["exit_code"])
    if status.get("jobStatus") == "STOPPED" or status.get("reason") == "DeadlineExceeded":
        return int(ExitCode.INTERRUPTED)
    return NO_CODE


def main(  # noqa: PLR0913  (one argument a flag)
    manifest: Annotated[Path, typer.Argument(help="YAML file of the RayJob.")],
    job: Annotated[str, typer.Option(envvar="JOB_NAME", help="Name of the Job around this.")],
    config: Annotated[Path, typer.Option(help="YAML file of the run, for its cache.")],
    uid: Annotated[str | None, typer.Option(envvar="JOB_UID", help="Of that Job.")] = None,
    server: Annotated[str, typer.Option(help="The API.")] = "https://kubernetes.default.svc",
    account: Annotated[Path, typer.Option(help="Folder of the service account.")] = ACCOUNT,
    poll_s: Annotated[float, typer.Option(min=0.01, help="Seconds between two looks.")] = 15.0,
    max_hours: Annotated[float, typer.Option(min=0, help="Wait no longer.")] = 24.0,
) -> None:
    """Create a RayJob if it is absent, wait for its end, and exit as its run did."""
    name = f"{job}-run"
    try:
        url = load_config(config).output.url
        rayjobs = RayJobs(server, account)
        made = rayjobs.create(named(read_yaml(manifest), name, job=job, uid=uid))
        print(f"{name}: {'created' if made else 'is there already'}", flush=True)
        rayjob = wait(rayjobs, name, poll_s=poll_s, hours=max_hours)
    except (ConfigError, RefusedError) as err:
        print(f"error: {err}", file=sys.stderr)
        raise typer.Exit(int(ExitCode.CONFIG)) from err
    except RunUnknownError as err:
        print(f"error: {err}; the RayJob goes on without this process", file=sys.stderr)
        raise typer.Exit(NO_CODE) from err
    if rayjob is None:
        print(f"{name}: was deleted")
    elif message := rayjob["status"].get("message"):
        print(f"{name}: {rayjob['status'].get('reason') or ''} {message}")
    code = exit_code(rayjob, _look(url))
    print(f"{name}: exit code {code}")
    raise typer.Exit(code)


def _look(url: str) -> Status | None:
    """Print the status of the cache and return it, or say why it cannot be read."""
    try:
        found = read_status(open_store(url), num_runs=1)
    except PipelineError as err:
        print(f"the cache cannot be read: {err}", file=sys.stderr)
        return None
    for line in status_lines(found, url):
        print(line)
    return found


def _reason(err: urllib.error.HTTPError) -> str:
    """Return what the API says in words."""
    body = err.read().decode("utf-8", "replace")
    try:
        return str(json.loads(body)["message"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return " ".join(body.split())[:200]


if __name__ == "__main__":
    typer.run(main)
