"""The loader over object stores and https: which bytes it asks for, and what breaks on the way."""

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from aiohttp import web

from pipeline import Batch, CarvedDataset, DiskCache, open_cache
from pipeline.cache import open_parts, segment_writer
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.storage import open_store
from tests.cache.rows import IDENTITY, commit_rows, make_row
from tests.servers.fault_proxy import FaultProxy

NUM_ROWS = 120
NUM_TOKENS = 40
KEYS = [f"k{i:03d}" for i in range(NUM_ROWS)]


def fill(url: str, *, first: int = 0, last: int = NUM_ROWS, shard: str = "a") -> None:
    store = open_store(url)
    claim_identity(store, IDENTITY)
    rows = [make_row(KEYS[i], seed=i, num_tokens=NUM_TOKENS) for i in range(first, last)]
    commit_rows(store, shard, rows, row_group_bytes=30_000, part_bytes=100_000)
    build_snapshot(store)


def part_reads(proxy: FaultProxy, since: int = 0) -> list[tuple[int, int]]:
    """Return the ranges of parts that were asked for."""
    found = []
    for request in proxy.requests[since:]:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if request.method == "GET" and "/part-" in request.target:
            assert asked, "a part was read whole"
            found.append((int(asked[1]), int(asked[2]) + 1))
    return found


def test_a_key_costs_one_ranged_read_of_the_tokens_that_are_wanted(proxied_s3) -> None:
    proxy, url = proxied_s3
    fill(url)
    lengths = {}
    for keep in (16, 32, None):
        cache = open_cache(url, keep_tokens=keep)
        place = cache.reader.find("k007")
        since = len(proxy.requests)

        image = cache["k007"]

        ((start, stop),) = part_reads(proxy, since)
        assert len(proxy.requests) == since + 1
        assert len(image.positions) == (keep or NUM_TOKENS)
        assert start == place.aux_offset
        lengths[keep] = stop - start - place.aux_length
    assert lengths == {16: 16 * 64, 32: 32 * 64, None: NUM_TOKENS * 64}


def test_rows_of_a_batch_of_keys_that_lie_together_are_read_together(proxied_s3) -> None:
    proxy, url = proxied_s3
    fill(url)
    cache = open_cache(url)
    cache.reader.find_many(KEYS)
    since = len(proxy.requests)

    batch = Batch.of_keys(cache, [KEYS[9], KEYS[3], KEYS[4], KEYS[5]])

    assert batch.keys == [KEYS[9], KEYS[3], KEYS[4], KEYS[5]]
    assert len(part_reads(proxy, since)) == 1
    assert torch.equal(batch.images()[1].features, cache[KEYS[3]].features)


@pytest.mark.parametrize("tail_bytes", [64 << 10, 4 << 10])
def test_the_first_keys_cost_one_footer_and_a_read_of_each_row_group_of_the_index(
    proxied_s3, monkeypatch: pytest.MonkeyPatch, tail_bytes: int
) -> None:
    proxy, url = proxied_s3
    monkeypatch.setattr(segment_writer, "_GROUP_ROWS", 16)
    monkeypatch.setattr(open_parts, "_TAIL_BYTES", tail_bytes)
    fill(url)
    cache = open_cache(url)
    since = len(proxy.requests)

    assert Batch.of_keys(cache, KEYS[::5]).keys == KEYS[::5]

    asked = proxy.requests[since:]
    assert {request.method for request in asked} == {"GET"}
    index = [request.headers["range"] for request in asked if "/index-" in request.target]
    size = cache.reader.snapshot.segments[0].index[0].table.size
    tail = f"bytes={size - min(size, tail_bytes)}-{size - 1}"
    assert index.count(tail) == 1
    is_whole = size <= tail_bytes
    assert is_whole == (tail_bytes > 4 << 10)
    assert len(index) <= (1 if is_whole else 2 + 8)


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_reads_row_groups_whole_and_once_but_for_its_first_batch(
    proxied_s3, shuffle: bool
) -> None:
    proxy, url = proxied_s3
    fill(url)
    cache = open_cache(url)
    num_groups = len(cache.reader.row_groups()[0])
    size = sum(record["size"] for record in cache.reader.file_records())
    since = len(proxy.requests)

    found = [k for batch in CarvedDataset(cache, batch_size=8, shuffle=shuffle) for k in batch.keys]

    reads = part_reads(proxy, since)
    assert sorted(found) == KEYS
    # The first batch is fetched alone, with the small rows between; then whole row groups are.
    assert sum(stop - start for start, stop in reads) <= 1.35 * size
    assert len(reads) <= 8 + 2 * num_groups


