"""Check that every file that a commit names is there and is what was written."""

import hashlib
from collections.abc import Collection, Iterator

from pipeline.cache.commit import list_records, parse_commit
from pipeline.cache.fetch import in_order
from pipeline.cache.writer import WrittenFile
from pipeline.errors import CacheFormatError, NotFoundError
from pipeline.storage import Entry, Store

_CHUNK = 8 << 20


def find_damaged_files(
    store: Store, *, checked: Collection[str] = (), threads: int
) -> Iterator[str]:
    """Yield one line for each commit record, and each file of one, that is not what it was.

    Args:
        store: the cache.
        checked: paths of files to leave out.
        threads: records looked at a time.

    Raises:
        StorageError: the store cannot be read.
    """
    for lines in in_order(
        lambda record: _damage_of_record(store, record, checked),
        list_records(store),
        threads=threads,
    ):
        yield from lines


def _damage_of_record(store: Store, record: Entry, checked: Collection[str]) -> list[str]:
    try:
        commit = parse_commit(store.read(record.path), where=record.path)
    except CacheFormatError as err:
        return [f"{store.url}/{record.path}: not the record that was written: {err}"]
    lines = [_damage_of_file(store, file) for file in commit.files if file.path not in checked]
    return [line for line in lines if line]


def _damage_of_file(store: Store, file: WrittenFile) -> str:
    """Return what is wrong with a file of a commit, or nothing."""
    where = f"{store.url}/{file.path}"
    digest, size = hashlib.sha256(), 0
    try:
        with store.open_read(file.path) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except NotFoundError:
        return f"{where}: missing, though a commit names it"
    if size != file.size:
        return f"{where}: has {size} bytes, not the {file.size} of its commit"
    if digest.hexdigest() != file.sha256:
        return f"{where}: does not match the sha256 of its commit"
    return ""
