"""Make snapshots: a sorted index over all commits of a moment, each from the one before.

A snapshot is a few segments, each the sorted rows of some commits. The next one keeps them, reads
the records and index files of the commits that no segment covers, and writes those as one more
segment, together with the rows of segments that are not much larger. What has changed or gone is
dropped from the segment that has it, by name. So a few new shards cost a few, not all.
"""

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cache import layout, parquet
from pipeline.cache.commit import Commit, list_records, read_commits, select_current
from pipeline.cache.coverage import Covered, coverage_table, read_coverage
from pipeline.cache.fetch import in_order
from pipeline.cache.row_groups import RowGroups
from pipeline.cache.segment_reader import SegmentReader, place_rows
from pipeline.cache.segment_writer import (
    NewRows,
    Put,
    choose_merged,
    put_table,
    unique_name,
    write_segment,
)
from pipeline.cache.snapshot_record import (
    IndexFile,
    Segment,
    Snapshot,
    StoredTable,
    latest_snapshot,
    list_snapshots,
    read_snapshot,
    record_path,
)
from pipeline.cache.sorted_rows import even_tables, merge_sorted, repeated, whole_keys
from pipeline.errors import AlreadyExistsError, CacheFormatError
from pipeline.storage import Entry, Store

__all__ = [
    "IndexFile",
    "Segment",
    "Snapshot",
    "StoredTable",
    "build_snapshot",
    "collect_snapshot",
    "latest_snapshot",
    "list_snapshots",
    "read_snapshot",
]

_MAX_NAMED_DUPLICATES = 100
_LOOKED_UP_ROWS = 1 << 18  # new rows whose keys are looked for among the old ones at once
_HIDDEN_ORDER = [(name, "ascending") for name in ("key", "shard", "path", "row_group", "row")]


def build_snapshot(store: Store, wanted: Mapping[str, str] | None = None) -> Snapshot:
    """Make a snapshot of all commits, or return the latest if it covers just these.

    Where two shards hold one key, the shard whose id sorts first keeps it.

    Args:
        store: the cache.
        wanted: work fingerprint by shard id, of those shards whose input is known now: where a
            shard has several commits, that one counts. Of a shard that is not named, the commit
            that the latest snapshot chose counts, or, once it has more, the newest.
    """
    while True:
        # In this order: a commit that `latest` covers is then among the records listed, and
        # publishing the number after it can hide none.
        latest = latest_snapshot(store)
        records = list_records(store)
        preferred = _preferred(_shards_with_several(records), latest, wanted or {})
        if latest is not None and _is_still_so(latest, records, preferred):
            return latest
        written: list[str] = []

        def put(path: str, table: pa.Table, written: list[str] = written) -> StoredTable:
            written.append(path)
            return put_table(store, path, table)

        snapshot = _make(store, latest, records, preferred, put)
        if snapshot == latest or _publish(store, snapshot, written):
            return snapshot
        # Another driver took this number meanwhile, and may cover commits not listed here.


def collect_snapshot(store: Store) -> tuple[Snapshot, Mapping[str, pa.Table]]:
    """Return a snapshot of all commits and its tables by path, without storing any."""
    tables: dict[str, pa.Table] = {}

    def put(path: str, table: pa.Table) -> StoredTable:
        tables[path] = table
        return StoredTable(path=path)

    return _make(store, None, list_records(store), {}, put), tables


def _make(
    store: Store,
    base: Snapshot | None,
    records: Sequence[Entry],
    preferred: Mapping[str, str],
    put: Put,
) -> Snapshot:
    build = _Build(store=store, base=base, put=put)
    with contextlib.closing(build.new):
        return build.make(records, _shards_with_several(records), preferred)


