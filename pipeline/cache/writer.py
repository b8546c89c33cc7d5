"""Write one attempt at one shard: parts, index and errors. Nothing is visible until a commit."""

import hashlib
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache import layout, pages, parquet, row
from pipeline.cache.spool import Spool, local_errors
from pipeline.storage import Store
from pipeline.types import PackedTokens, RejectedSample, TileLayout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowToWrite:
    """One carved image on its way to a part. Tokens are most important first."""

    key: str
    content_hash: bytes  # 16 bytes, of the encoded image
    packed: PackedTokens
    positions: NDArray[np.uint32]  # (K,), in stored order
    sizes: NDArray[np.float32]  # (K,), in stored order
    grid: tuple[int, int, int]  # time, rows, columns before carving
    image_size: tuple[int, int]  # width, height in pixels
    columns: Mapping[str, str | None]
    tiles: TileLayout | None = None  # of a tiled image


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """One finished file of an attempt."""

    path: str  # relative to the cache
    kind: str  # part, index, errors
    size: int
    sha256: str
    rows: int
    footer_crc32c: int | None = None  # of a part: its footer is parsed before its rows are checked


@dataclass(kw_only=True)
class ShardWriter:
    """Writes the files of one attempt; a context manager that removes them on an error.

    Args:
        store: the cache.
        shard_id: of the shard.
        attempt: unique name of this attempt.
        columns: names of the user's text columns.
        metadata: JSON that explains the numbers, stored in every part.
        format_version: how rows are stored; that of the cache.
        row_group_bytes: a row group is closed when its tokens and text reach this size.
        part_bytes: a part is closed when its tokens and text reach this size.
    """

    store: Store
    shard_id: str
    attempt: str
    columns: Sequence[str]
    metadata: Mapping[str, Any]
    format_version: int = layout.FORMAT_VERSION
    row_group_bytes: int = 16 << 20
    part_bytes: int = 256 << 20
    files: list[WrittenFile] = field(default_factory=list, init=False)
    _rows: list[RowToWrite] = field(default_factory=list, init=False)
    _pending_bytes: int = field(default=0, init=False)
    _part: "_Part | None" = field(default=None, init=False)
    _num_parts: int = field(default=0, init=False)
    _index: list[pa.Table] = field(default_factory=list, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.abort()

    def write(self, row_to_write: RowToWrite) -> None:
        """Add one row; may write a row group."""
        self._rows.append(row_to_write)
        self._pending_bytes += _content_bytes(row_to_write)
        if self._pending_bytes >= self.row_group_bytes:
            self._flush()

    def finish(self, errors: Sequence[RejectedSample]) -> list[WrittenFile]:
        """Close the last part, write index and errors, and return all files of the attempt.

        On a local store they are on disk when this returns, and so are the folders they lie in.

        Raises:
            StorageError: the store or the local disk does not take them.
        """
        if self._rows:
            self._flush()
        if self._part is not None:
            self._close_part()
        if self._index:
            index = pa.concat_tables(self._index).sort_by("key")
            self._write_table(layout.index_path(self.shard_id, self.attempt), "index", index)
        if errors:
            columns = [[getattr(e, name) for e in errors] for name in layout.ERRORS_SCHEMA.names]
            table = pa.Table.from_arrays(
                [pa.array(column, pa.string()) for column in columns], schema=layout.ERRORS_SCHEMA
            )
            self._write_table(layout.errors_path(self.shard_id, self.attempt), "errors", table)
        if self.files:
            self._sync_folders()
        return self.files

    def abort(self) -> None:
        """Remove what this attempt wrote. Safe: no commit names these files.

        What cannot be removed is logged, not raised: it must not hide the error before it.
        """
        self._rows.clear()
        for remove in (self._abandon_part, self._remove_files):
            try:
                remove()
            except OSError as err:
                logger.warning(
                    "cannot remove what attempt %s at shard %s left behind: %s",
                    self.attempt,
                    self.shard_id,
                    err,
                )

    def _flush(self) -> None:
        if self._part is None:
            path = layout.part_path(self.shard_id, self.attempt, self._num_parts)
            # With its own name in it, the footer of a part is that of no other.
            own = {"shard": self.shard_id, "attempt": self.attempt, "part": self._num_parts}
            metadata = {**self.metadata, "format_version": self.format_version, **own}
            schema = layout.part_schema(self.columns, metadata, self.format_version)
            self._part = _Part(store=self.store, path=path, schema=schema)
            self._num_parts += 1
        self._part.write_row_group(self._rows, self.columns)
        self._rows = []
        self._pending_bytes = 0
        if self._part.content_bytes >= self.part_bytes:
            self._close_part()

    def _close_part(self) -> None:
        if self._part is not None:
            written, index = self._part.close(number=self._num_parts - 1)
            self.files.append(written)
            self._index.append(index)
            self._part = None

    def _abandon_part(self) -> None:
        if self._part is not None:
            self._part.abandon()
            self._part = None

    def _remove_files(self) -> None:
        self.store.delete_tree(layout.attempt_path(self.shard_id, self.attempt))

    def _sync_folders(self) -> None:
        """Bring the folders of a local cache to disk, from the attempt's up to the cache's own.

        All of them, not the new ones only: another actor may have made one and not synced it yet.
        """
        root = self.store.local_path("")
        attempt = self.store.local_path(layout.attempt_path(self.shard_id, self.attempt))
        if root is None or attempt is None:
            return
        for folder in (Path(attempt), *Path(attempt).parents):
            if folder.is_relative_to(root):
                with local_errors(self.store.url, str(folder)):
                    _sync(folder)

    def _write_table(self, path: str, kind: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        content = sink.getvalue().to_pybytes()
        self.store.put(path, content)
        self.files.append(
            WrittenFile(
                path=path,
                kind=kind,
                size=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                rows=table.num_rows,
            )
        )


def text_bytes(columns: Mapping[str, str | None]) -> int:
    """Return about how much memory a row's text takes: a byte a character."""
    return sum(len(text) for text in columns.values() if text is not None)


def _content_bytes(row_to_write: RowToWrite) -> int:
    return len(row_to_write.packed.tokens) + text_bytes(row_to_write.columns)


class _Part:
    """One Parquet part being written on local disk, then uploaded whole.

    Spooling costs one local copy of at most `part_bytes` and makes an upload repeatable; in a
    local cache the part is written in its place.
    """

    def __init__(self, *, store: Store, path: str, schema: pa.Schema) -> None:
        self.store = store
        self.path = path
        self.schema = schema
        self.content_bytes = 0
        self._groups: list[list[tuple[Any, ...]]] = []  # what the index needs of each row
        local = store.local_path(path)
        self._spool: Spool | None = None
        self._folder = os.path.dirname(local) if local is not None else tempfile.gettempdir()
        with self._local_errors():
            if local is not None:
                os.makedirs(self._folder, exist_ok=True)
                self._on_disk = local
            else:
                self._spool = Spool()
                self._on_disk = self._spool.path
            self._sink = pa.OSFile(self._on_disk, "wb")
        # No dictionary and no page compression on tokens: a value's bytes then lie in the file
        # as they are, so one image can be fetched by offset. One row a page makes the standard
        # Parquet offset index address rows too.
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            use_dictionary=False,
            compression={name: _compression(name) for name in schema.names},
            write_statistics=["key", "num_tokens"],
            max_rows_per_page=1,
            write_page_index=True,
            write_page_checksum=True,
            store_schema=True,
        )

    def write_row_group(self, rows: Sequence[RowToWrite], columns: Sequence[str]) -> None:
        aux = [
            row.pack_aux(r.packed, positions=r.positions, sizes=r.sizes, tiles=r.tiles)
            for r in rows
        ]
        values: list[Sequence[Any]] = [
            [r.key for r in rows],
            [r.content_hash for r in rows],
            [r.packed.num_tokens for r in rows],
            *[[r.grid[axis] for r in rows] for axis in range(3)],
            *[[r.image_size[axis] for r in rows] for axis in range(2)],
            *self._token_columns(rows, aux),
            [row.row_checksum(r.packed.tokens, a) for r, a in zip(rows, aux, strict=True)],
            *[[r.columns.get(name) for r in rows] for name in columns],
        ]
        arrays = [
            pa.array(column, type=self.schema.field(place).type)
            for place, column in enumerate(values)
        ]
        table = pa.Table.from_arrays(arrays, schema=self.schema)
        with self._local_errors():
            self._writer.write_table(table, row_group_size=len(rows))
        self.content_bytes += sum(map(_content_bytes, rows))
        self._groups.append([_index_values(r, a) for r, a in zip(rows, aux, strict=True)])

    def _token_columns(
        self, rows: Sequence[RowToWrite], aux: Sequence[bytes]
    ) -> list[Sequence[bytes | memoryview]]:
        if layout.PACKED in self.schema.names:
            return [[a + r.packed.tokens for r, a in zip(rows, aux, strict=True)]]
        return [[r.packed.tokens for r in rows], aux]

    def close(self, *, number: int) -> tuple[WrittenFile, pa.Table]:
        """Finish the file and put it in its place; return it with its index rows."""
        with self._local_errors():
            self._writer.close()
            self._sink.close()
            written, index = self._describe(number)
        if self._spool is not None:
            self.store.upload(self.path, self._on_disk)
            self._spool.close()
        return written, index

    def abandon(self) -> None:
        """Free the spool, whatever has happened to it."""
        # Closing the writer would write a footer, which fails again on a full disk.
        self._writer.is_open = False
        self._sink.close()
        if self._spool is not None:
            self._spool.close()

    def _describe(self, number: int) -> tuple[WrittenFile, pa.Table]:
        with (
            open(self._on_disk, "rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content,
        ):
            index = self._index_rows(content, number)
            written = WrittenFile(
                path=self.path,
                kind="part",
                size=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                rows=index.num_rows,
                footer_crc32c=_footer_checksum(content, self.path),
            )
            if self._spool is None:
                os.fsync(file.fileno())
        return written, index

    def _local_errors(self) -> AbstractContextManager[None]:
        return local_errors(self.store.url_of(self.path), self._folder)

    def _index_rows(self, file: mmap.mmap, number: int) -> pa.Table:
        metadata = pq.read_metadata(self._on_disk)
        columns: dict[str, list[Any]] = {name: [] for name in layout.INDEX_SCHEMA.names}
        for group, rows in enumerate(self._groups):
            places = self._places(file, metadata.row_group(group), rows)
            for place, (known, at_both) in enumerate(zip(rows, places, strict=True)):
                key, content_hash, *numbers, aux_crc32c, _ = known
                at = (*at_both, aux_crc32c)
                values = (key, content_hash, number, group, place, *numbers, *at)
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
        return pa.Table.from_pydict(columns, schema=layout.INDEX_SCHEMA)

    def _places(
        self, file: mmap.mmap, group: pq.RowGroupMetaData, rows: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield offset and length of each row's tokens, and of its aux."""

        def values_of(name: str) -> Iterator[tuple[int, int]]:
            column = group.column(self.schema.get_field_index(name))
            return pages.byte_array_offsets(file, column.data_page_offset, len(rows))

        if layout.PACKED not in self.schema.names:
            for tokens, aux in zip(values_of("tokens"), values_of("aux"), strict=True):
                yield (*tokens, *aux)
            return
        for (start, length), (*_, aux_length) in zip(values_of(layout.PACKED), rows, strict=True):
            yield start + aux_length, length - aux_length, start, aux_length


def _compression(column: str) -> str:
    fixed = {f.name for f in (*layout.FIXED_COLUMNS, *layout.PACKED_COLUMNS)}
    return "none" if column in fixed else "zstd"


def _index_values(r: RowToWrite, aux: bytes) -> tuple[Any, ...]:
    """Return what the index says of a row beside its place, in order, and the length of its aux."""
    numbers = (r.packed.num_tokens, *r.grid, *r.image_size, row.aux_checksum(aux))
    return (r.key, r.content_hash, *numbers, len(aux))


def _footer_checksum(content: mmap.mmap, where: str) -> int:
    """Return the checksum of the footer of a whole Parquet file."""
    footer = parquet.footer_of(content[-8:], where=where)
    return parquet.footer_checksum(content[-footer:] if isinstance(footer, int) else footer)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
