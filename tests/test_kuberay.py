"""The manifests of configs/kuberay: valid by their schemas, and true of this package.

Kubernetes' schemas come with kubernetes-validate, RayJob's is tests/data/rayjob_schema.json.
"""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from jobs.run_rayjob import main, named
from pipeline.cli import app
from pipeline.config import JobConfig, load_config
from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "kuberay"
OLDEST, NEWEST = "1.31", "1.37"  # podFailurePolicy is stable since the first
CONTAINERFILE = FOLDER / "Containerfile"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


RAYJOB = documents("rayjob.yaml")[0]
CRONJOB = documents("cronjob.yaml")[0]
CLUSTER = RAYJOB["spec"]["rayClusterSpec"]
HEAD = CLUSTER["headGroupSpec"]["template"]
WORKERS = CLUSTER["workerGroupSpecs"][0]
NIGHTLY = CRONJOB["spec"]["jobTemplate"]["spec"]
PODS = {"head": HEAD, "worker": WORKERS["template"], "nightly": NIGHTLY["template"]}
SUBMITTER = RAYJOB["spec"]["submitterPodTemplate"]
ALL_PODS = {**PODS, "submitter": SUBMITTER}
CONTAINERS = {name: pod["spec"]["containers"][0] for name, pod in ALL_PODS.items()}


def rayjob_problems(manifest: Mapping[str, Any]) -> list[str]:
    schema = json.loads((ROOT / "tests" / "data" / "rayjob_schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{list(e.absolute_path)}: {e.message}" for e in validator.iter_errors(manifest)]


def as_pod(template: Mapping[str, Any]) -> dict[str, Any]:
    meta = {**template.get("metadata", {}), "name": "x"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]}


def paths(values: Any, *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from paths(value, prefix=f"{prefix}.{key}")
    elif isinstance(values, list):
        for value in values:
            yield from paths(value, prefix=f"{prefix}[]")
    else:
        yield prefix, values


def flags(command: str) -> set[str]:
    parameters = typer.main.get_command(app).commands[command].params
    return {name for parameter in parameters for name in parameter.opts}


def test_the_rayjob_is_one_by_its_schema() -> None:
    assert rayjob_problems(RAYJOB) == []


def test_what_the_nightly_job_makes_of_it_is_one_too() -> None:
    assert rayjob_problems(named(RAYJOB, "carve-nightly-29412345-run", job="x", uid="u")) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backofLimit", 0),
        ("spec.activeDeadlineSeconds", "9h"),
        ("spec.submissionMode", "K8sJob"),
        ("spec.shutdownAfterJobFinishes", False),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.workerGroups", []),
        ("metadata.name", "also-a-name"),
    ],
)
def test_the_schema_of_a_rayjob_refuses_mistakes(path: str, value: object) -> None:
    wrong = json.loads(json.dumps(RAYJOB))
    *parents, last = path.split(".")
    inner = wrong
    for name in parents:
        inner = inner[name]
    inner[last] = value

    assert rayjob_problems(wrong)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_everything_else_is_valid_by_the_schemas_of_kubernetes(version: str) -> None:
    objects = [CRONJOB, *documents("access.yaml"), *(as_pod(pod) for pod in ALL_PODS.values())]

    for found in objects:
        assert kubernetes_validate.validate(found, version, strict=True) == version


def test_the_schemas_of_kubernetes_refuse_mistakes() -> None:
    wrong = json.loads(json.dumps(CRONJOB))
    wrong["spec"]["concurencyPolicy"] = "Forbid"

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, NEWEST, strict=True)


def test_kustomize_brings_all_files_together() -> None:
    (made,) = documents("kustomization.yaml")
    (config,) = made["configMapGenerator"]

    named = [*made["resources"], *config["files"]]
    assert {*named} | {"kustomization.yaml"} == {p.name for p in FOLDER.glob("*.yaml")}
    assert made["generatorOptions"] == {"disableNameSuffixHash": True}
    for pod in PODS.values():
        mounted = [v["configMap"]["name"] for v in pod["spec"]["volumes"] if "configMap" in v]
        assert mounted == [config["name"]]


