"""Pytest fixtures of the servers: each starts once a session, when a test first asks for it.

A server whose program is not installed skips the tests that need it, unless
`CARVE_TEST_SERVERS=required` (as in continuous integration): then it is an error.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.servers.clients import client_environment
from tests.servers.fault_proxy import FaultProxy
from tests.servers.process import MissingServerError
from tests.servers.radosgw import Radosgw

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


@pytest.fixture(scope="session")
def radosgw() -> Iterator[Radosgw]:
    """Ceph's S3 gateway, in memory."""
    with started(Radosgw) as server:
        yield server


@pytest.fixture
def s3_url(radosgw: Radosgw) -> Iterator[str]:
    """A new bucket on radosgw; the environment leads clients there."""
    with client_environment(radosgw.environment()):
        yield radosgw.create_bucket()


@pytest.fixture
def proxied_s3(radosgw: Radosgw) -> Iterator[tuple[FaultProxy, str]]:
    """A proxy before radosgw and a new bucket; the environment leads clients to the proxy."""
    url = radosgw.create_bucket()
    with (
        FaultProxy(radosgw.port) as proxy,
        client_environment(radosgw.environment(proxy.url)),
    ):
        yield proxy, url
