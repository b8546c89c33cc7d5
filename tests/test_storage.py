import errno
import io
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import AlreadyExistsError, ConfigError, NotFoundError, StorageError
from pipeline.storage import find_inputs, open_input, open_store, read_input, stat_input
from pipeline.types import ShardRef

ROOT = Path(__file__).parents[1]


class FlakyFileSystem(MemoryFileSystem):
    """A remote store in memory that fails as it is told to."""

    protocol = "flaky"
    store = {}  # noqa: RUF012  (as its base has them)
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False
    before, after, calls = [], [], []
    honours_create = True
    lock = threading.Lock()
    answers_short_by = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _request(self, name, act):
        self.calls.append(name)
        if self.before:
            raise self.before.pop(0)
        result = act()
        if self.after:
            raise self.after.pop(0)
        return result

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = self._request("get", lambda: super(FlakyFileSystem, self).cat_file(path, start, end))
        return data[: -self.answers_short_by.pop(0)] if self.answers_short_by else data

    def _with_etag(self, info):
        file = self.store.get(info["name"])
        return info if file is None else info | {"ETag": f'"{hash(file.getvalue()):x}"'}

    def info(self, path, **kwargs):
        return self._with_etag(super().info(path, **kwargs))

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
        found = super().find(path, maxdepth, withdirs, detail=True, **kwargs)
        found = {name: self._with_etag(info) for name, info in found.items()}
        return found if detail else list(found)

    def ls(self, path, detail=True, **kwargs):
        found = super().ls(path, detail=True, **kwargs)
        return [self._with_etag(info) if detail else info["name"] for info in found]

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        mode = mode if self.honours_create else "overwrite"
        pipe = super().pipe_file
        with self.lock:
            return self._request("put", lambda: pipe(path, bytes(value), mode=mode))


@pytest.fixture
def flaky(monkeypatch):
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    for name in ("before", "after", "calls", "answers_short_by"):
        monkeypatch.setattr(FlakyFileSystem, name, [])
    monkeypatch.setattr(FlakyFileSystem, "store", {})
    monkeypatch.setattr(FlakyFileSystem, "honours_create", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return FlakyFileSystem


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return "memory://cache"


@pytest.fixture(params=["local", "memory", "remote"])
def store(request, tmp_path, memory, flaky):
    urls = {"local": str(tmp_path / "cache"), "memory": memory, "remote": "flaky://bucket/cache"}
    return open_store(urls[request.param])


@pytest.fixture
def local(tmp_path):
    return open_store(str(tmp_path / "cache"))


@pytest.fixture
def remote(flaky):
    return open_store("flaky://bucket/cache")


def names(store, prefix=""):
    return [entry.path for entry in store.list(prefix)]


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


def test_only_a_local_store_has_local_paths(local, remote):
    local.put("a/b", b"1")

    with open(local.local_path("a/b"), "rb") as file:
        assert file.read() == b"1"
    assert remote.local_path("a/b") is None


def test_a_relative_folder_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_store("here/../cache/")
    monkeypatch.chdir("/")

    assert store.url == str(tmp_path / "cache")
    assert open_store(f"file://{tmp_path}/cache") == store


# put-if-absent


def test_put_once_creates_and_then_refuses(store):
    store.put_once("commits/a", b"first")

    with pytest.raises(AlreadyExistsError, match="commits/a: it exists already"):
        store.put_once("commits/a", b"second")
    assert store.read("commits/a") == b"first"


def test_of_eight_racing_threads_exactly_one_wins_each_key(store):
    barrier = threading.Barrier(8, timeout=30)

    def race(writer):
        won = []
        for key in range(20):
            barrier.wait()
            with suppress(AlreadyExistsError):
                store.put_once(f"k{key}", f"{writer}".encode() * 100)
                won.append((key, writer))
        return won

    with ThreadPoolExecutor(8) as pool:
        wins = [win for won in pool.map(race, range(8)) for win in won]

    assert sorted(key for key, _ in wins) == list(range(20))
    assert all(store.read(f"k{key}") == f"{writer}".encode() * 100 for key, writer in wins)


WRITER = """
import contextlib, sys
from pipeline.errors import AlreadyExistsError
from pipeline.storage import open_store
store, writer = open_store(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for key in range(20):
    with contextlib.suppress(AlreadyExistsError):
        store.put_once(f"k{key}", writer.encode() * 5000)
        print(f"k{key}")
"""


def test_of_several_racing_processes_exactly_one_wins_each_key(local):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    commands = [[sys.executable, "-c", WRITER, local.url, str(writer)] for writer in range(3)]
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for command in commands]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()

    won = [process.communicate(timeout=60)[0].split() for process in processes]

    assert sorted(sum(map(Counter, won), Counter()).items()) == sorted(
        (f"k{key}", 1) for key in range(20)
    )
    for writer, keys in enumerate(won):
        assert all(local.read(key) == str(writer).encode() * 5000 for key in keys)


