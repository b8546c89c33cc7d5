"""The object store of `loaders.py`: Ceph's S3 gateway on loopback, all in memory."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.servers.radosgw import Radosgw


@contextmanager
def s3_server(num_bytes: int) -> Iterator[Radosgw]:
    """Start a server that can hold so many bytes; the environment leads clients there."""
    with (
        tempfile.TemporaryDirectory(prefix="srv-", dir="/tmp") as folder,
        Radosgw(Path(folder), memory_bytes=num_bytes + (2 << 30)) as server,
        _environment({**server.environment(), "AWS_ALLOW_HTTP": "true"}),
    ):
        yield server


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def upload(folder: Path, url: str) -> None:
    """Copy a folder into a bucket."""
    import s3fs

    store = s3fs.S3FileSystem(skip_instance_cache=True)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put_file(str(path), f"{url}/{path.relative_to(folder)}")


def is_complete() -> bool:
    """Tell whether the programs that S3 takes are here."""
    return all(shutil.which(name) for name in ("radosgw", "ceph-mon", "ceph-osd", "curl"))
