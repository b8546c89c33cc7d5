"""Pytest fixtures of the servers: each starts once a session, when a test first asks for it.

A server whose program is not installed skips the tests that need it, unless
`CARVE_TEST_SERVERS=required` (as in continuous integration): then it is an error.
"""

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.servers.azurite import Azurite
from tests.servers.clients import client_environment
from tests.servers.fault_proxy import FaultProxy
from tests.servers.gcs_emulator import GcsEmulator
from tests.servers.process import MissingServerError
from tests.servers.radosgw import Radosgw
from tests.servers.rclone import Rclone
from tests.servers.swift import Swift

_buckets: dict[object, str] = {}
REQUIRED = os.environ.get("CARVE_TEST_SERVERS") == "required"


@contextmanager
def started(kind):
    """Start a server in a short folder of its own; skip where it is missing and may be."""
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="srv-", dir="/tmp") as folder:
        try:
            server = stack.enter_context(kind(Path(folder)))
        except MissingServerError as err:
            if REQUIRED:
                raise
            pytest.skip(f"{err} (all servers at once: tests/servers/install.sh FOLDER)")
        yield server
        stack.close()  # before its folder goes


def empty_place(server) -> str:
    """Return the URL of a folder that nobody else uses, all in one bucket of the server's."""
    if server not in _buckets:
        _buckets[server] = server.create_bucket()
    return f"{_buckets[server]}/{uuid.uuid4().hex[:8]}"


@contextmanager
def bucket_on(server) -> Iterator[str]:
    """Give the URL of an empty place, and an environment that leads clients there."""
    with client_environment(server.environment()):
        yield empty_place(server)


@contextmanager
def proxied_bucket_on(server) -> Iterator[tuple[FaultProxy, str]]:
    """Give a proxy, and the URL of an empty place that clients reach through it."""
    with FaultProxy(server.port) as proxy, client_environment(server.environment(proxy.url)):
        yield proxy, empty_place(server)


@pytest.fixture(scope="session")
def radosgw() -> Iterator[Radosgw]:
    """Ceph's S3 gateway, in memory."""
    with started(Radosgw) as server:
        yield server


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    with started(Azurite) as server:
        yield server


@pytest.fixture(scope="session")
def swift() -> Iterator[Swift]:
    """S3 without conditional puts: 501."""
    with started(Swift) as server:
        yield server


@pytest.fixture(scope="session")
def rclone() -> Iterator[Rclone]:
    """S3 that takes conditional puts and overwrites."""
    with started(Rclone) as server:
        yield server


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[GcsEmulator]:
    """Google Cloud Storage that ignores generation preconditions."""
    with started(GcsEmulator) as server:
        yield server


@pytest.fixture
def s3_url(radosgw: Radosgw) -> Iterator[str]:
    """An empty place on radosgw; the environment leads clients there."""
    with bucket_on(radosgw) as url:
        yield url


@pytest.fixture
def azure_url(azurite: Azurite) -> Iterator[str]:
    """An empty place on Azurite; the environment leads clients there."""
    with bucket_on(azurite) as url:
        yield url


@pytest.fixture
def proxied_s3(radosgw: Radosgw) -> Iterator[tuple[FaultProxy, str]]:
    """A proxy before radosgw and an empty place; the environment leads clients to the proxy."""
    with proxied_bucket_on(radosgw) as both:
        yield both


@pytest.fixture
def proxied_azure(azurite: Azurite) -> Iterator[tuple[FaultProxy, str]]:
    """A proxy before Azurite and an empty place; the environment leads clients to the proxy."""
    with proxied_bucket_on(azurite) as both:
        yield both