def test_the_entrypoint_is_a_command_of_ours_with_the_mounted_config() -> None:
    command, subcommand, *arguments = shlex.split(RAYJOB["spec"]["entrypoint"])

    assert (command, subcommand) == ("carve", "run")
    assert {a for a in arguments if a.startswith("--")} <= flags("run")
    assert arguments[arguments.index("--config") + 1] == "/etc/carve/run.yaml"
    assert {"name": "config", "mountPath": "/etc/carve", "readOnly": True} in CONTAINERS["head"][
        "volumeMounts"
    ]


def test_the_nightly_job_runs_a_script_of_ours_with_options_it_has() -> None:
    program, script, manifest, *options = CONTAINERS["nightly"]["command"]
    single = typer.Typer()
    single.command()(main)
    known = typer.main.get_command(single).params

    assert program == "python"
    assert (ROOT / script.removeprefix("/opt/carvecache/")).is_file()
    assert manifest == "/etc/carve/rayjob.yaml"
    assert {o.partition("=")[0] for o in options} <= {n for p in known for n in p.opts}
    environment = {e["name"] for e in CONTAINERS["nightly"]["env"]}
    assert environment == {p.envvar for p in known if p.envvar}


def test_the_config_is_accepted_and_fits_the_cluster() -> None:
    config = load_config(FOLDER / "run.yaml")
    resources = CONTAINERS["worker"]["resources"]["limits"]

    assert isinstance(config, JobConfig)
    assert config.runner.num_actors == WORKERS["maxReplicas"] * int(resources["nvidia.com/gpu"])
    # auto would take the cluster, which begins without a worker, for one without GPUs.
    assert config.runner.gpus_per_actor == 1
    assert 0 < config.runner.cpus_per_actor < int(resources["cpu"])
    assert "{" not in config.input.shards, "braces name a fixed number of shards"


def test_gpus_are_of_the_workers_alone() -> None:
    gpus = {n: c["resources"]["limits"].get("nvidia.com/gpu") for n, c in CONTAINERS.items()}

    assert gpus == {"head": None, "worker": "1", "nightly": None, "submitter": None}
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    tolerated = {t["key"] for t in WORKERS["template"]["spec"]["tolerations"]}
    assert "nvidia.com/gpu" in tolerated
    assert "tolerations" not in HEAD["spec"]


def test_deadlines_end_the_run_before_its_rayjob_and_that_before_its_job() -> None:
    words = shlex.split(RAYJOB["spec"]["entrypoint"])
    hours = float(words[words.index("--max-hours") + 1])
    start_s = load_config(FOLDER / "run.yaml").runner.actor_start_s
    rayjob_s = RAYJOB["spec"]["activeDeadlineSeconds"]

    assert hours * 3600 + start_s < rayjob_s
    assert rayjob_s + RAYJOB["spec"]["ttlSecondsAfterFinished"] < NIGHTLY["activeDeadlineSeconds"]
    assert NIGHTLY["activeDeadlineSeconds"] < 24 * 3600
    (waits,) = [
        int(e["value"])
        for e in CONTAINERS["head"]["env"]
        if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S"
    ]
    assert waits < HEAD["spec"]["terminationGracePeriodSeconds"]


def test_nights_do_not_overlap_and_nothing_is_retried_but_by_the_run() -> None:
    assert CRONJOB["spec"]["concurrencyPolicy"] == "Forbid"
    assert CRONJOB["spec"]["startingDeadlineSeconds"] >= 600
    assert NIGHTLY["backoffLimit"] == 0
    assert RAYJOB["spec"]["backoffLimit"] == 0
    assert {pod["spec"]["restartPolicy"] for pod in ALL_PODS.values()} == {"Never"}
    # Of the RayJob: the CronJob's name, a dash, eight digits of minutes since 1970, `-run`.
    assert len(CRONJOB["metadata"]["name"]) + 9 + len("-run") <= 47


def test_the_head_stops_the_job_that_the_rayjob_names() -> None:
    command = CONTAINERS["head"]["lifecycle"]["preStop"]["exec"]["command"]

    assert command[:3] == ["ray", "job", "stop"]
    assert command[-1] == RAYJOB["spec"]["jobId"]


