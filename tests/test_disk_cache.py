"""The disk cache: equal bytes, each block fetched once a machine, a size that holds, healing."""

import fcntl
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pipeline import DiskCache, open_cache
from pipeline.cache import layout
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.errors import ConfigError, NotFoundError, StorageError
from pipeline.storage import Store, open_cached_store, open_store
from pipeline.storage._recently_used import RecentlyUsed
from tests.cache.rows import IDENTITY, commit_rows, make_row

ROOT = Path(__file__).parents[1]
BLOCK = 1000
FILE = BLOCK + 28  # with its trailer
DATA = random.Random(0).randbytes(10 * BLOCK + 500)
PATH = "data/shard/attempt/part-00000.parquet"
ROOMY = 1 << 20


class CountingStore(Store):
    """Notes the ranges that are read, each after a pause; fails so often as it is told to."""

    def __init__(self, url, *, pause_s=0.0, failures=0):
        super().__init__(url)
        self.pause_s, self.failures = pause_s, failures
        self.ranges, self.sizes = [], 0

    def read_range(self, path, offset, length):
        self.ranges.append((offset, length))
        time.sleep(self.pause_s)
        if self.failures:
            self.failures -= 1
            raise StorageError("cannot read: told so")
        return super().read_range(path, offset, length)

    def read_into(self, path, offset, views):
        self.ranges.append((offset, sum(view.nbytes for view in views)))
        super().read_into(path, offset, views)

    def size(self, path):
        self.sizes += 1
        return super().size(path)


@pytest.fixture
def origin(tmp_path):
    """A store that holds `DATA`. A local one: whoever asks for it has it read through."""
    store = CountingStore(str(tmp_path / "origin"))
    store.put(PATH, DATA)
    return store


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "disk" / "cache"


def make(folder, *, max_bytes=ROOMY, block_bytes=BLOCK):
    return DiskCache(folder, max_bytes=max_bytes, block_bytes=block_bytes)


def read_all(cache, store, **known):
    return cache.read_range(store, PATH, 0, len(DATA), **known)


def files(folder, suffix=""):
    return sorted(p for p in Path(folder).rglob(f"*{suffix}") if p.is_file())


def bytes_in(folder):
    return sum(path.stat().st_size for path in files(folder))