def test_a_failed_local_write_leaves_nothing_behind(local, monkeypatch):
    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)

    for put in (local.put, local.put_once):
        with pytest.raises(StorageError, match="No space left"):
            put("a", b"1")
    assert list(local.list(temporary=True)) == []


def test_what_a_killed_writer_left_is_hidden_unless_asked_for(local):
    local.put("commits/a.json", b"1")
    local.put("commits/.123.carve-tmp", b"ha")

    assert names(local) == ["commits/a.json"]
    assert local.list_names("commits") == ["a.json"]
    assert len(list(local.list(temporary=True))) == 2


def refused():
    return FileExistsError("412")


def unnamed_condition():
    return OSError(errno.EINVAL, "PreconditionFailed")


def lost_answer():
    return TimeoutError("read timed out")


def conflict():
    return OSError(errno.EBUSY, "409 ConditionalRequestConflict")


@pytest.mark.parametrize("answer", [refused, unnamed_condition, lost_answer, conflict])
def test_an_object_that_holds_our_bytes_is_ours_whatever_the_store_said(remote, flaky, answer):
    flaky.after.append(answer())

    remote.put_once("a", b"attempt 1")

    assert remote.read("a") == b"attempt 1"


@pytest.mark.parametrize("answer", [refused, unnamed_condition, lost_answer, conflict])
def test_an_object_that_holds_other_bytes_is_not_ours(remote, flaky, answer):
    remote.put("a", b"attempt 1")
    flaky.before.append(answer())

    with pytest.raises(AlreadyExistsError):
        remote.put_once("a", b"attempt 2")
    assert remote.read("a") == b"attempt 1"


@pytest.mark.parametrize("answer", [refused, lost_answer, conflict])
def test_a_put_once_that_never_arrived_is_tried_again(remote, flaky, answer):
    flaky.before.append(answer())

    remote.put_once("a", b"attempt 1")

    assert remote.read("a") == b"attempt 1"
    assert flaky.calls.count("put") == 2


def test_an_invalid_request_that_left_nothing_fails_at_once(remote, flaky):
    flaky.before.append(unnamed_condition())

    with pytest.raises(StorageError, match="PreconditionFailed"):
        remote.put_once("a", b"attempt 1")
    assert flaky.calls.count("put") == 1


def test_a_good_store_passes_the_check_and_keeps_nothing_of_it(store):
    store.check_writable()

    assert list(store.list(temporary=True)) == []


def test_a_store_that_ignores_put_if_absent_is_refused(remote, flaky, monkeypatch):
    monkeypatch.setattr(flaky, "honours_create", False)

    with pytest.raises(ConfigError, match=r"ignores put-if-absent.*use a store that honours it"):
        remote.check_writable()
    assert names(remote) == []


def test_a_store_that_cannot_be_written_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store = open_store(str(tmp_path / "file" / "cache"))

    with pytest.raises(ConfigError, match=r"cannot be written.*check that the place exists"):
        store.check_writable()


# retries


TRANSIENT = [
    TimeoutError("timed out"),
    ConnectionResetError("reset by peer"),
    OSError(errno.EBUSY, "SlowDown"),
    OSError(errno.EREMOTEIO, "InternalError"),
    OSError(errno.EIO, "502"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=str)
def test_a_transient_error_is_tried_again(remote, flaky, error):
    remote.put("a", b"123")
    flaky.before.extend([error, error])

    assert remote.read("a") == b"123"


def test_an_error_that_stays_is_reported_with_its_url_and_cause(remote, flaky):
    flaky.before.extend([TimeoutError("timed out")] * 50)

    with pytest.raises(
        StorageError, match=r"flaky://bucket/cache/a: timed out \(5 attempts\)"
    ) as e:
        remote.read("a")

    assert isinstance(e.value.__cause__, TimeoutError)
    assert len(flaky.calls) == 5


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("AccessDenied"),
        FileNotFoundError("x"),
        OSError(errno.EINVAL, "InvalidArgument"),
    ],
)
def test_a_permanent_error_is_not_tried_again(remote, flaky, error):
    flaky.before.append(error)

    with pytest.raises(StorageError, match="flaky://bucket/cache/a"):
        remote.read("a")
    assert len(flaky.calls) == 1


