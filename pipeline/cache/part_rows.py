"""Read row groups of a part, of whichever version, as columns of version 1."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache import layout, parquet, row
from pipeline.errors import CacheFormatError

_SPLIT = ("tokens", "aux")


def column_names(part: pq.ParquetFile) -> list[str]:
    """Return the names of the columns that `read_group` gives."""
    names: list[str] = []
    for name in part.schema_arrow.names:
        names += _SPLIT if name == layout.PACKED else (name,)
    return names


def read_group(part: pq.ParquetFile, group: int, names: Sequence[str], where: str) -> pa.Table:
    """Return columns of one row group, in the order asked for.

    Args:
        part: open.
        group: number of the row group.
        names: some of `column_names`.
        where: the part, for messages.

    Raises:
        CacheFormatError: the row group is damaged.
    """
    is_split = layout.PACKED in part.schema_arrow.names and not set(names).isdisjoint(_SPLIT)
    stored = [name for name in names if not is_split or name not in _SPLIT]
    stored += [layout.PACKED] if is_split else []
    with parquet.parsing(where):
        table = part.read_row_group(group, columns=stored)
        table.validate(full=True)
    expected = part.metadata.row_group(group).num_rows
    if len(table) != expected:
        raise CacheFormatError(f"{where}: row group {group} holds {len(table)} of {expected} rows")
    if not is_split:
        return table
    tokens, aux = _split(table[layout.PACKED], f"{where} row group {group}")
    split = table.append_column("tokens", tokens).append_column("aux", aux)
    return split.select(list(names))


def _split(packed: pa.ChunkedArray, where: str) -> tuple[pa.Array, pa.Array]:
    """Return tokens and aux of rows that are stored as one value each."""
    tokens, aux = [], []
    for number, value in enumerate(packed):
        content = memoryview(value.as_buffer())
        length = row.aux_length(content, where=f"{where} row {number}")
        aux.append(content[:length])
        tokens.append(content[length:])
    return pa.array(tokens, pa.large_binary()), pa.array(aux, pa.binary())
