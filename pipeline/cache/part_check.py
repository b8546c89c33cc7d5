"""Compare the rows of a part, while they are scanned, with the index of the attempt it is of."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.cache import layout, parquet, row
from pipeline.errors import CacheFormatError
from pipeline.storage import Store

_IN_BOTH = [f.name for f in layout.FIXED_COLUMNS if f.name in layout.INDEX_SCHEMA.names]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartCheck:
    """What the index of an attempt says about one of its parts."""

    rows: pa.Table  # of this part, in the order they are stored
    where: str  # the part, for messages

    @classmethod
    def read(cls, store: Store, path: str) -> "PartCheck":
        """Read the index beside a part.

        Raises:
            CacheFormatError: there is no such part in it, or it is damaged.
        """
        where = store.url_of(path)
        folder, _, name = path.rpartition("/")
        beside = f"{folder}/{layout.INDEX_NAME}"
        index = parquet.read_table(
            store.read(beside), layout.INDEX_SCHEMA, where=store.url_of(beside)
        )
        number = layout.parse_part_name(name)
        if number is None:
            raise CacheFormatError(f"{where}: not the name of a part")
        mine = index.filter(pc.equal(index["part"], number))
        order = [("row_group", "ascending"), ("row", "ascending")]
        return cls(rows=mine.sort_by(order).combine_chunks(), where=where)

    def columns_for(self, wanted: Sequence[str]) -> list[str]:
        """Return the columns to read so that those wanted can be checked."""
        needed = ("tokens", "aux", "crc32c") if "tokens" in wanted else ()
        return [*dict.fromkeys((*wanted, *needed))]

    def check_size(self, metadata: pq.FileMetaData, rows: int) -> None:
        """Check the number of rows of a part.

        Args:
            metadata: of the part.
            rows: as its commit has it.

        Raises:
            CacheFormatError: they differ.
        """
        if not metadata.num_rows == rows == len(self.rows):
            raise CacheFormatError(
                f"{self.where}: holds {metadata.num_rows} rows, its index {len(self.rows)}, its "
                f"commit {rows}"
            )

    def check_group(self, group: int, table: pa.Table) -> None:
        """Check what was read of one row group.

        Args:
            group: its number.
            table: some of its columns, all of its rows.

        Raises:
            CacheFormatError: rows are missing, moved or damaged.
        """
        rows = self.rows.filter(pc.equal(self.rows["row_group"], group))
        where = f"{self.where} row group {group}"
        if len(rows) != len(table) or rows["row"].to_pylist() != list(range(len(table))):
            raise CacheFormatError(f"{where}: holds {len(table)} rows, its index {len(rows)}")
        for name in _IN_BOTH:
            if name in table.column_names and not _are_equal(table[name], rows[name]):
                raise CacheFormatError(f"{where}: {name} is not what its index says")
        if "aux" in table.column_names:
            self._check_rows(table, rows, where)

    def _check_rows(self, table: pa.Table, rows: pa.Table, where: str) -> None:
        keys, checksums = rows["key"], rows["aux_crc32c"].to_pylist()
        counts = rows["num_tokens"].to_pylist()
        for number, aux_value in enumerate(table["aux"]):
            aux = memoryview(aux_value.as_buffer())
            here = f"{where} key {keys[number].as_py()!r}"
            if "tokens" in table.column_names:
                tokens = memoryview(table["tokens"][number].as_buffer())
                row.unpack_row(tokens, aux, tokens_length=len(tokens), where=here)
                if row.row_checksum(tokens, aux) != table["crc32c"][number].as_py():
                    raise CacheFormatError(f"{here}: does not match its checksum")
            else:
                row.aux_body(aux, where=here)
            row.check_is_indexed(
                aux, num_tokens=counts[number], aux_crc32c=checksums[number], where=here
            )


def _are_equal(stored: pa.ChunkedArray, indexed: pa.ChunkedArray) -> bool:
    return bool(stored.combine_chunks().equals(indexed.combine_chunks()))
