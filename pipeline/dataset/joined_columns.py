"""Columns of the user's own table, joined to rows by key."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from pipeline.errors import KeyNotFoundError

Missing = Literal["raise", "null"]


class JoinedColumns:
    """Looks rows up in a table by key; some 100 bytes a row beside the table.

    Args:
        table: with a column `key` of unique text, and others.
        missing: what to give for a row whose key is not there: an error, or None in each column.

    Raises:
        ValueError: there is no column `key`, it holds no text, null or a key twice, or there is no
            other.
    """

    def __init__(self, table: pa.Table, *, missing: Missing = "raise") -> None:
        if "key" not in table.column_names or table.num_columns < 2:
            raise ValueError(
                f"join: the table has the columns {table.column_names}, expected 'key' and others"
            )
        keys = table["key"].to_pylist()
        self._rows = {key: number for number, key in enumerate(keys)}
        if None in self._rows or len(self._rows) != len(keys):
            raise ValueError(
                f"join: of {len(keys)} keys of the table {len(self._rows)} differ, or some are null"
            )
        if not all(isinstance(key, str) for key in keys):
            raise ValueError(f"join: the keys of the table are {table['key'].type}, expected text")
        self._table = table.drop_columns(["key"]).combine_chunks()
        self._missing = missing

    @property
    def names(self) -> list[str]:
        """Of the columns that are joined."""
        return list(self._table.column_names)

    def of(self, keys: Sequence[str]) -> Mapping[str, list[Any]]:
        """Return the values of each column, in the order of the keys.

        Raises:
            KeyNotFoundError: a key is not in the table, and that is an error.
        """
        numbers = [self._rows.get(key) for key in keys]
        if self._missing == "raise" and None in numbers:
            raise KeyNotFoundError(
                f"join: the table has no row for image {keys[numbers.index(None)]!r}; give "
                'missing="null" for None in its place, or filter the cache by key'
            )
        found = self._table.take(pa.array(numbers, pa.int64()))
        return {name: found[name].to_pylist() for name in self.names}
