"""What every store must do, on local disk, in memory, and on real servers."""

import io
import pickle

import pytest

from pipeline.errors import AlreadyExistsError, NotFoundError, StorageError
from pipeline.storage import find_inputs, open_input, open_store, read_input, stat_input
from pipeline.types import ShardRef
from tests.storage_fixtures import names, race, read_all, written_by

FIXTURES = {"remote": "flaky", "radosgw": "s3_url", "azurite": "azure_url"}


@pytest.fixture(params=["local", "memory", "remote", "radosgw", "azurite"])
def store(request, tmp_path, memory):
    """An empty store of each kind; a server starts only when its turn comes."""
    urls = {"local": str(tmp_path / "cache"), "memory": memory, "remote": "flaky://bucket/cache"}
    found = request.getfixturevalue(FIXTURES[request.param]) if request.param in FIXTURES else ""
    return open_store(urls.get(request.param) or f"{found}/cache")


def test_what_is_put_can_be_read_whole_and_in_ranges(store):
    store.put("a/b.bin", b"0123456789")

    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 3, 4) == b"3456"
    assert store.read_range("a/b.bin", 10, 0) == b""
    assert store.size("a/b.bin") == 10


def test_put_replaces_and_an_empty_object_is_an_object(store):
    store.put("a", b"first")
    store.put("a", b"")

    assert store.read("a") == b""
    assert store.exists("a")
    assert [(e.path, e.size) for e in store.list()] == [("a", 0)]


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 11), (9, 2), (10, 1), (500, 1), (-1, 2), (0, -1)]
)
def test_a_range_that_is_not_all_there_is_an_error(store, offset, length):
    store.put("a", b"0123456789")

    with pytest.raises(StorageError, match="cannot read"):
        store.read_range("a", offset, length)


def test_reading_what_does_not_exist_names_it(store):
    store.put("folder/a", b"1")

    for read in (store.read, store.size, store.open_read, lambda p: store.read_range(p, 0, 1)):
        with pytest.raises(NotFoundError, match="cache/nothing"):
            read("nothing")
    assert not store.exists("nothing")
    assert not store.exists("folder")


def test_the_listing_is_recursive_sorted_and_relative(store):
    for path in ("b/2", "a", "b/1", "b/c/d", "bb/1"):
        store.put(path, path.encode())

    assert names(store) == ["a", "b/1", "b/2", "b/c/d", "bb/1"]
    assert names(store, "b") == ["b/1", "b/2", "b/c/d"]
    assert names(store, "none") == []
    assert store.list_names() == ["a", "b", "bb"]
    assert store.list_names("b") == ["1", "2", "c"]
    assert store.list_names("none") == []


def test_the_etag_changes_with_the_content(store):
    store.put("a", b"one")
    before = [e.etag for e in store.list()]
    store.put("a", b"two")

    assert all(before)
    assert [e.etag for e in store.list()] != before


def test_delete_removes_and_may_be_repeated(store):
    store.put("a", b"1")
    store.delete("a")
    store.delete("a")

    assert not store.exists("a")


def test_delete_tree_removes_all_below_and_nothing_beside(store):
    for path in ("x/1", "x/y/2", "xx/3"):
        store.put(path, b"1")
    store.delete_tree("x")
    store.delete_tree("x")

    assert names(store) == ["xx/3"]


@pytest.mark.parametrize("prefix", ["", "/", "//"])
def test_the_whole_store_is_never_deleted(store, prefix):
    store.put("a", b"1")

    with pytest.raises(StorageError, match="refusing to delete the whole store"):
        store.delete_tree(prefix)


@pytest.mark.parametrize("path", ["../a", "a/../b", "/etc/passwd", "a//b", "./a", "a/"])
def test_a_path_cannot_leave_the_store(store, path):
    for use in (store.read, store.delete, store.exists, lambda p: store.put(p, b"")):
        with pytest.raises(StorageError, match="is not a plain path below"):
            use(path)


