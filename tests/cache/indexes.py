"""Commits whose rows are in an index only, quick to make: for tests of snapshots, not of parts."""

import hashlib
import io
import uuid
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import layout
from pipeline.cache.commit import Commit, try_commit
from pipeline.cache.writer import WrittenFile
from pipeline.storage import Store
from pipeline.types import ShardRef


def index_of(keys: Sequence[str], *, group_rows: int = 3) -> pa.Table:
    """Return an index of rows that are stored in the order given."""
    count = len(keys)
    values = {f.name: [1 + n for n in range(count)] for f in layout.INDEX_SCHEMA}
    values |= {
        "key": list(keys),
        "content_hash": [key.encode().ljust(16, b".")[:16] for key in keys],
        "part": [0] * count,
        "row_group": [n // group_rows for n in range(count)],
        "row": [n % group_rows for n in range(count)],
    }
    return pa.table(values, schema=layout.INDEX_SCHEMA).sort_by("key")


def commit_index(
    store: Store, shard: str, keys: Sequence[str], *, work: str = "f" * 16, at: float = 1.0
) -> Commit:
    """Commit a shard of such rows; it has no part."""
    attempt = uuid.uuid4().hex
    files = []
    if keys:
        sink = io.BytesIO()
        pq.write_table(index_of(keys), sink)
        content = sink.getvalue()
        path = layout.index_path(shard, attempt)
        store.put(path, content)
        part = layout.part_path(shard, attempt, 0)
        digest = hashlib.sha256(content).hexdigest()
        files = [(part, "part", 99, "0" * 64), (path, "index", len(content), digest)]
    commit = Commit(
        shard_id=shard,
        shard=ShardRef(url=f"{shard}.tar", size=1, etag="e"),
        work_fingerprint=work,
        attempt=attempt,
        files=tuple(
            WrittenFile(path=path, kind=kind, size=size, sha256=sha256, rows=len(keys))
            for path, kind, size, sha256 in files
        ),
        num_read=len(keys),
        num_written=len(keys),
        rejected={},
        bytes_in=0,
        tokens_full=0,
        tokens_kept=0,
        bytes_tokens=0,
        seconds=0.0,
        committed_at=at,
    )
    return try_commit(store, commit)
