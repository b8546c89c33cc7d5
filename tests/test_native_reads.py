"""Reading S3 by compiled code: the same bytes, the same identity, and s3fs where it fails."""

import itertools
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import NotFoundError, StorageError
from pipeline.storage import Store, open_store
from pipeline.storage._native import open_native

DATA = bytes(range(256)) * 40


def by_native(store: Store) -> bool:
    return store._backend.native is not None


def memory_bytes(name: str) -> int:
    """Return what the system says of this process's memory: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def has_s3fs(store: Store) -> bool:
    return store._backend._opened is not None


def test_reads_and_listings_need_no_connection_of_s3fs(s3_url: str) -> None:
    open_store(s3_url).put("a/b/c", DATA)
    open_store(s3_url).put("a/d", b"x")
    store = open_store(s3_url)

    assert store.read("a/b/c") == DATA
    assert store.read("a/b/c", most=100) == DATA[:100]
    assert store.read_range("a/b/c", 1000, 513) == DATA[1000:1513]
    assert store.list_names("a") == ["b", "d"]
    buffer = bytearray(30)
    store.read_into("a/b/c", 5, [memoryview(buffer)[:10], memoryview(buffer)[10:]])
    assert bytes(buffer) == DATA[5:35]
    assert by_native(store)
    assert not has_s3fs(store)


def long_views(data: bytes) -> list[memoryview]:
    """Return views of as many bytes as there are, of sizes that fit no piece of an answer."""
    buffer, views, sizes = memoryview(bytearray(len(data))), [], itertools.cycle([999, 700_001, 3])
    while len(buffer):
        size = next(sizes)
        views.append(buffer[:size])
        buffer = buffer[size:]
    return views


def test_a_long_range_fills_its_views_as_it_comes(s3_url: str) -> None:
    data = os.urandom(5_000_000)
    open_store(s3_url).put("long", data)
    store = open_store(s3_url)
    views = long_views(data[7:-11])

    store.read_into("long", 7, views)

    assert b"".join(views) == data[7:-11]
    assert not has_s3fs(store)
    with pytest.raises(StorageError, match="asked for 4999993 bytes"):
        store.read_into("long", 18, long_views(data[7:]))


@pytest.mark.parametrize("fault", ["reset", "swallow"])
def test_a_long_range_that_breaks_off_is_read_again(proxied_s3, fault: str) -> None:
    proxy, url = proxied_s3
    data = os.urandom(5_000_000)
    store = open_store(url)
    store.put("long", data)
    views = long_views(data)
    if fault == "reset":
        proxy.reset_replies(2, after_bytes=3_000_000, path="long")
    else:
        proxy.swallow_replies(2, path="long")

    store.read_into("long", 0, views)

    assert b"".join(views) == data
    assert proxy.num_faults == 2


def test_a_long_range_takes_no_more_memory_than_its_views(s3_url: str) -> None:
    store = open_store(s3_url)
    size = 60_000_000
    store.put("long", bytes(size))
    buffer = np.ones(size, np.uint8)
    store.read_into("long", 0, [memoryview(buffer)[:2_000_000]])
    before = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now

    store.read_into("long", 0, [memoryview(buffer)])

    assert not buffer.any()
    assert memory_bytes("VmHWM") - before < size // 4


def test_a_file_of_a_known_size_is_opened_without_asking(proxied_s3) -> None:
    proxy, url = proxied_s3
    open_store(url).put("data", DATA)
    store = open_store(url)
    since = len(proxy.requests)

    with store.open_read("data", size=len(DATA)) as file:
        assert file.read(10) == DATA[:10]

    assert [request.method for request in proxy.requests[since:]] == ["GET"]
    assert not has_s3fs(store)


def test_what_is_missing_short_or_empty_is_said_as_by_s3fs(s3_url: str) -> None:
    store = open_store(s3_url)
    store.put("whole", DATA)
    store.put("empty", b"")

    assert store.read("empty") == b""
    assert store.read("empty", most=5) == b""
    assert store.list_names("nothing/here") == []
    with pytest.raises(NotFoundError):
        store.read("missing")
    with pytest.raises(NotFoundError):
        store.read_range("missing", 0, 1)
    with pytest.raises(StorageError, match="asked for 10 bytes"):
        store.read_range("whole", len(DATA) - 5, 10)


@pytest.mark.parametrize("fault", ["throttle", "reset", "swallow"])
def test_an_answer_that_fails_is_asked_for_by_s3fs_and_tried_again(proxied_s3, fault: str) -> None:
    proxy, url = proxied_s3
    store = open_store(url)
    store.put("data", DATA)
    if fault == "throttle":
        proxy.answer_503(2, path="data")
    elif fault == "reset":
        proxy.reset_replies(2, after_bytes=900, path="data")
    else:
        proxy.swallow_replies(2, path="data")

    assert store.read_range("data", 0, len(DATA)) == DATA
    assert proxy.num_faults >= 2
    assert proxy.pending() == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CARVE_S3_READS", "s3fs"),
        ("AWS_CA_BUNDLE", "/there/is/none.pem"),
        ("HTTPS_PROXY", "http://proxy:3128"),
    ],
)
def test_settings_that_only_s3fs_follows_are_left_to_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert open_native("s3://bucket/place") is not None
    monkeypatch.setenv(name, value)

    assert open_native("s3://bucket/place") is None


def test_without_credentials_s3fs_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert open_native("s3://bucket/place") is None


def _read_in_child(url: str, queue) -> None:
    store = open_store(url)
    queue.put((store.read("data"), by_native(store)))


@pytest.mark.parametrize(("method", "native"), [("fork", False), ("spawn", True)])
def test_a_forked_process_reads_by_s3fs(s3_url: str, method: str, native: bool) -> None:
    store = open_store(s3_url)
    store.put("data", DATA)
    assert store.read("data") == DATA
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(s3_url, queue))

    child.start()
    found, by_compiled_code = queue.get(timeout=60)
    child.join()

    assert found == DATA
    assert by_compiled_code == native