def test_a_local_file_is_uploaded_whole(store, tmp_path):
    source = tmp_path / "part"
    source.write_bytes(bytes(range(256)) * 9000)

    store.upload("data/part", str(source))

    assert store.read("data/part") == source.read_bytes()
    assert source.exists()


def test_an_open_file_can_be_read_from_any_place_by_several_readers(store):
    store.put("a", bytes(range(256)) * 3000)

    with store.open_read("a") as one, store.open_read("a") as two:
        one.seek(-3, io.SEEK_END)
        two.seek(256 * 2000 + 7)

        assert one.read() == bytes([253, 254, 255])
        assert two.read(3) == bytes([7, 8, 9])
        assert two.seek(-1, io.SEEK_CUR) == 256 * 2000 + 9
        assert two.read(1) == bytes([9])
        assert one.read() == b""


def test_a_store_survives_pickling(store):
    store.put("a", b"1")

    assert pickle.loads(pickle.dumps(store)) == store
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"


def test_put_once_creates_and_then_refuses(store):
    store.put_once("commits/a", b"first")

    with pytest.raises(AlreadyExistsError, match="commits/a: it exists already"):
        store.put_once("commits/a", b"second")
    assert store.read("commits/a") == b"first"


def test_of_eight_racing_threads_exactly_one_wins_each_key(store):
    wins = race(store, writers=8, keys=20)

    assert sorted(key for key, _ in wins) == list(range(20))
    assert all(store.read(f"k{key}") == written_by(writer) for key, writer in wins)


def test_a_good_store_passes_the_check_and_keeps_nothing_of_it(store):
    store.check_writable()

    assert list(store.list(temporary=True)) == []


@pytest.mark.parametrize("step", [1, 512, 1000, 10**6])
def test_an_input_is_read_front_to_back(store, step, monkeypatch):
    monkeypatch.setattr("pipeline.storage._inputs.CHUNK_BYTES", 700)
    store.put("x.tar", bytes(range(256)) * 20)

    assert read_all(store.url_of("x.tar"), step) == bytes(range(256)) * 20


def test_an_input_that_was_replaced_since_the_listing_is_an_error(store):
    store.put("x.tar", b"before")
    shard = stat_input(store.url_of("x.tar"))
    store.put("x.tar", b"after!")

    with pytest.raises(StorageError, match=r"x.tar changed since it was listed.*plan it again"):
        open_input(shard)


def test_an_input_that_is_replaced_while_it_is_read_is_an_error(store):
    store.put("x.tar", b"before" * 10)

    with open_input(stat_input(store.url_of("x.tar"))) as stream:
        stream.read(5)
        store.put("x.tar", b"after!" * 10)
        with pytest.raises(StorageError, match=r"x\.tar changed while it was read"):
            stream.read(1000)


def test_a_missing_input_is_not_found(store):
    for use in (stat_input, read_input, lambda url: find_inputs(url, suffix=".tar")):
        with pytest.raises(NotFoundError, match=r"nothing\.tar"):
            use(store.url_of("nothing.tar"))
    with pytest.raises(NotFoundError):
        open_input(ShardRef(url=store.url_of("nothing.tar"), size=1, etag=""))


def test_inputs_are_found_by_name_by_pattern_and_by_folder(store):
    for path in ("in/b.tar", "in/a.tar", "in/c.json", "in/sub/d.tar"):
        store.put(path, path.encode())
    a, b, d = (stat_input(store.url_of(f"in/{name}.tar")) for name in ("a", "b", "sub/d"))

    assert find_inputs(store.url_of("in/a.tar"), suffix=".tar") == [a]
    assert find_inputs(store.url_of("in"), suffix=".tar") == [a, b]
    assert find_inputs(store.url_of("in/*.tar"), suffix=".tar") == [a, b]
    assert find_inputs(store.url_of("in/**/*.tar"), suffix=".tar") in ([a, b, d], [d])
    assert find_inputs(store.url_of("in/x*"), suffix=".tar") == []
