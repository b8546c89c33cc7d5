"""Reading S3 by plain HTTP: the same bytes, the same identity, and s3fs where it fails."""

import itertools
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import NotFoundError, StorageError
from pipeline.storage import Store, _backend, _s3_reader, open_input, open_store, stat_input
from pipeline.storage._s3_reader import S3Reader, open_s3_reader
from tests.process_memory import memory_bytes
from tests.servers.clients import client_environment
from tests.servers.radosgw import Radosgw

DATA = bytes(range(256)) * 40


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set some, for AWS itself."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)


def by_http(store: Store) -> bool:
    return store._backend.s3_reader is not None


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
    assert by_http(store)
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


@pytest.mark.usefixtures("credentials")
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
    assert open_s3_reader("s3://bucket/place") is not None
    monkeypatch.setenv(name, value)

    assert open_s3_reader("s3://bucket/place") is None


def test_without_credentials_s3fs_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert open_s3_reader("s3://bucket/place") is None


def test_names_of_any_kind_are_read_and_listed(s3_url: str) -> None:
    names = ["a b+c", "50%41", "ü~(1)", "x=1&y", "'q'"]
    store = open_store(s3_url)
    for name in names:
        store.put(f"folder {name}/{name}", name.encode())
    other = open_store(s3_url)

    assert [other.read(f"folder {name}/{name}").decode() for name in names] == names
    assert other.list_names(f"folder {names[0]}") == [names[0]]
    assert other.list_names() == sorted(f"folder {name}" for name in names)
    assert not has_s3fs(other)


def test_the_root_of_a_bucket_is_listed(radosgw: Radosgw) -> None:
    with client_environment(radosgw.environment()):
        url = radosgw.create_bucket()
        open_store(url).put("a/b", b"x")
        open_store(url).put("c", b"y")
        store = open_store(url)

        assert store.list_names() == ["a", "c"]
        assert store.read("c") == b"y"
        assert not has_s3fs(store)


def test_an_input_is_read_likewise(s3_url: str) -> None:
    data = os.urandom(20_000_000)
    open_store(s3_url).put("shard.tar", data)
    with open_input(stat_input(f"{s3_url}/shard.tar")) as stream:
        reader = stream._backend.s3_reader
        assert reader is not None
        asked, get = [], reader._connections.get
        reader._connections.get = lambda target, headers: (
            asked.append(headers["Range"]) or get(target, headers)
        )

        assert stream.read(30_000_000) == data

    assert asked == ["bytes=0-8388607", "bytes=8388608-16777215", "bytes=16777216-19999999"]


def test_many_threads_that_begin_at_once_open_one_reader(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(s3_url).put("data", DATA)
    store, opened = open_store(s3_url), []
    monkeypatch.setattr(
        _backend, "open_s3_reader", lambda url: opened.append(url) or open_s3_reader(url)
    )

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: store.read_range("data", number, 1), range(16)))

    assert b"".join(found) == DATA[:16]
    assert len(opened) == 1


@pytest.mark.slow
def test_a_long_listing_comes_in_pages(s3_url: str) -> None:
    store = open_store(s3_url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put(f"many/{number:04d}", b"x"), range(1203)))

    assert open_store(s3_url).list_names("many") == [f"{number:04d}" for number in range(1203)]


def test_one_signature_does_for_an_object_until_it_is_old(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_url)
    store.put("data", DATA)
    made = []
    signature = S3Reader._signature
    monkeypatch.setattr(
        S3Reader, "_signature", lambda *asked: made.append(asked[1]) or signature(*asked)
    )

    for _ in range(3):
        assert store.read_range("data", 3, 4) == DATA[3:7]
    assert len(made) == 1
    monkeypatch.setattr(_s3_reader, "_SIGNED_S", 0)
    assert store.read_range("data", 3, 4) == DATA[3:7]

    assert len(made) == 2


def test_a_server_that_refuses_is_left_to_s3fs_for_a_while(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(s3_url)
    store.put("data", DATA)
    asked = []
    ask = S3Reader._ask
    monkeypatch.setattr(
        S3Reader, "_ask", lambda *args, **rest: asked.append(args[1]) or ask(*args, **rest)
    )
    monkeypatch.setattr(S3Reader, "_sign", lambda *_: {})

    for _ in range(5):
        assert store.read("data") == DATA

    assert len(asked) == 3
    assert has_s3fs(store)
    (record,) = [r for r in caplog.records if r.name.endswith("_s3_reader")]
    assert "failed 3 times in a row (403 AccessDenied)" in record.getMessage()
    monkeypatch.undo()
    monkeypatch.setattr(store._backend.s3_reader, "_paused_until", 0.0)
    monkeypatch.setattr(store._backend, "_opened", None)
    assert store.read("data") == DATA
    assert not has_s3fs(store)


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize(
    ("url", "name", "value"),
    [
        ("s3://arn:aws:s3:eu-west-1:1:accesspoint/x", None, None),
        ("s3://bucket--use1-az4--x-s3/place", None, None),
        ("s3://bucket/place", "AWS_USE_FIPS_ENDPOINT", "true"),
        ("s3://bucket/place", "AWS_USE_DUALSTACK_ENDPOINT", "true"),
        ("s3://bucket/place", "AWS_DEFAULT_REGION", "us-iso-east-1"),
        ("s3://bucket/place", "AWS_CONFIG_FILE", "[default]\ns3 =\n  addressing_style = virtual\n"),
    ],
)
def test_addresses_of_other_kinds_are_left_to_s3fs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, name: str | None, value: str
) -> None:
    assert open_s3_reader("s3://bucket/place") is not None
    if name == "AWS_CONFIG_FILE":
        (tmp_path / "config").write_text(value)
        value = str(tmp_path / "config")
    if name is not None:
        monkeypatch.setenv(name, value)

    assert open_s3_reader(url) is None


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize(
    ("region", "endpoint"),
    [
        ("eu-west-1", "https://s3.eu-west-1.amazonaws.com"),
        ("cn-north-1", "https://s3.cn-north-1.amazonaws.com.cn"),
    ],
)
def test_without_an_endpoint_it_is_that_of_the_region(
    monkeypatch: pytest.MonkeyPatch, region: str, endpoint: str
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", region)

    reader = open_s3_reader("s3://bucket/place")

    assert reader is not None
    assert reader._place.endpoint == endpoint


def _read_in_child(url: str, queue) -> None:
    store = open_store(url)
    queue.put((store.read("data"), by_http(store)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_likewise(s3_url: str, method: str) -> None:
    store = open_store(s3_url)
    store.put("data", DATA)
    assert store.read("data") == DATA
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(s3_url, queue))

    child.start()
    found = queue.get(timeout=60)
    child.join()

    assert found == (DATA, True)
    assert store.read("data") == DATA
