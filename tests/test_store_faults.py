"""Real stores behind a proxy that fails: right bytes or a named error, and nobody wins twice."""

import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline import open_cache
from pipeline.cache.commit import claim_identity, read_commits
from pipeline.cache.snapshot import build_snapshot
from pipeline.errors import AlreadyExistsError, StorageError
from pipeline.storage import _driver, _retry, open_input, open_store, stat_input
from tests.cache.rows import IDENTITY, commit_rows, make_row
from tests.servers.fixtures import proxied_bucket_on
from tests.storage_fixtures import race, written_by

DATA = os.urandom(1_000_003)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """Pauses between attempts shrink; their number and everything else stays."""
    monkeypatch.setattr(_retry, "FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(_retry, "LONGEST_PAUSE_S", 0.02)


@pytest.fixture(params=["radosgw", "azurite"])
def proxied(request):
    with proxied_bucket_on(request.getfixturevalue(request.param)) as (proxy, url):
        yield proxy, open_store(url)


@pytest.fixture(params=["radosgw", "azurite", "gcs_emulator"])
def readable(request):
    """The same, and a store that is only read from."""
    with proxied_bucket_on(request.getfixturevalue(request.param)) as (proxy, url):
        yield proxy, open_store(url)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(_driver, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(_driver, "CONNECT_TIMEOUT_S", 0.5)
    monkeypatch.setattr(_retry, "ATTEMPTS", 2)


def requests_of(proxy, action):
    """Return what an action sends."""
    before = len(proxy.requests)
    action()
    return proxy.requests[before:]


@pytest.mark.parametrize("size", [0, 5_000, 20 * 2**20])
def test_a_conditional_put_is_one_request_of_one_part(proxied, size):
    proxy, store = proxied

    sent = requests_of(proxy, lambda: store.put_once("commits/a", bytes(size)))

    assert [(r.method, r.headers.get("if-none-match")) for r in sent] == [("PUT", "*")]
    assert "comp=block" not in sent[0].target
    assert store.size("commits/a") == size


def test_what_cannot_go_in_one_request_is_not_put_conditionally(proxied):
    proxy, store = proxied

    with pytest.raises(StorageError, match="more than one conditional request takes"):
        store.put_once("commits/a", bytes(32 * 2**20 + 1))

    assert proxy.requests == []


def test_a_put_whose_answer_was_lost_is_won_once(proxied):
    proxy, store = proxied
    proxy.swallow_replies(1, method="PUT", path="commits/a")

    sent = requests_of(proxy, lambda: store.put_once("commits/a", b"attempt 1"))

    # aiohttp repeats, once, what it sent on a kept connection that then broke: hence the reading.
    assert [r.method for r in sent].count("PUT") in (1, 2)
    for other in (b"attempt 2", b"attempt 1 but longer"):
        with pytest.raises(AlreadyExistsError):
            store.put_once("commits/a", other)
    assert store.read("commits/a") == b"attempt 1"


def test_a_lost_put_whose_answer_was_lost_is_not_won(proxied):
    proxy, store = proxied
    store.put("commits/a", b"attempt 1")
    proxy.swallow_replies(1, method="PUT", path="commits/a")

    with pytest.raises(AlreadyExistsError):
        store.put_once("commits/a", b"attempt 2")
    assert store.read("commits/a") == b"attempt 1"


def test_in_a_race_with_lost_answers_and_slow_downs_each_key_has_one_winner(proxied):
    proxy, store = proxied
    proxy.swallow_replies(15, method="PUT")
    proxy.answer_503(25)
    proxy.swallow_replies(15, method="GET")

    wins = race(store, writers=12, keys=8)

    assert Counter(key for key, _ in wins) == dict.fromkeys(range(8), 1)
    assert all(store.read(f"k{key}") == written_by(writer) for key, writer in wins)
    assert proxy.num_faults >= 40


def test_a_commit_whose_answer_was_lost_counts_once(proxied):
    proxy, store = proxied
    claim_identity(store, IDENTITY)
    proxy.swallow_replies(1, method="PUT", path="commits")

    commit = commit_rows(store, "shard", [make_row("k0")])

    assert proxy.pending() == 0
    assert [standing.attempt for standing in read_commits(store)] == [commit.attempt]
    build_snapshot(store)
    assert list(open_cache(store.url).keys()) == ["k0"]


ACTIONS = {
    "read": lambda store: store.read("a"),
    "range": lambda store: store.read_range("a", 2, 3),
    "size": lambda store: store.size("a"),
    "list": lambda store: list(store.list("")),
    "put": lambda store: store.put("b", b"2"),
    "delete": lambda store: store.delete("c"),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_throttled_request_is_repeated_by_nobody_but_us(readable, action):
    proxy, store = readable
    store.put("a", b"0123456789")
    store.put("c", b"1")
    plain = len(requests_of(proxy, lambda: ACTIONS[action](store)))
    store.put("c", b"1")
    proxy.answer_503(3)

    throttled = len(requests_of(proxy, lambda: ACTIONS[action](store)))

    assert proxy.pending() == 0
    # At most one more operation for each refusal; adlfs takes one of its looks-up as a no. gcsfs
    # asks for an object and a folder at once, and drops the second where the first comes in time.
    at_most = 2 if action == "size" else plain
    assert plain + 2 <= throttled <= 4 * max(plain, at_most)


def test_a_store_that_goes_on_throttling_is_an_error_after_eight_requests(readable):
    proxy, store = readable
    store.put("a", b"0123456789")
    proxy.answer_503(1000)

    def read():
        with pytest.raises(StorageError, match=r"cannot read .*/a: .*\(8 attempts\)"):
            store.read("a")

    assert len(requests_of(proxy, read)) == 8
    proxy.heal()
    assert store.read("a") == b"0123456789"


def test_an_input_survives_resets_and_throttling_to_the_last_byte(readable, monkeypatch):
    monkeypatch.setattr("pipeline.storage._inputs.CHUNK_BYTES", 100_000)
    proxy, store = readable
    store.put("x.tar", DATA)
    shard = stat_input(store.url_of("x.tar"))
    proxy.reset_replies(3, after_bytes=60_000, method="GET")
    proxy.answer_503(3, method="GET")
    proxy.swallow_replies(2, method="GET")

    with open_input(shard) as stream:
        read = b"".join(iter(lambda: stream.read(7_001), b""))

    assert proxy.pending() == 0
    assert read == DATA


def test_uploads_and_puts_that_break_off_are_whole_in_the_end(proxied, tmp_path):
    proxy, store = proxied
    (tmp_path / "part").write_bytes(DATA)
    proxy.reset_requests(2, after_bytes=300_000, method="PUT")
    store.upload("data/part", str(tmp_path / "part"))
    proxy.reset_requests(2, after_bytes=300_000, method="PUT")
    store.put("data/other", DATA)

    assert proxy.pending() == 0
    assert store.read("data/part") == store.read("data/other") == DATA


def test_a_black_hole_is_an_error_in_bounded_time(readable, impatient):
    proxy, store = readable
    store.put("a", b"0123456789")
    proxy.black_hole()
    actions = {**ACTIONS, "put_once": lambda store: store.put_once("d", b"1")}

    with ThreadPoolExecutor(len(actions)) as pool:
        tried = {name: pool.submit(act, store) for name, act in actions.items()}
        errors = {name: future.exception() for name, future in tried.items()}

    assert {name: type(error) for name, error in errors.items()} == dict.fromkeys(
        actions, StorageError
    )
    assert all("(2 attempts)" in str(error) for error in errors.values())
    proxy.heal()
    assert store.read("a") == b"0123456789"


def test_an_input_in_a_black_hole_ends_with_an_error(readable, impatient, monkeypatch):
    monkeypatch.setattr("pipeline.storage._inputs.CHUNK_BYTES", 100_000)
    proxy, store = readable
    store.put("x.tar", DATA)

    with open_input(stat_input(store.url_of("x.tar"))) as stream:
        assert stream.read(10) == DATA[:10]
        proxy.black_hole()
        with pytest.raises(StorageError, match=r"cannot read .*x\.tar: .*\(2 attempts\)"):
            stream.read(len(DATA))
    proxy.heal()
    with open_input(stat_input(store.url_of("x.tar"))) as stream:
        assert stream.read(len(DATA)) == DATA


def test_slow_answers_take_longer_than_the_limit_for_silence_and_are_whole(readable, impatient):
    proxy, store = readable
    store.put("x.bin", DATA[:300_000])
    proxy.slow_replies(200_000)

    assert store.read("x.bin") == DATA[:300_000]


def test_rows_of_a_cache_are_right_behind_a_failing_link(proxied):
    proxy, store = proxied
    claim_identity(store, IDENTITY)
    rows = [make_row(f"k{i}", seed=i, num_tokens=40) for i in range(6)]
    commit_rows(store, "s", rows, row_group_bytes=1)
    build_snapshot(store)
    expected = {key: open_cache(store.url)[key].features for key in (row.key for row in rows)}
    proxy.answer_503(2, method="GET")
    proxy.reset_replies(2, after_bytes=300, method="GET")
    proxy.swallow_replies(2, method="GET")

    cache = open_cache(store.url)

    assert {key: cache[key].features.tolist() for key in cache} == {
        key: features.tolist() for key, features in expected.items()
    }
    assert proxy.pending() == 0


def test_a_killed_gateway_is_waited_for(radosgw, s3_url, monkeypatch):
    monkeypatch.setattr("pipeline.storage._inputs.CHUNK_BYTES", 100_000)
    monkeypatch.setattr(_retry, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(_retry, "LONGEST_PAUSE_S", 2.0)
    store = open_store(s3_url)
    store.put("x.tar", DATA)

    with open_input(stat_input(store.url_of("x.tar"))) as stream:
        parts = [stream.read(50_000)]
        radosgw.kill_gateway()
        back = threading.Timer(0.5, radosgw.start_gateway)
        back.start()
        parts.append(stream.read(len(DATA)))
        back.join()
    radosgw.kill_gateway()
    back = threading.Timer(0.5, radosgw.start_gateway)
    back.start()
    store.put_once("commits/a", b"attempt 1")
    back.join()

    assert b"".join(parts) == DATA
    with pytest.raises(AlreadyExistsError):
        store.put_once("commits/a", b"attempt 2")