def wait_until(is_so):
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(script, *arguments):
    """Start a script as a process; what it is given and prints are lines."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def kill(process):
    process.kill()
    process.communicate()


# Equal bytes


@pytest.fixture(params=["memory", "radosgw"])
def remote_url(request, memory):
    return memory if request.param == "memory" else request.getfixturevalue("s3_url")


@pytest.mark.parametrize("max_bytes", [ROOMY, 3 * FILE + 20])
def test_any_range_is_what_the_store_has(remote_url, folder, max_bytes):
    store = open_store(remote_url)
    store.put(PATH, DATA)
    cache = make(folder, max_bytes=max_bytes)
    edges = st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 10 * BLOCK, len(DATA)])
    places = edges | st.integers(0, len(DATA))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(places, min_size=2, max_size=8), st.booleans())
    def check(cuts, is_size_known):
        size = len(DATA) if is_size_known else None
        start, *ends = sorted(cuts)
        wanted = DATA[start : ends[-1]]
        views = [
            memoryview(bytearray(end - begin))
            for begin, end in zip([start, *ends], ends, strict=False)
        ]

        cache.read_into(store, PATH, start, views, size=size)

        assert b"".join(views) == wanted
        assert cache.read_range(store, PATH, start, len(wanted), size=size) == wanted

    check()


@pytest.mark.parametrize(
    ("offset", "length"), [(0, len(DATA) + 1), (10_499, 2), (10_500, 1), (99_999, 1), (-1, 2)]
)
@pytest.mark.parametrize("is_kept", [True, False])
def test_a_range_that_is_not_all_there_is_an_error(origin, folder, offset, length, is_kept):
    cache = make(folder)
    if is_kept:
        read_all(cache, origin)

    with pytest.raises(StorageError, match="cannot read"):
        cache.read_range(origin, PATH, offset, length)


def test_a_negative_length_is_an_error_and_none_is_nothing(origin, folder):
    with pytest.raises(StorageError, match="cannot read -1 bytes"):
        make(folder).read_range(origin, PATH, 5, -1)
    assert make(folder).read_range(origin, PATH, 5, 0) == b""


def test_what_does_not_exist_is_not_found_and_leaves_nothing(origin, folder):
    cache = make(folder)

    for _ in range(2):
        with pytest.raises(NotFoundError, match="origin/nothing"):
            cache.read_range(origin, "nothing", 0, 1)
    assert files(folder) == []


def test_objects_of_one_path_on_two_stores_are_two(origin, folder, tmp_path):
    other = open_store(str(tmp_path / "other"))
    other.put(PATH, DATA[::-1])
    cache = make(folder)

    assert read_all(cache, origin) == DATA
    assert read_all(cache, other) == DATA[::-1]


def test_caches_of_different_block_sizes_share_a_folder(origin, folder):
    assert read_all(make(folder), origin) == DATA
    assert read_all(make(folder, block_bytes=700), origin) == DATA
    assert read_all(make(folder), origin) == DATA


# What is fetched


def test_a_second_process_fetches_nothing_and_does_not_ask_for_the_size(origin, folder):
    read_all(make(folder), origin)
    origin.ranges, origin.sizes = [], 0
    cache = make(folder)

    assert read_all(cache, origin) == DATA
    assert cache.size(origin, PATH) == len(DATA)
    assert (origin.ranges, origin.sizes) == ([], 0)


def test_the_store_is_asked_for_a_size_once_or_never(origin, folder):
    cache = make(folder)
    cache.read_range(origin, PATH, 0, 10, size=len(DATA))
    assert origin.sizes == 0

    cache.read_range(origin, PATH, 5000, 10)
    cache.read_range(origin, PATH, 7000, 10)
    assert origin.sizes <= 1


def test_whole_blocks_are_fetched_neighbours_together(origin, folder):
    cache = make(folder)
    cache.read_range(origin, PATH, 4100, 5)

    assert read_all(cache, origin) == DATA
    assert sorted(origin.ranges) == [(0, 4000), (4000, 1000), (5000, 5500)]


def test_one_request_is_of_32_mib_at_most(tmp_path, folder):
    content = random.Random(1).randbytes(40 << 20)
    store = CountingStore(str(tmp_path / "origin"))
    store.put(PATH, content)
    cache = make(folder, max_bytes=1 << 30, block_bytes=1 << 20)

    assert cache.read_range(store, PATH, 0, len(content)) == content
    assert sorted(store.ranges) == [(0, 32 << 20), (32 << 20, 8 << 20)]


def test_of_many_threads_that_want_a_block_one_fetches_it(origin, folder):
    origin.pause_s = 0.05
    cache = make(folder)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cache.read_range(origin, PATH, 500, 3000), range(8)))

    assert found == [DATA[500:3500]] * 8
    assert sum(length for _, length in origin.ranges) == 4000


def test_what_another_process_kept_a_moment_ago_is_not_fetched_again(origin, folder):
    class MeanwhileStore(CountingStore):
        def size(self, path):
            make(folder).read_range(origin, path, 0, 2000, size=len(DATA))
            return super().size(path)

    store = MeanwhileStore(origin.url)

    assert make(folder).read_range(store, PATH, 500, 2000) == DATA[500:2500]
    assert (origin.ranges, store.ranges) == ([(0, 2000)], [(2000, 1000)])
    assert files(folder, ".part") == []


def test_a_failed_fetch_is_told_and_the_next_one_succeeds(origin, folder):
    origin.failures, origin.pause_s = 1, 0.05
    cache = make(folder)

    def read(_):
        try:
            return cache.read_range(origin, PATH, 0, 10)
        except StorageError as err:
            return str(err)

    with ThreadPoolExecutor(3) as pool:
        found = sorted(map(str, pool.map(read, range(3))))

    assert found == [*[str(DATA[:10])] * 2, "cannot read: told so"]
    assert origin.ranges == [(0, 1000)] * 2
    assert files(folder, ".part") == []


READER = """
import random, sys, threading
from pipeline.storage import DiskCache, open_store
url, path, folder, max_bytes, block_bytes, size, seed = sys.argv[1:]
cache = DiskCache(folder, max_bytes=int(max_bytes), block_bytes=int(block_bytes))
store, numbers = open_store(url), random.Random(seed)
spans = [sorted(numbers.choices(range(int(size) + 1), k=2)) for _ in range(60)]
def read():
    for start, end in [*spans, (0, int(size))]:
        digests.add((start, end, hash(cache.read_range(store, path, start, end - start))))