def test_the_nightly_account_may_create_and_read_rayjobs_and_no_more() -> None:
    found = {f"{d['kind']}/{d['metadata']['name']}": d for d in documents("access.yaml")}
    binding = found["RoleBinding/carve-nightly"]

    assert found["Role/carve-nightly"]["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    ]
    assert binding["roleRef"]["name"] == "carve-nightly"
    assert [s["name"] for s in binding["subjects"]] == ["carve-nightly"]
    accounts = {name: pod["spec"]["serviceAccountName"] for name, pod in PODS.items()}
    assert accounts == {"head": "carve", "worker": "carve", "nightly": "carve-nightly"}
    assert {f"ServiceAccount/{account}" for account in accounts.values()} <= {*found}
    assert PODS["worker"]["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", ALL_PODS)
def test_pods_run_as_a_user_without_privileges(name: str) -> None:
    assert ALL_PODS[name]["spec"]["securityContext"]["runAsNonRoot"] is True
    assert CONTAINERS[name]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


def test_credentials_come_from_a_secret_or_an_identity_never_from_a_manifest() -> None:
    suspicious = re.compile(r"secret|token|password|credential|access_?key|\bsig\b", re.IGNORECASE)

    for name in PODS:
        container = CONTAINERS[name]
        assert container["envFrom"] == [{"secretRef": {"name": "carve-store", "optional": True}}]
        values = [e["name"] for e in container["env"] if "value" in e]
        assert [value for value in values if suspicious.search(value)] == []
    assert "env" not in CONTAINERS["submitter"]
    for path in FOLDER.iterdir():
        assert not re.search(r"AKIA|hf_[A-Za-z0-9]{8}|-----BEGIN|AccountKey=", path.read_text())


def test_what_must_be_edited_is_marked() -> None:
    lines = [
        line
        for path in sorted(FOLDER.glob("*.yaml"))
        for line in path.read_text().splitlines()
        if "CHANGE-ME" in line
    ]
    images = {c["image"] for c in CONTAINERS.values()}

    assert len(images) == 1
    assert images.pop().endswith(":CHANGE-ME")
    assert len(lines) == 4
    assert all("EDIT" in line for line in lines if "shards:" not in line)


def test_a_ray_head_takes_jobs_by_token_and_from_its_namespace_alone() -> None:
    (policy,) = [d for d in documents("access.yaml") if d["kind"] == "NetworkPolicy"]
    jobs, metrics = policy["spec"]["ingress"]

    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert policy["spec"]["podSelector"] == {}
    assert "ports" not in jobs
    assert [*jobs["from"][1]["podSelector"]["matchLabels"].values()] == ["kuberay-operator"]
    assert [port["port"] for port in metrics["ports"]] == [8080]


def test_the_ray_of_the_manifest_is_the_one_that_is_installed() -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

    assert pinned
    assert CLUSTER["rayVersion"] == pinned[1]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line]


def test_the_linter_finds_nothing_in_the_container_file() -> None:
    linter = Path(sys.executable).with_name("hadolint")

    done = subprocess.run(
        [linter, "--no-color", CONTAINERFILE], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_container_file_copies_is_there_and_let_in() -> None:
    ignored = (FOLDER / "Containerfile.dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    copied = [
        source
        for name, arguments in instructions()
        if name == "COPY" and not arguments.startswith("--from=")
        for source in arguments.split()[:-1]
    ]

    assert "*" in ignored
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {Path(source).parts[0] for source in copied} == {*let_in}
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert packaged["packages"]["find"]["include"] == ["pipeline*"]


def test_the_container_file_installs_the_pinned_versions_with_all_stores() -> None:
    commands = " && ".join(arguments for name, arguments in instructions() if name == "RUN")
    (install,) = re.findall(r"pip install ([^&]*\[[^&]*)", commands)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]

    assert "-c constraints.txt" in install
    assert "-c constraints.txt -e ." in (ROOT / "README.md").read_text()
    named = re.search(r"\[(.*)\]", install)
    assert named
    assert {*named[1].split(",")} == {"s3", "gcs", "azure"} <= {*extras}
    bases = {arguments.split()[0] for name, arguments in instructions() if name == "FROM"}
    assert bases == {"python:3.11-slim-bookworm", "dependencies"}


def test_the_image_runs_as_a_numbered_user_and_holds_no_secret() -> None:
    found = dict(instructions())
    user = PODS["head"]["spec"]["securityContext"]

    assert found["USER"] == f"{user['runAsUser']}:{user['runAsGroup']}"
    assert "ARG" not in found
    assert not re.search(r"(?i)token|secret|password|key", found["ENV"])
    assert "/opt/venv/bin" in found["ENV"]
