import errno
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import AlreadyExistsError, ConfigError, StorageError
from pipeline.storage import find_inputs, open_input, open_store, read_input, stat_input
from tests.storage_fixtures import names, read_all

ROOT = Path(__file__).parents[1]


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

    won = [process.communicate(timeout=200)[0].split() for process in processes]

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
        StorageError, match=r"flaky://bucket/cache/a: timed out \(8 attempts\)"
    ) as e:
        remote.read("a")

    assert isinstance(e.value.__cause__, TimeoutError)
    assert len(flaky.calls) == 8


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


def test_a_store_without_any_credentials_is_a_configuration_error(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("az").clear_instance_cache()  # one made with credentials

    with pytest.raises(ConfigError, match=r"cannot open az://b/c: .*see docs/stores\.md"):
        open_store("az://b/c").check_writable()


@pytest.mark.parametrize(
    "url", ["s3://KEY:SECRET@bucket/x", "https://h/x.tar?X-Amz-Signature=SECRET&a=1"]
)
def test_a_url_with_credentials_is_refused_and_not_repeated(url):
    for use in (open_store, stat_input, read_input):
        with pytest.raises(ConfigError, match="carries credentials") as caught:
            use(url)
        assert "SECRET" not in str(caught.value)


# inputs


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


def test_a_local_input_that_shrinks_is_an_error(local, monkeypatch):
    monkeypatch.setattr("pipeline.storage._inputs.CHUNK_BYTES", 64)
    local.put("x.tar", bytes(1000))

    with open_input(stat_input(local.url_of("x.tar"))) as stream:
        stream.read(10)
        os.truncate(local.local_path("x.tar"), 100)
        with pytest.raises(StorageError, match="asked for 64 bytes at 64, got 36"):
            stream.read(1000)


def test_a_local_file_with_a_bracket_in_its_name_is_no_pattern(tmp_path):
    path = tmp_path / "a[1].tar"
    path.write_bytes(b"123")

    assert [ref.url for ref in find_inputs(str(path), suffix=".tar")] == [str(path)]


def test_a_symbolic_link_to_a_shard_is_found_in_its_folder(tmp_path):
    (tmp_path / "real").write_bytes(b"12345")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").symlink_to(tmp_path / "real")

    assert [ref.size for ref in find_inputs(str(tmp_path / "in"), suffix=".tar")] == [5]
