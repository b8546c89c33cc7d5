"""The samples that committed shards were carved without, and why."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from pipeline.cache import layout, parquet
from pipeline.cache.commit import Commit, list_records, parse_commit, read_identity, select_current
from pipeline.cache.fetch import in_order
from pipeline.cache.writer import WrittenFile
from pipeline.storage import Entry, Store
from pipeline.types import RejectedSample

Rejection = tuple[str, RejectedSample]
"""URL of a shard, and a sample of it."""


def read_rejections(store: Store) -> Iterator[Rejection]:
    """Yield the rejected samples of each shard's latest commit, by shard id.

    Raises:
        CacheFormatError: there is no cache, or a record or a table of it is damaged.
    """
    read_identity(store)
    by_shard: dict[str, list[Entry]] = defaultdict(list)
    for record in list_records(store):
        parsed = layout.parse_commit_path(record.path)
        if parsed is not None:
            by_shard[parsed[0]].append(record)
    for found in in_order(lambda records: _of_shard(store, records), by_shard.values()):
        yield from found


def _of_shard(store: Store, records: Sequence[Entry]) -> list[Rejection]:
    commits = [parse_commit(store.read(record.path), where=record.path) for record in records]
    return [
        rejection
        for commit in select_current(commits)
        for file in commit.files
        if file.kind == "errors"
        for rejection in _of_file(store, commit, file)
    ]


def _of_file(store: Store, commit: Commit, file: WrittenFile) -> Iterator[Rejection]:
    content, where = store.read(file.path), store.url_of(file.path)
    parquet.check_content(content, size=file.size, sha256=file.sha256, where=where)
    for row in parquet.read_table(content, layout.ERRORS_SCHEMA, where=where).to_pylist():
        yield commit.shard.url, RejectedSample(**row)
