"""`Store.read_into`: one range into many buffers, on every kind of store."""

import contextlib
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.errors import NotFoundError, StorageError
from pipeline.storage import open_store

CONTENT = os.urandom(200_000)
REMOTE = {"remote": "flaky", "radosgw": "s3_url"}


@pytest.fixture(params=["local", "memory", "remote", "radosgw"])
def store(request, tmp_path, memory):
    """A store of each kind that holds `CONTENT`."""
    urls = {"local": str(tmp_path / "cache"), "memory": memory, "remote": "flaky://bucket/cache"}
    found = request.getfixturevalue(REMOTE[request.param]) if request.param in REMOTE else ""
    store = open_store(urls.get(request.param) or found)
    store.put("a", CONTENT)
    return store


def buffers(*sizes):
    return [memoryview(bytearray(size)) for size in sizes]


@pytest.mark.parametrize(
    "sizes", [(7,), (1, 0, 2, 3), (0,), (), (199_000,), (50_000, 1, 100_000), (3,) * 5000]
)
def test_views_are_filled_one_after_the_other(store, sizes):
    views = buffers(*sizes)

    store.read_into("a", 1000, views)

    assert b"".join(views) == CONTENT[1000 : 1000 + sum(sizes)]


def test_views_may_be_of_any_format(store):
    floats, grid = np.zeros(5, np.float32), np.zeros((3, 4), np.int16)

    store.read_into("a", 3, [memoryview(floats), memoryview(grid)])

    assert floats.tobytes() + grid.tobytes() == CONTENT[3:47]


@pytest.mark.parametrize("offset", [199_995, 200_000, 500_000, -1])
def test_a_range_that_is_not_all_there_is_an_error(store, offset):
    with pytest.raises(StorageError, match="cannot read"):
        store.read_into("a", offset, buffers(4, 2))


@pytest.mark.parametrize("view", [memoryview(bytes(4)), memoryview(bytearray(8))[::2]])
def test_a_view_that_cannot_be_filled_is_an_error(store, view):
    with pytest.raises(TypeError):
        store.read_into("a", 0, [view])


def test_what_does_not_exist_and_folders_are_errors(store):
    store.put("folder/b", b"1")

    with pytest.raises(NotFoundError, match="nothing"):
        store.read_into("nothing", 0, buffers(1))
    with pytest.raises(StorageError, match="folder"):
        store.read_into("folder", 0, buffers(1))
    with pytest.raises(StorageError, match="is not a plain path"):
        store.read_into("../a", 0, buffers(1))


def test_an_object_that_is_replaced_or_deleted_is_seen_so(store):
    (view,) = views = buffers(5)
    store.read_into("a", 0, views)

    store.put("a", b"other")
    store.read_into("a", 0, views)
    assert view == b"other"

    store.delete("a")
    with pytest.raises(NotFoundError):
        store.read_into("a", 0, views)


def test_files_are_closed_with_their_store(tmp_path):
    store = open_store(str(tmp_path))
    store.put("a", b"1")
    num_open = len(os.listdir("/proc/self/fd"))

    store.read_into("a", 0, buffers(1))
    assert len(os.listdir("/proc/self/fd")) == num_open + 1
    del store
    assert len(os.listdir("/proc/self/fd")) == num_open


def num_open_below(folder):
    """Count the files of this process that lie in a folder."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(link.startswith(str(folder)) for link in links)


def test_many_threads_read_more_files_than_stay_open(tmp_path):
    store = open_store(str(tmp_path))
    for number in range(150):
        store.put(f"{number}", number.to_bytes(4, "big") * 10)
    barrier = threading.Barrier(4)

    def read_all(first):
        barrier.wait(100)
        found = buffers(*[4] * 150)
        for number in range(150):
            store.read_into(f"{(first + number) % 150}", 8, [found[(first + number) % 150]])
        return [int.from_bytes(view, "big") for view in found]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read_all, (0, 1, 50, 149))) == [[*range(150)]] * 4
    assert num_open_below(tmp_path) == 64

    copy = pickle.loads(pickle.dumps(store))
    assert num_open_below(tmp_path) == 64
    (view,) = views = buffers(4)
    copy.read_into("149", 4, views)
    assert view == (149).to_bytes(4, "big")
