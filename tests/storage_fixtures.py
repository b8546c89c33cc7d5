"""Fixtures of the storage tests: a store that fails as it is told to, and plain ones."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import AlreadyExistsError
from pipeline.storage import open_input, open_store, stat_input


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


@pytest.fixture
def local(tmp_path):
    return open_store(str(tmp_path / "cache"))


@pytest.fixture
def remote(flaky):
    return open_store("flaky://bucket/cache")


def read_all(url, step):
    with open_input(stat_input(url)) as stream:
        parts = []
        while part := stream.read(step):
            parts.append(part)
        return b"".join(parts)


def names(store, prefix=""):
    return [entry.path for entry in store.list(prefix)]


def race(store, *, writers, keys):
    """Let threads create each key at the same moment; return the (key, writer) that won."""
    barrier = threading.Barrier(writers, timeout=60)

    def write(writer):
        won = []
        for key in range(keys):
            barrier.wait()
            with suppress(AlreadyExistsError):
                store.put_once(f"k{key}", written_by(writer))
                won.append((key, writer))
        return won

    with ThreadPoolExecutor(writers) as pool:
        return [win for won in pool.map(write, range(writers)) for win in won]


def written_by(writer):
    """Return what a writer of `race` writes."""
    return f"{writer}".encode() * 100
