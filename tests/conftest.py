"""Fixtures and the silence that all tests run in."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.network import isolate
from tests.servers.process import free_ports

ROOT = Path(__file__).parents[1]

pytest_plugins = ["tests.servers.fixtures", "tests.storage_fixtures"]

ISOLATED = isolate()
"""True where the tests can reach nothing but loopback, by construction."""


def _silent_environment() -> dict[str, str]:
    """Return what keeps Ray and the model libraries from calling out; see Ray's usage stats."""
    home = tempfile.mkdtemp(prefix="carvecache-home-")
    # A bootstrap file of a local provider stops Ray's probe for a cloud's metadata server.
    Path(home, "ray_bootstrap_config.yaml").write_text(
        "cluster_name: tests\nmax_workers: 0\nprovider: {type: local}\n"
    )
    return {
        "HOME": home,
        # Several processes share the tests: with a thread each per core they would mostly wait for
        # one another. Read when torch is loaded.
        "OMP_NUM_THREADS": "1",
        # gcsfs asks by gRPC what kind of bucket it has; it reads this when it is imported.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "FSSPEC_GCS_TOKEN": "anon",  # instead of looking for a cloud's metadata server
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_AUTH_MODE": "disabled",
        # Ray lowers its workers' priority by 15: on a busy machine they would starve.
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
        "RAY_ADDRESS": "local",
        "TOKENIZERS_PARALLELISM": "false",
    }


os.environ.update(_silent_environment())
# Hundreds of processes are started: each would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes share the tests; more than four would mostly import torch."""
    return min(4, os.cpu_count() or 1)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray of two CPUs for the whole session; workers find the tests' own modules.

    Its metrics are at a port of their own, a second old at most.
    """
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 << 20,
        _metrics_export_port=free_ports(1)[0],
        _system_config={"metrics_report_interval_ms": 1000},
        _temp_dir=tempfile.mkdtemp(prefix="ray-", dir="/tmp"),
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()