@dataclass(kw_only=True)
class _Build:
    """The making of one snapshot from the one before."""

    store: Store
    base: Snapshot | None
    put: Put
    groups: RowGroups = field(init=False)
    segments: list[Segment] = field(init=False)  # of the base, without what is dropped now
    covered: dict[str, Covered] = field(init=False)  # what they cover
    new: NewRows = field(default_factory=NewRows)
    gone: list[Covered] = field(default_factory=list)
    seen_again: set[int] = field(default_factory=set)  # segments whose records have other etags

    def __post_init__(self) -> None:
        self.groups = RowGroups(self.store)
        self.segments = list(self.base.segments) if self.base and _can_grow(self.base) else []
        self.covered = read_coverage(self.groups, self.segments)

    @property
    def number(self) -> int:
        return self.base.number + 1 if self.base else 0

    def make(
        self,
        records: Sequence[Entry],
        several: Mapping[str, Sequence[str]],
        preferred: Mapping[str, str],
    ) -> Snapshot:
        """Return the snapshot of these records, its tables stored; or the base, if that is it."""
        self._read(records, preferred)
        choices = self._choices(several)
        added = self.new.shards["shard"]
        changed = bool(added or self.gone or self.seen_again)
        if self.base is not None and not changed and choices == self.base.choices:
            return self.base
        self._drop()
        hidden = self._hidden()
        num_rows = sum(c.rows for c in self.covered.values()) + sum(self.new.shards["rows"])
        num_tokens = sum(c.tokens for c in self.covered.values()) + sum(self.new.shards["tokens"])
        pairs = hidden.slice(0, _MAX_NAMED_DUPLICATES).select(["key", "shard"]).to_pydict()
        return Snapshot(
            number=self.number,
            segments=tuple(self._write()),
            num_shards=len(self.covered) + len(added),
            num_rows=num_rows - hidden.num_rows,
            num_tokens=num_tokens - (pc.sum(hidden["num_tokens"]).as_py() or 0),
            num_duplicates=hidden.num_rows,
            duplicates=tuple(zip(*pairs.values(), strict=True)),
            hidden=self._put_hidden(hidden),
            created_at=time.time(),
            records=_listing(records),
            choices=choices,
        )

    def _read(self, records: Sequence[Entry], preferred: Mapping[str, str]) -> None:
        """Read the records that no segment covers, and the index files of those that count."""
        listed = sorted(
            ((*parsed, r) for r in records if (parsed := layout.parse_commit_path(r.path))),
            key=lambda found: found[:2],
        )
        unread: list[Entry] = []
        for shard, group in itertools.groupby(listed, key=lambda found: found[0]):
            works = list(group)
            if shard in preferred:
                works = [found for found in works if found[1] == preferred[shard]]
            known = self.covered.get(shard)
            stamps = [(work, record.etag) for _, work, record in works]
            if known is None or stamps != [(known.work, known.etag)]:
                unread += [record for _, _, record in works]
        left = {shard for shard, _, _ in listed}
        self.gone = [self.covered.pop(shard) for shard in {*self.covered} - left]
        etags = {record.path: record.etag for record in unread}
        for commit, index in in_order(self._with_index, self._added(unread, etags)):
            path = layout.commit_path(commit.shard_id, commit.work_fingerprint)
            self.new.add(commit, etags[path], index)

    def _added(self, unread: Iterable[Entry], etags: Mapping[str, str]) -> Iterator[Commit]:
        """Yield the commits that count and that no segment covers."""
        commits = read_commits(self.store, unread)
        for shard, group in itertools.groupby(commits, key=lambda commit: commit.shard_id):
            (commit,) = select_current(group)
            known = self.covered.get(shard)
            if known is None or known.attempt != commit.attempt:
                self.gone += [] if known is None else [self.covered.pop(shard)]
                yield commit
                continue
            etag = etags[layout.commit_path(shard, commit.work_fingerprint)]
            if (known.work, known.etag) != (commit.work_fingerprint, etag):
                self.covered[shard] = replace(known, work=commit.work_fingerprint, etag=etag)
                self.seen_again.add(known.segment)

    def _with_index(self, commit: Commit) -> tuple[Commit, pa.Table]:
        for file in commit.files:
            if file.kind == "index":
                content, where = self.store.read(file.path), self.store.url_of(file.path)
                parquet.check_content(content, size=file.size, sha256=file.sha256, where=where)
                index = parquet.read_table(content, layout.INDEX_SCHEMA, where=where)
                _check_parts(commit, index, where)
                return commit, index
        return commit, layout.INDEX_SCHEMA.empty_table()

    def _choices(self, several: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        new = dict(zip(self.new.shards["shard"], self.new.shards["work"], strict=True))
        chosen = {s: new[s] if s in new else self.covered[s].work for s in several}
        return {
            shard: (chosen[shard], *(work for work in works if work != chosen[shard]))
            for shard, works in several.items()
        }

    def _drop(self) -> None:
        """Name in each segment the shards of it that do not count any more."""
        by_segment: dict[int, list[Covered]] = {}
        for covered in self.gone:
            by_segment.setdefault(covered.segment, []).append(covered)
        for number, gone in by_segment.items():
            segment = self.segments[number]
            files = SegmentReader(self.groups, segment).files
            names = pa.array(sorted(c.shard for c in gone), pa.string())
            found = files.filter(pc.is_in(files["shard"], value_set=names))
            dropped: dict[str, tuple[int, ...]] = {c.shard: () for c in gone}
            for shard, file in zip(
                found["shard"].to_pylist(), found["file"].to_pylist(), strict=True
            ):
                dropped[shard] += (file,)
            self.segments[number] = replace(
                segment,
                dropped={**segment.dropped, **dropped},
                dropped_rows=segment.dropped_rows + sum(c.rows for c in gone),
            )

    def _hidden(self) -> pa.Table:
        """Return the rows that an equal key of an earlier shard hides.

        Only the keys of new rows, and, if anything was dropped, keys that had hidden rows before,
        can have other rows hidden than before.
        """
        hidden = layout.HIDDEN_SCHEMA.empty_table()
        if self.segments and self.base is not None and self.base.hidden is not None:
            hidden = self.groups.whole(self.base.hidden, layout.HIDDEN_SCHEMA)
        old = [SegmentReader(self.groups, segment) for segment in self.segments]
        files = self.new.files()
        found = []
        pieces = even_tables(merge_sorted(self.new.streams()), _LOOKED_UP_ROWS)
        for rows in whole_keys(pieces):
            keys = rows["key"]
            before = _rows_of(old, keys.to_pylist())
            again = pa.concat_tables(
                [rows.filter(repeated(keys)).select(["key"]), before.select(["key"])]
            )["key"]
            several = place_rows(rows.filter(pc.is_in(keys, value_set=again)), files)
            found.append(_all_but_first(pa.concat_tables([before, several])))
            hidden = hidden.filter(pc.invert(pc.is_in(hidden["key"], value_set=keys)))
        if self.gone and hidden.num_rows:
            keys = sorted(set(hidden["key"].to_pylist()))
            hidden = _all_but_first(_rows_of(old, keys))
        return pa.concat_tables([hidden, *found]).sort_by(_HIDDEN_ORDER)

    def _put_hidden(self, hidden: pa.Table) -> StoredTable | None:
        if not hidden.num_rows:
            return None
        path = layout.snapshot_path(self.number, f"hidden-{unique_name()}.parquet")
        return self.put(path, hidden)

    def _write(self) -> Iterator[Segment]:
        """Yield the segments, the largest first; store the tables of those that are not there."""
        something_new = bool(self.new.shards["shard"])
        merged = choose_merged(self.segments, self.new.num_rows, something_new=something_new)
        for number, segment in enumerate(self.segments):
            if number in merged:
                continue
            if number in self.seen_again:
                path = layout.snapshot_path(self.number, f"shards-{unique_name()}.parquet")
                yield replace(segment, shards=self.put(path, self._coverage_of({number})))
            else:
                yield segment
        if something_new or merged:
            yield write_segment(
                self.number,
                self.new,
                [SegmentReader(self.groups, self.segments[number]) for number in merged],
                self._coverage_of({*merged}),
                put=self.put,
            )

    def _coverage_of(self, segments: set[int]) -> pa.Table:
        return coverage_table(c for c in self.covered.values() if c.segment in segments)


def _check_parts(commit: Commit, index: pa.Table, where: str) -> None:
    num_parts = sum(file.kind == "part" for file in commit.files)
    if not index.num_rows:
        return
    found = pc.min_max(index["part"]).as_py()
    if not 0 <= found["min"] <= found["max"] < num_parts:
        raise CacheFormatError(f"{where}: names part {found['max']} of {num_parts}; it is damaged")


def _can_grow(base: Snapshot) -> bool:
    """Tell whether the segments of a snapshot hold all rows, hidden ones too."""
    return not base.num_duplicates or all(s.shards is not None for s in base.segments)


def _rows_of(segments: Sequence[SegmentReader], keys: Sequence[str]) -> pa.Table:
    found = [segment.rows_of(keys) for segment in segments]
    return pa.concat_tables([layout.HIDDEN_SCHEMA.empty_table(), *found])


def _all_but_first(rows: pa.Table) -> pa.Table:
    rows = rows.sort_by(_HIDDEN_ORDER)
    return rows.filter(repeated(rows["key"]))


def _listing(records: Sequence[Entry]) -> str:
    # With the etag: a record may have been removed and its shard carved again.
    return layout.fingerprint_of_list((record.path, record.etag) for record in records)


def _shards_with_several(records: Sequence[Entry]) -> dict[str, list[str]]:
    """Return the sorted work fingerprints of each shard that has several commits.

    Args:
        records: sorted by path, so that those of one shard follow each other.
    """
    found: dict[str, list[str]] = {}
    parsed = (layout.parse_commit_path(record.path) for record in records)
    for shard, group in itertools.groupby(filter(None, parsed), key=lambda record: record[0]):
        works = [work for _, work in group]
        if len(works) > 1:
            found[shard] = works
    return found


def _preferred(
    several: Mapping[str, Sequence[str]], latest: Snapshot | None, wanted: Mapping[str, str]
) -> dict[str, str]:
    """Return which commit counts, of the shards where it is known without reading them."""
    preferred: dict[str, str] = {}
    for shard_id, works in several.items():
        before = latest.choices.get(shard_id, ()) if latest is not None else ()
        if shard_id in wanted and wanted[shard_id] in works:
            preferred[shard_id] = wanted[shard_id]
        elif sorted(before) == works:
            preferred[shard_id] = before[0]
    return preferred


def _is_still_so(latest: Snapshot, records: Sequence[Entry], preferred: Mapping[str, str]) -> bool:
    """Return whether the latest snapshot is known to cover the records without reading them."""
    chosen = {shard_id: works[0] for shard_id, works in latest.choices.items()}
    return latest.records == _listing(records) and chosen == preferred


def _publish(store: Store, snapshot: Snapshot, written: Sequence[str]) -> bool:
    """Store a snapshot's record; return False, leaving nothing, if its number is taken."""
    try:
        store.put_once(record_path(snapshot.number), snapshot.to_json())
    except AlreadyExistsError:
        for path in written:
            store.delete(path)
        return False
    return True
