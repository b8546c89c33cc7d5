"""The gateway is real: it checks signatures, knows who came first, and lives through a kill."""

import fsspec
import pytest

from tests.servers.clients import client_environment


def test_signatures_are_checked(radosgw, s3_url):
    with client_environment({**radosgw.environment(), "AWS_SECRET_ACCESS_KEY": "wrong"}):
        fs = fsspec.filesystem("s3")
        with pytest.raises(PermissionError):
            fs.ls(s3_url.rpartition("/")[0])


def test_objects_outlive_a_killed_gateway(radosgw, s3_url):
    fs = fsspec.filesystem("s3")
    fs.pipe_file(f"{s3_url}/a", b"1")
    radosgw.kill_gateway()
    radosgw.start_gateway()

    assert fs.cat_file(f"{s3_url}/a") == b"1"


def test_requests_through_a_proxy_keep_their_signatures(proxied_s3):
    proxy, url = proxied_s3
    fs = fsspec.filesystem("s3")

    fs.pipe_file(f"{url}/a", b"1")

    assert fs.cat_file(f"{url}/a") == b"1"
    assert {request.method for request in proxy.requests} == {"PUT", "HEAD", "GET"}