def test_two_readers_with_lanes_of_their_own_do_not_fetch_the_same_row_groups(proxied_s3) -> None:
    proxy, url = proxied_s3
    fill(url)
    fetched = {}

    for lanes in (1, 2):
        found, since = [], len(proxy.requests)
        for rank in range(2):
            dataset = CarvedDataset(
                open_cache(url),
                batch_size=6,
                shuffle=True,
                window=30,
                lanes=lanes,
                rank=rank,
                world_size=2,
            )
            found += [key for batch in dataset for key in batch.keys]
        assert sorted(found) == KEYS
        fetched[lanes] = sum(stop - start for start, stop in part_reads(proxy, since))

    assert fetched[2] < 0.75 * fetched[1]


@pytest.mark.parametrize("fault", ["reset", "swallow", "throttle", "cut_off"])
def test_an_epoch_goes_on_over_lost_connections(proxied_s3, fault: str) -> None:
    proxy, url = proxied_s3
    fill(url)
    cache = open_cache(url)
    expected = {key: cache[key].features for key in KEYS[::17]}
    dataset = CarvedDataset(cache, batch_size=8, shuffle=True, prefetch_bytes=1)
    found = []

    for number, batch in enumerate(dataset):
        if number == 3:
            if fault == "reset":
                proxy.reset_replies(3, after_bytes=2000, path="/part-")
            elif fault == "swallow":
                proxy.swallow_replies(2, path="/part-")
            elif fault == "throttle":
                proxy.answer_503(3, path="/part-")
            else:
                proxy.refuse()
                threading.Timer(1.0, proxy.heal).start()
        found += batch.keys
        for image in batch.images():
            if image.key in expected:
                assert torch.equal(image.features, expected[image.key])

    assert sorted(found) == KEYS
    assert proxy.num_faults > 0


def test_a_reader_stays_as_it_is_while_a_job_adds_and_sees_it_when_asked(s3_url: str) -> None:
    fill(s3_url, last=60)
    cache = open_cache(s3_url, keep_tokens=16)
    dataset = CarvedDataset(cache, batch_size=7, shuffle=True)
    batches = iter(dataset)
    found = next(batches).keys

    fill(s3_url, first=60, shard="b")
    found += [key for batch in batches for key in batch.keys]
    later = cache.refresh()

    assert sorted(found) == KEYS[:60]
    assert (len(cache), len(later), later.keep_tokens) == (60, NUM_ROWS, 16)
    assert sorted(k for b in CarvedDataset(later, batch_size=7) for k in b.keys) == KEYS


def test_a_second_epoch_through_a_disk_cache_asks_for_no_rows(proxied_s3, tmp_path: Path) -> None:
    proxy, url = proxied_s3
    fill(url)
    disk_cache = DiskCache(tmp_path / "disk", max_bytes=64 << 20)
    dataset = CarvedDataset(open_cache(url, disk_cache=disk_cache), batch_size=8, shuffle=True)
    first = [key for batch in dataset for key in batch.keys]
    assert part_reads(proxy)
    since = len(proxy.requests)

    dataset.set_epoch(1)
    second = [key for batch in dataset for key in batch.keys]

    assert sorted(first) == sorted(second) == KEYS
    assert first != second
    assert part_reads(proxy, since) == []


@pytest.fixture
def https_folder(tmp_path: Path) -> Iterator[tuple[str, Path, Counter]]:
    """A web server over a folder, as it comes with range requests and a listing."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked: Counter[str] = Counter()

    @web.middleware
    async def count(request, handler):
        asked[request.path] += 1
        return await handler(request)

    app = web.Application(middlewares=[count])
    app.router.add_static("/c", folder, show_index=True)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner.addresses[0][1]

    port = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{port}/c", folder, asked
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_cache_behind_a_web_server_is_read(https_folder) -> None:
    url, folder, _ = https_folder
    fill(str(folder))
    here, there = open_cache(str(folder)), open_cache(url)

    assert torch.equal(there["k003"].features, here["k003"].features)
    dataset = CarvedDataset(there, batch_size=16, shuffle=True)
    assert sorted(key for batch in dataset for key in batch.keys) == KEYS


def test_a_web_server_that_lists_nothing_serves_a_snapshot_by_number(https_folder) -> None:
    url, folder, asked = https_folder
    fill(str(folder))

    cache = open_cache(url, snapshot_number=0)

    assert sorted(cache.keys()) == KEYS
    assert not any(path.endswith(("/c", "/snapshots")) for path in asked)
