"""What is stored of each image, as digests that two caches can be compared by."""

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import google_crc32c
import pyarrow.parquet as pq

from pipeline.cache.row import aux_length
from tests.chaos.raw import RawFolder

Rows = dict[str, str]  # digest by key


def stored_digest(row: Mapping[str, Any]) -> str:
    """Return the digest of all columns of one row, bytes as they are."""
    return _digest(sorted(row.items()))


def image_digest(image: Any) -> str:
    """Return the digest of an image as the reader gives it."""
    arrays = (image.features, image.positions, image.sizes, image.ranks)
    numbers = [array.numpy().tobytes() for array in arrays]
    return _digest([image.key, image.grid, image.width, image.height, *numbers])


def records(cache: RawFolder) -> list[dict[str, Any]]:
    """Return all commit records of a cache as they stand."""
    paths = [path for path in cache.list("commits/") if path.endswith(".json")]
    return [json.loads(cache.read(path)) for path in sorted(paths)]


def committed_rows(cache: RawFolder, record: Mapping[str, Any]) -> Rows:
    """Return the rows of one commit; checks files against the record and rows against checksums."""
    rows: Rows = {}
    for file in record["files"]:
        data = cache.read(file["path"])
        assert len(data) == file["size"], file["path"]
        assert hashlib.sha256(data).hexdigest() == file["sha256"], file["path"]
        if file["kind"] == "part":
            for row in pq.read_table(io.BytesIO(data)).to_pylist():
                packed = row.pop("packed")
                length = aux_length(packed, where=row["key"])
                row.update(tokens=packed[length:], aux=packed[:length])
                assert row["key"] not in rows, f"{row['key']} twice in {record['shard_id']}"
                checksum = google_crc32c.value(row["tokens"] + row["aux"])
                assert checksum == row["crc32c"], f"checksum of {row['key']}"
                rows[row["key"]] = stored_digest(row)
    assert len(rows) == record["num_written"], record["shard_id"]
    return rows


def rejected(cache: RawFolder, record: Mapping[str, Any]) -> list[list[str]]:
    """Return (key, stage, reason) of the samples that a commit left out."""
    found = []
    for file in record["files"]:
        if file["kind"] == "errors":
            table = pq.read_table(io.BytesIO(cache.read(file["path"])))
            found += [[row["key"], row["stage"], row["reason"]] for row in table.to_pylist()]
    return sorted(found)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:24]