def test_errors_of_the_drivers_own_kinds_are_translated(remote, flaky):
    exceptions = pytest.importorskip("botocore.exceptions")
    remote.put("a", b"123")
    flaky.before.append(exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:1"))

    assert remote.read("a") == b"123"
    flaky.before.append(exceptions.NoCredentialsError())
    with pytest.raises(StorageError, match="Unable to locate credentials"):
        remote.read("a")


def test_an_upload_is_retried_whole(remote, flaky, tmp_path):
    source = tmp_path / "part"
    source.write_bytes(b"x" * 100_000)
    flaky.before.append(ConnectionResetError())

    remote.upload("a", str(source))

    assert remote.read("a") == source.read_bytes()


# URLs


@pytest.mark.parametrize(
    ("url", "extra"), [("s3://b/c", "s3"), ("gs://b/c", "gcs"), ("az://b/c", "azure")]
)
def test_a_missing_driver_names_the_extra_to_install(monkeypatch, url, extra):
    def missing(protocol):
        raise ImportError("no module")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)

    with pytest.raises(ConfigError, match=rf"pip install 'carvecache\[{extra}\]'"):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://x", "unknown kind of store 'nothing'"),
        ("", "names no place"),
        ("s3://", "names no place"),
        ("simplecache::memory://x", "chained URL"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url, message):
    with pytest.raises(ConfigError, match=message):
        open_store(url)


@pytest.mark.parametrize(
    "url", ["s3://KEY:SECRET@bucket/x", "https://h/x.tar?X-Amz-Signature=SECRET&a=1"]
)
def test_a_url_with_credentials_is_refused_and_not_repeated(url):
    for use in (open_store, stat_input, read_input):
        with pytest.raises(ConfigError, match="carries credentials") as caught:
            use(url)
        assert "SECRET" not in str(caught.value)


# inputs


def read_all(url, step):
    with open_input(stat_input(url)) as stream:
        parts = []
        while part := stream.read(step):
            parts.append(part)
        return b"".join(parts)


@pytest.mark.parametrize("step", [1, 512, 1000, 10**6])
def test_an_input_is_read_front_to_back(store, step, monkeypatch):
    monkeypatch.setattr("pipeline.storage._inputs.CHUNK_BYTES", 700)
    store.put("x.tar", bytes(range(256)) * 20)

    assert read_all(store.url_of("x.tar"), step) == bytes(range(256)) * 20


def test_interrupted_requests_neither_skip_nor_repeat_a_byte(remote, flaky, monkeypatch):
    monkeypatch.setattr("pipeline.storage._inputs.CHUNK_BYTES", 64)
    data = os.urandom(10_000)
    remote.put("x.tar", data)
    flaky.before.extend([ConnectionResetError(), OSError(errno.EBUSY, "")])
    flaky.after.append(TimeoutError())
    flaky.answers_short_by.append(63)

    assert read_all("flaky://bucket/cache/x.tar", 100) == data


def test_after_an_error_a_stream_does_not_go_on_past_it(remote, flaky, monkeypatch):
    monkeypatch.setattr("pipeline.storage._inputs.CHUNK_BYTES", 64)
    remote.put("x.tar", os.urandom(1000))

    with open_input(stat_input("flaky://bucket/cache/x.tar")) as stream:
        flaky.before.extend([PermissionError("AccessDenied")] * 2)
        for _ in range(2):
            with pytest.raises(StorageError, match="AccessDenied"):
                stream.read(64)
        assert stream.position == 0


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


def test_a_local_input_that_shrinks_is_an_error(local, monkeypatch):
    monkeypatch.setattr("pipeline.storage._inputs.CHUNK_BYTES", 64)
    local.put("x.tar", bytes(1000))

    with open_input(stat_input(local.url_of("x.tar"))) as stream:
        stream.read(10)
        os.truncate(local.local_path("x.tar"), 100)
        with pytest.raises(StorageError, match="asked for 64 bytes at 64, got 36"):
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


def test_a_local_file_with_a_bracket_in_its_name_is_no_pattern(tmp_path):
    path = tmp_path / "a[1].tar"
    path.write_bytes(b"123")

    assert [ref.url for ref in find_inputs(str(path), suffix=".tar")] == [str(path)]


def test_a_symbolic_link_to_a_shard_is_found_in_its_folder(tmp_path):
    (tmp_path / "real").write_bytes(b"12345")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").symlink_to(tmp_path / "real")

    assert [ref.size for ref in find_inputs(str(tmp_path / "in"), suffix=".tar")] == [5]