digests = set()
print("ready", flush=True)
sys.stdin.readline()
threads = [threading.Thread(target=read) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
whole = cache.read_range(store, path, 0, int(size))
expected = open(folder + ".expected", "rb").read()
print(len(digests) == len({digest[:2] for digest in digests}), whole == expected)
"""


@pytest.mark.slow
def test_of_several_processes_and_threads_one_fetches_each_block(proxied_s3, folder):
    proxy, url = proxied_s3
    content, block = random.Random(2).randbytes(20 * 4096 + 77), 4096
    open_store(url).put(PATH, content)
    folder.parent.mkdir()
    Path(f"{folder}.expected").write_bytes(content)
    num_before = len(proxy.requests)
    processes = [
        start(READER, url, PATH, folder, ROOMY, block, len(content), seed) for seed in (1, 1, 2)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3

    said = [process.communicate("go\n", timeout=200)[0] for process in processes]

    assert said == ["True True\n"] * 3
    assert Counter(fetched_blocks(proxy.requests[num_before:], block)) == dict.fromkeys(
        range(21), 1
    )


def fetched_blocks(requests, block):
    for request in requests:
        if request.method == "GET" and PATH in request.target:
            first, last = map(int, re.findall(r"\d+", request.headers["range"]))
            yield from range(first // block, last // block + 1)


# Killed processes, forks and pickles

STREAM = """
import random, sys
from pipeline.storage import DiskCache, open_store
url, path, folder, max_bytes, block_bytes, size, seed = sys.argv[1:]
cache = DiskCache(folder, max_bytes=int(max_bytes), block_bytes=int(block_bytes))
store, numbers = open_store(url), random.Random(seed)
while True:
    start, end = sorted(numbers.choices(range(int(size) + 1), k=2))
    cache.read_range(store, path, start, end - start)
    print("read", flush=True)
"""


def test_a_process_killed_while_it_fetches_holds_up_nobody(proxied_s3, folder):
    proxy, url = proxied_s3
    content, block = random.Random(3).randbytes(100_000), 50_000
    store = open_store(url)
    store.put(PATH, content)
    num_before = len(proxy.requests)
    proxy.slow_replies(2000)
    process = start(STREAM, url, PATH, folder, ROOMY, block, len(content), 0)
    wait_until(lambda: list(fetched_blocks(proxy.requests[num_before:], block)))
    assert files(folder, ".part")
    cache = make(folder, block_bytes=block)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.read_range, store, PATH, 0, len(content))
        kill(process)
        proxy.heal()

        assert waiting.result() == content
    assert files(folder, ".part") == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_processes_killed_at_any_moment_leave_a_cache_that_works(origin, folder, seed):
    numbers, max_bytes = random.Random(seed), 6 * FILE + 20
    for victim in range(5):
        process = start(STREAM, origin.url, PATH, folder, max_bytes, BLOCK, len(DATA), victim)
        for _ in range(numbers.randrange(1, 60)):
            assert process.stdout.readline() == "read\n"
        kill(process)
        assert bytes_in(folder) <= max_bytes
        assert int((folder / "total").read_text()) >= bytes_in(folder)

    cache = make(folder, max_bytes=max_bytes)
    assert [read_all(cache, origin) for _ in range(3)] == [DATA] * 3
    assert files(folder, ".part") == []
    assert int((folder / "total").read_text()) == bytes_in(folder) <= max_bytes


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12 and later
def test_a_child_forked_while_a_block_is_fetched_does_not_hold_it(origin, folder):
    is_fetching, may_go_on = threading.Event(), threading.Event()
    cache = make(folder)

    class WaitingStore(CountingStore):
        def read_range(self, path, offset, length):
            is_fetching.set()
            assert may_go_on.wait(100)
            return super().read_range(path, offset, length)

    store = WaitingStore(origin.url)
    with ThreadPoolExecutor(2) as pool:
        fetching = pool.submit(cache.read_range, store, PATH, 0, 10)
        assert is_fetching.wait(100)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:  # lives until the other end of the pipe is closed
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        waiting = pool.submit(cache.read_range, origin, PATH, 5, 10)
        may_go_on.set()

        assert (fetching.result(), waiting.result()) == (DATA[:10], DATA[5:15])
        os.close(writing)
        os.close(reading)
        os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_while_a_thread_looks_something_up_is_not_blocked():
    is_inside, may_go_on = threading.Event(), threading.Event()
    held = RecentlyUsed(4)
    held.put("a", 1)

    class SlowKey:
        def __hash__(self):
            is_inside.set()
            assert may_go_on.wait(100)
            return 0

    with ThreadPoolExecutor(1) as pool:
        pool.submit(held.get, SlowKey())
        assert is_inside.wait(100)
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            os._exit(0 if held.get("a") is None else 1)
        ended = os.waitpid(child, 0)[1]
        may_go_on.set()

    assert ended == 0
    assert held.get("a") == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12 and later
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_it_travels_to_the_workers_of_a_loader(origin, folder, context):
    cache = make(folder)
    read_all(cache, origin)
    origin.delete(PATH)

    loader = DataLoader(
        Ranges(cache, origin.url), num_workers=2, batch_size=None, multiprocessing_context=context
    )

    assert list(loader) == [DATA[n * 700 : n * 700 + 700] for n in range(15)]


class Ranges:
    """Reads one range an item through a cache."""

    def __init__(self, cache, url):
        self.cache, self.store = cache, open_store(url)

    def __len__(self):
        return 15

    def __getitem__(self, number):
        return self.cache.read_range(self.store, PATH, number * 700, 700)


def test_a_pickled_cache_has_the_same_folder_and_limits(folder, monkeypatch):
    monkeypatch.chdir(folder.parents[1])
    cache = make("disk/cache", max_bytes=5000)
    monkeypatch.chdir("/")

    copy = pickle.loads(pickle.dumps(cache))

    assert copy.folder == str(folder)
    assert (copy.max_bytes, copy.block_bytes) == (5000, BLOCK)


# The size


@pytest.mark.slow
@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_the_size_holds_while_several_processes_write(origin, folder, num_blocks):
    max_bytes = num_blocks * FILE + 20
    processes = [
        start(STREAM, origin.url, PATH, folder, max_bytes, BLOCK, len(DATA), seed)
        for seed in range(3)
    ]

    found = []
    for _ in range(40):
        assert [process.stdout.readline() for process in processes] == ["read\n"] * 3
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        for process in processes:
            os.waitpid(process.pid, os.WUNTRACED)
        found.append(bytes_in(folder))
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)
    for process in processes:
        kill(process)

    assert max(found) <= max_bytes
    assert max(found) > FILE


def test_the_total_is_exact_after_many_threads_wrote(origin, folder):
    cache = make(folder, block_bytes=20)
    barrier = threading.Barrier(8, timeout=100)

    def read(thread):
        barrier.wait()
        for start in range(20 * thread, len(DATA) - 20, 160):
            assert cache.read_range(origin, PATH, start, 20) == DATA[start : start + 20]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))

    assert len(files(folder, ".block")) > 500
    assert int((folder / "total").read_text()) == bytes_in(folder)


def test_what_killed_processes_left_goes_and_what_is_being_written_stays(origin, folder):
    (folder / "ab").mkdir(parents=True)
    left, locked = (folder / "ab" / f"{digit * 38}.part" for digit in "01")
    for path in (left, locked):
        path.write_bytes(bytes(FILE))

    with locked.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_all(make(folder, max_bytes=3 * FILE + 20), origin) == DATA

    assert files(folder, ".part") == [locked]
    assert len(files(folder, ".block")) >= 1
    assert int((folder / "total").read_text()) == bytes_in(folder) <= 3 * FILE + 20


def test_what_was_used_least_recently_goes_first(origin, folder):
    max_bytes = 5 * FILE + 20
    cache = make(folder, max_bytes=max_bytes)
    known = set()
    for number in range(5):
        cache.read_range(origin, PATH, number * BLOCK, 1)
        (new,) = set(files(folder, ".block")) - known
        known.add(new)
        os.utime(new, (number, number))  # long ago, one after the other
    make(folder).read_range(origin, PATH, 0, 1)  # another process uses the oldest one

    cache.read_range(origin, PATH, 7 * BLOCK, 1)

    origin.ranges = []
    for number in (0, 3, 4, 7):
        make(folder).read_range(origin, PATH, number * BLOCK, 1)
    assert origin.ranges == []
    for number in (1, 2):
        make(folder).read_range(origin, PATH, number * BLOCK, 1)
    assert origin.ranges == [(1000, 1000), (2000, 1000)]


def test_a_block_can_be_read_while_it_is_evicted(origin, folder):
    reader = make(folder)
    reader.read_range(origin, PATH, 0, 1)
    writer = make(folder, max_bytes=FILE + 20)
    reader.read_range(origin, PATH, 1, 1)  # opens it

    writer.read_range(origin, PATH, 5 * BLOCK, 1)

    origin.ranges = []
    assert reader.read_range(origin, PATH, 0, BLOCK) == DATA[:BLOCK]
    assert origin.ranges == []
    assert len(files(folder, ".block")) == 1


def test_other_files_of_the_folder_are_left_alone(origin, folder):
    (folder / "ab").mkdir(parents=True)
    for name in ("notes", "ab/notes", "ab/x.block"):
        (folder / name).write_bytes(bytes(5000))
    cache = make(folder, max_bytes=2 * FILE + 20)

    assert [read_all(cache, origin) for _ in range(2)] == [DATA] * 2
    assert all((folder / name).exists() for name in ("notes", "ab/notes", "ab/x.block"))
    assert 1 < len(files(folder, ".block")) <= 3  # with the foreign one


@pytest.mark.parametrize("said", [b"", b"nonsense", b"00000000000000000001x"])
def test_a_total_that_is_lost_is_counted_anew(origin, folder, said):
    read_all(make(folder, max_bytes=4 * FILE + 20), origin)
    (folder / "total").write_bytes(said)

    read_all(make(folder, max_bytes=4 * FILE + 20), origin)

    assert int((folder / "total").read_text()) == bytes_in(folder) <= 4 * FILE + 20


@pytest.mark.parametrize(
    "limits",
    [
        {"max_bytes": BLOCK},
        {"max_bytes": FILE + 19},
        {"max_bytes": 0, "block_bytes": 0},
        {"max_bytes": ROOMY, "block_bytes": 0},
        {"max_bytes": ROOMY, "block_bytes": ROOMY},
    ],
)
def test_a_limit_below_one_block_is_refused(folder, limits):
    with pytest.raises(ConfigError, match=r"does not hold one block of .*give at least"):
        make(folder, **limits)


def test_a_folder_that_is_not_local_is_refused():
    with pytest.raises(ConfigError, match="must be a folder on a local disk"):
        make("s3://bucket/cache")


# Damage


def cut_short(path):
    os.truncate(path, 500)


def empty(path):
    os.truncate(path, 0)


def garble(path):
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)


def garble_trailer(path):
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def lengthen(path):
    path.write_bytes(path.read_bytes() + bytes(10))


@pytest.mark.parametrize("damage", [cut_short, empty, garble, garble_trailer, lengthen])
def test_a_damaged_block_is_fetched_again_and_told_once(origin, folder, caplog, damage):
    make(folder).read_range(origin, PATH, 2 * BLOCK, 10)
    damage(files(folder, ".block")[0])
    origin.ranges = []

    for _ in range(2):
        assert read_all(make(folder), origin) == DATA

    assert Counter(origin.ranges) == {(0, len(DATA)): 1}
    (said,) = caplog.messages
    assert f"block 2 of {origin.url}/{PATH}" in said
    assert "is damaged; fetching it again" in said


def test_a_block_that_is_cut_short_while_it_is_open_is_fetched_again(origin, folder, caplog):
    cache = make(folder)
    read_all(cache, origin)
    read_all(cache, origin)
    for path in files(folder, ".block"):
        cut_short(path)

    assert cache.read_range(origin, PATH, 900, 50) == DATA[900:950]
    assert cache.read_range(origin, PATH, 3700, 50) == DATA[3700:3750]
    assert len(caplog.messages) == 2


def test_a_block_of_someone_who_was_wrong_about_the_size_is_fetched_again(origin, folder, caplog):
    cache = make(folder)
    cache.read_range(origin, PATH, 0, 10, size=800)
    with pytest.raises(StorageError, match=r"\(800 bytes\)"):
        cache.read_range(origin, PATH, 0, 900, size=800)

    assert make(folder).read_range(origin, PATH, 0, 2500) == DATA[:2500]
    assert len(caplog.messages) == 1


# A folder that cannot be used

DEGRADED = """
import logging, os, resource, sys
from pipeline.storage import DiskCache, open_store
how, url, path, folder, expected = sys.argv[1:]
messages = []
class Counting(type(open_store(url))):
    asked = []
    def read_range(self, path, offset, length):
        self.asked.append((offset, length))
        return super().read_range(path, offset, length)
    def read_into(self, path, offset, views):
        self.asked.append((offset, sum(view.nbytes for view in views)))
        super().read_into(path, offset, views)
logging.basicConfig(handlers=[logging.Handler()])
logging.root.handlers[0].emit = lambda record: messages.append(record.getMessage())
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
cache, store = DiskCache(folder, max_bytes=1 << 20, block_bytes=1000), Counting(url)
content = open(expected, "rb").read()
for start in range(0, 10000, 250):
    views = [memoryview(bytearray(300)), memoryview(bytearray(100))]
    assert cache.read_range(store, path, start, 250) == content[start : start + 250]
    cache.read_into(store, path, start, views)
    assert b"".join(views) == content[start : start + 400]
print(len(messages), "cannot use disk cache" in messages[0], store.asked[-2:])
print(messages[0])
"""
STRAIGHT = "1 True [(9750, 250), (9750, 400)]"


def degraded(how, origin, folder, prefix=()):
    command = [*prefix, sys.executable, "-c", DEGRADED, how, origin.url, PATH, str(folder)]
    content = origin.local_path(PATH)
    return subprocess.run([*command, content], cwd=ROOT, capture_output=True, text=True)


def test_with_no_room_for_a_file_reading_goes_on(origin, folder):
    done = degraded("limit", origin, folder)

    assert done.stdout.splitlines()[:1] == [STRAIGHT], done.stderr
    assert "File too large" in done.stdout
    assert files(folder, ".part") == []
    assert int((folder / "total").read_text()) == bytes_in(folder)


def test_with_a_file_in_place_of_the_folder_reading_goes_on(origin, folder):
    folder.parent.mkdir()
    folder.parent.joinpath("cache").write_bytes(b"")

    done = degraded("", origin, folder)

    assert done.stdout.splitlines()[:1] == [STRAIGHT], done.stderr
    assert "Not a directory" in done.stdout or "File exists" in done.stdout


@pytest.mark.parametrize(
    ("options", "reason"),
    [("size=16k", "No space left on device"), ("ro,size=1m", "Read-only file system")],
)
def test_on_a_disk_that_is_full_or_read_only_reading_goes_on(origin, folder, options, reason):
    folder.mkdir(parents=True)
    mount = f'mount -t tmpfs -o {options} none "{folder}" && exec "$@"'
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no right to mount a file system of its own")

    done = degraded("", origin, folder, prefix)

    assert done.stdout.splitlines()[:1] == [STRAIGHT], done.stderr
    assert reason in done.stdout


def test_what_is_kept_can_be_read_from_a_folder_that_cannot_be_written(origin, folder):
    read_all(make(folder), origin)
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(folder)]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no right to mount a file system of its own")
    read = (
        "import sys; from pipeline.storage import DiskCache, open_store;"
        "cache = DiskCache(sys.argv[1], max_bytes=1 << 20, block_bytes=1000);"
        "print(len(cache.read_range(open_store('memory://none'), sys.argv[2], 0, 10500)))"
    )
    store = open_store("memory://none")
    store.put(PATH, DATA)
    read_all(make(folder), store)
    store.delete(PATH)

    done = subprocess.run(
        [*prefix, sys.executable, "-c", read, str(folder), PATH],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert (done.stdout, done.stderr) == ("10500\n", "")


# Caches of images


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (PATH, True),
        ("data/shard/attempt/index.parquet", True),
        ("data/shard/attempt/errors.parquet", True),
        ("snapshots/00000001/index-0123abcd-00000.parquet", True),
        ("snapshots/00000001/shards-0123abcd.parquet", True),
        ("snapshots/00000001/files-0123abcd.parquet", True),
        ("snapshots/00000001/hidden-0123abcd.parquet", True),
        ("artefacts/kv_prefix/name/data/shard/attempt/part-00000.parquet", True),
        ("artefacts/kv_prefix/name/snapshots/00000001/files-0123abcd.parquet", True),
        ("artefacts/kv_prefix/name/artefact.json", False),
        ("artefacts", False),
        ("snapshots/00000001/snapshot.json", False),
        ("snapshots/00000001/index.parquet", False),  # of the first layout: without an id
        ("carve.json", False),
        ("commits/shard.0123456789abcdef.json", False),
        ("runs/1/summary.json", False),
        ("data", False),
        ("", False),
    ],
)
def test_what_has_a_name_of_its_own_for_ever_is_immutable(path, expected):
    assert layout.is_immutable(path) is expected


def test_a_local_store_needs_no_disk_cache(origin, folder):
    store = open_cached_store(origin.url, make(folder), is_immutable=layout.is_immutable)

    assert type(store) is Store
    assert store == origin


def test_a_store_reads_through_the_cache_what_is_immutable_and_nothing_else(remote_url, folder):
    plain = open_store(remote_url)
    store = open_cached_store(remote_url, make(folder), is_immutable=layout.is_immutable)
    store = pickle.loads(pickle.dumps(store))
    for path in (PATH, "carve.json"):
        store.put(path, DATA)
        assert store.read(path) == DATA

    for path in (PATH, "carve.json"):
        plain.put(path, b"other")

    view = bytearray(200)
    store.read_into(PATH, 950, [memoryview(view)[:120], memoryview(view)[120:]])
    with store.open_read(PATH) as file:
        file.seek(2000)
        assert file.read() == DATA[2000:]
    assert (store.read(PATH), store.size(PATH)) == (DATA, len(DATA))
    assert view == DATA[950:1150]
    assert store.read_range(PATH, 999, 2) == DATA[999:1001]
    assert (store.read("carve.json"), store.size("carve.json")) == (b"other", 5)
    assert store.read_range("carve.json", 1, 3) == b"the"
    assert store.open_read("carve.json").read() == b"other"


def test_images_are_the_same_and_their_bytes_are_fetched_once(proxied_s3, folder):
    proxy, url = proxied_s3
    store = open_store(url)
    claim_identity(store, IDENTITY)
    commit_rows(store, "a", [make_row(f"k{i:02d}", seed=i) for i in range(20)])
    build_snapshot(store)
    plain = open_cache(url)
    keys = list(plain)

    def read():
        num_before = len(proxy.requests)
        cache = open_cache(url, disk_cache=make(folder, block_bytes=5000))
        found = [image.features.tolist() for image in cache.get_many(keys)]
        rows = sum(batch.num_rows for batch in cache.scan())
        paths = [
            request.target
            for request in proxy.requests[num_before:]
            if request.method == "GET" and ".parquet" in request.target
        ]
        return found, rows, paths

    first, second = read(), read()

    assert first[:2] == second[:2] == ([plain[key].features.tolist() for key in keys], 20)
    assert any("/data/" in path for path in first[2])
    assert any("/snapshots/" in path for path in first[2])
    assert second[2] == []


def test_a_cache_that_was_refreshed_still_reads_through_the_disk_cache(memory, folder):
    store = open_store(memory)
    claim_identity(store, IDENTITY)
    commit_rows(store, "a", [make_row("a")])
    cache = open_cache(memory, disk_cache=make(folder))
    commit_rows(store, "b", [make_row("b")])

    later = cache.refresh()

    assert list(later) == ["a", "b"]
    assert later.reader.store is cache.reader.store
