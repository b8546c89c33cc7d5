"""Check that what a snapshot names is there and is what was written."""

import hashlib
import itertools
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedIOBase
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import layout, parquet, part_rows, row
from pipeline.cache.fetch import in_order
from pipeline.cache.reader import SnapshotReader
from pipeline.cache.verify_commits import find_damaged_files
from pipeline.errors import CacheFormatError, NotFoundError
from pipeline.storage import Store

THREADS = 8  # parts of 256 MiB each: some 2 GB on disk while they are checked
_CHUNK = 8 << 20
_IN_BOTH = [f.name for f in layout.FIXED_COLUMNS if f.name in layout.INDEX_SCHEMA.names]
"""Columns that a part and the index both have."""


def find_damage(reader: SnapshotReader, *, threads: int = THREADS) -> Iterator[str]:
    """Yield one line for each thing that is wrong; fetches each file once.

    A part of the snapshot must have the sha256 of its commit. Of its rows, hidden ones too, all
    checksums are tried, and the index must point at those very bytes. In a part with another sha256
    the bytes are tried where the index says that rows are: to tell which can still be read. All
    other files that a commit names must be there with their size and sha256.

    Args:
        reader: of the snapshot.
        threads: parts checked at a time; one of a remote store lies in the folder for temporary
            files meanwhile.

    Raises:
        StorageError: the store cannot be read.
    """
    records = reader.file_records()
    parts = zip(records, _indexed_rows(reader, len(records)), strict=True)
    for lines in in_order(lambda part: _damage_of(reader.store, *part), parts, threads=threads):
        yield from lines
    yield from find_damaged_files(
        reader.store, checked={record["path"] for record in records}, threads=threads
    )


def _damage_of(
    store: Store, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    where = f"{store.url}/{record['path']}"
    try:
        file = _open_here(store, record["path"])
    except NotFoundError:
        return [f"{where}: missing, though a commit names it"]
    with file:
        if hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]:
            return list(_check_part(file, rows, where))
        damage = f"{where}: does not match the sha256 of its commit"
        return [damage, *_check_places(file, rows, where)]


def _indexed_rows(reader: SnapshotReader, num_files: int) -> Iterator[list[dict[str, Any]]]:
    """Yield what the index says of the rows of each part, in the order they are stored."""
    index = reader.index
    file, row_group, number = (index[n].to_numpy() for n in ("file", "row_group", "row"))
    order = np.lexsort((number, row_group, file))
    bounds = np.searchsorted(file[order], np.arange(num_files + 1))
    for start, stop in itertools.pairwise(bounds):
        yield index.take(pa.array(order[start:stop])).to_pylist()


def _open_here(store: Store, path: str) -> BufferedIOBase:
    """Open an object as a file of this machine; a remote one is copied, and the copy nameless."""
    source = store.open_read(path)
    if store.local_path(path) is not None:
        return cast("BufferedIOBase", source)
    with source:
        copy = cast("BufferedIOBase", tempfile.TemporaryFile())  # noqa: SIM115
        shutil.copyfileobj(source, copy, _CHUNK)
    copy.seek(0)
    return copy


def _check_part(
    file: BufferedIOBase, rows: Sequence[Mapping[str, Any]], where: str
) -> Iterator[str]:
    """Check the rows of a part that has its sha256."""
    places = defaultdict(list)
    for place in rows:
        places[place["row_group"], place["row"]].append(place)
    try:
        # Checksums of pages would stop at the first, and name no key.
        part = parquet.open_part(file, where=where, check_pages=False)
        for group in range(part.num_row_groups):
            for number, values in enumerate(_rows(part, group, where)):
                yield from _check_row(values, f"{where} key {values['key']!r}")
                for place in places.pop((group, number), ()):
                    yield from _check_index(file, place, values, f"{where} key {place['key']!r}")
    except CacheFormatError as err:
        yield str(err)
        return
    for (group, number), lost in places.items():
        for place in lost:
            yield (
                f"{where} key {place['key']!r}: the index says row {number} of row group {group}, "
                "which is not there"
            )


def _rows(part: pq.ParquetFile, group: int, where: str) -> list[dict[str, Any]]:
    table = part_rows.read_group(part, group, [*_IN_BOTH, "tokens", "aux", "crc32c"], where)
    with parquet.parsing(where):
        return list(table.to_pylist())


def _check_row(values: Mapping[str, Any], where: str) -> Iterator[str]:
    tokens, aux = values["tokens"], values["aux"]
    if row.row_checksum(tokens, aux) != values["crc32c"]:
        yield f"{where}: does not match its checksum"
    try:
        stored = row.unpack_row(tokens, aux, tokens_length=len(tokens), where=where)
    except CacheFormatError as err:
        yield str(err)
        return
    if stored.num_tokens != values["num_tokens"]:
        yield f"{where}: holds {stored.num_tokens} tokens, not {values['num_tokens']}"


def _check_index(
    file: BufferedIOBase, place: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> Iterator[str]:
    for name in _IN_BOTH:
        if place[name] != values[name]:
            yield f"{where}: the index says {name}={place[name]!r}, the part {values[name]!r}"
    if place.get("aux_crc32c") not in (None, row.aux_checksum(values["aux"])):
        yield f"{where}: the row is not the one that was indexed"
    for name in ("tokens", "aux"):
        if _bytes_at(file, place, name) != values[name]:
            yield f"{where}: the index does not point at its {name}"


def _check_places(
    file: BufferedIOBase, rows: Sequence[Mapping[str, Any]], where: str
) -> Iterator[str]:
    """Try the bytes of a damaged part where the index says that rows are."""
    for place in rows:
        here, aux = f"{where} key {place['key']!r}", _bytes_at(file, place, "aux")
        try:
            row.unpack_row(
                _bytes_at(file, place, "tokens"),
                aux,
                tokens_length=place["tokens_length"],
                where=here,
            )
            row.check_is_indexed(
                aux,
                num_tokens=place["num_tokens"],
                aux_crc32c=place.get("aux_crc32c"),
                where=here,
            )
        except CacheFormatError as err:
            yield str(err)


def _bytes_at(file: BufferedIOBase, place: Mapping[str, Any], name: str) -> bytes:
    """Return what lies at an indexed place, or less where the file ends before."""
    offset = place[f"{name}_offset"]
    length = min(place[f"{name}_length"], os.fstat(file.fileno()).st_size - offset)
    return os.pread(file.fileno(), length, offset) if offset >= 0 and length > 0 else b""
