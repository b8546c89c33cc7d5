"""Check that what a snapshot names is there and is what was written."""

import hashlib
from collections.abc import Iterator

import pyarrow as pa

from pipeline.cache import row
from pipeline.cache.reader import SnapshotReader
from pipeline.errors import CacheFormatError, NotFoundError

_CHUNK = 8 << 20


def find_damage(reader: SnapshotReader) -> Iterator[str]:
    """Yield one line for each thing that is wrong; reads every byte of the snapshot's parts."""
    for record in reader.file_records():
        yield from _check_file(reader, record)
    for number in range(len(reader)):
        try:
            reader.read_tokens(reader.place(number))
        except (CacheFormatError, NotFoundError) as err:
            yield str(err)


def _check_file(reader: SnapshotReader, record: dict[str, object]) -> Iterator[str]:
    path = str(record["path"])
    where = f"{reader.store.url}/{path}"
    digest = hashlib.sha256()
    try:
        with reader.store.open_read(path) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except NotFoundError:
        yield f"{where}: missing, though a commit names it"
        return
    if digest.hexdigest() != record["sha256"]:
        yield f"{where}: does not match the sha256 of its commit"
        return
    for batch in reader.scan_part(path, ["key", "tokens", "aux", "crc32c"]):
        yield from _check_rows(batch, where)


def _check_rows(batch: pa.RecordBatch, where: str) -> Iterator[str]:
    for values in batch.to_pylist():
        if row.row_checksum(values["tokens"], values["aux"]) != values["crc32c"]:
            yield f"{where} key {values['key']!r}: does not match its checksum"
