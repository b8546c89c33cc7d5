"""What only S3 has: TLS with checksums behind the data, and uploads of several parts."""

import os

import fsspec
import pytest

from pipeline.errors import AlreadyExistsError, StorageError
from pipeline.storage import _retry, _store, open_store
from tests.servers.clients import client_environment
from tests.servers.fixtures import empty_place
from tests.servers.radosgw import make_certificate

DATA = os.urandom(12 * 2**20)


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A file that goes up in three parts, as those above 32 MiB do."""
    monkeypatch.setattr(_store, "UPLOAD_CHUNK_BYTES", 5 * 2**20)
    (tmp_path / "part").write_bytes(DATA)
    return str(tmp_path / "part")


def test_over_tls_an_older_server_takes_everything_without_any_setting(radosgw, part):
    with client_environment(radosgw.tls_environment()):
        store = open_store(empty_place(radosgw))
        store.check_writable()
        store.put("a", b"0123456789")
        store.put_once("b", b"1")
        with pytest.raises(AlreadyExistsError):
            store.put_once("b", b"2")
        store.upload("part", part)

        assert store.read_range("a", 2, 3) == b"234"
        assert store.read("part") == DATA


def test_checksums_that_the_environment_asks_for_are_sent(radosgw):
    wanted = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported"}
    with client_environment({**radosgw.tls_environment(), **wanted}):
        store = open_store(empty_place(radosgw))
        with pytest.raises(StorageError, match=r"\[Errno 22\]"):  # Ceph 16 refuses such requests
            store.put("a", b"1")


def test_an_upload_of_several_parts_that_breaks_off_is_whole_in_the_end(
    proxied_s3, part, monkeypatch
):
    monkeypatch.setattr(_retry, "FIRST_PAUSE_S", 0.01)
    proxy, url = proxied_s3
    store = open_store(url)
    proxy.reset_requests(2, after_bytes=2_000_000, method="PUT", path="partNumber=2")
    proxy.answer_503(1, method="PUT", path="partNumber=3")

    store.upload("data/part", part)

    assert proxy.pending() == 0
    assert store.read("data/part") == DATA
    fs = fsspec.filesystem("s3")
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    left = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
    assert left.get("Uploads", []) == []


@pytest.mark.parametrize("bundle", ["missing.pem", "cert.pem"])
def test_certificates_that_do_not_fit_are_told_at_the_first_attempt(radosgw, tmp_path, bundle):
    """Trying again would hide them for minutes."""
    make_certificate(tmp_path)
    wrong = {"AWS_CA_BUNDLE": str(tmp_path / bundle)}
    with client_environment({**radosgw.tls_environment(), **wrong}):
        store = open_store(empty_place(radosgw))
        with pytest.raises(StorageError, match=r"CERTIFICATE|certificate|No such file") as caught:
            store.read("a")

    assert "attempts" not in str(caught.value)
