"""Where many rows lie: what an index says of them, column by column."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.row_place import RowPlace, check_place

Keys = NDArray[np.object_]  # (R,) str

NUMBERS = tuple(f.name for f in fields(RowPlace) if f.name not in ("key", "path"))
_COLUMN = {name: place for place, name in enumerate(("path", *NUMBERS))}
_UNKNOWN = -1  # of a checksum that an older index does not have


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where R rows lie; some 120 bytes a row, and the key.

    Keys are Python strings: Arrow takes some of them tens of times slower.

    Attributes:
        numbers: (R, C) int64, a row of numbers each: which of `paths`, then `NUMBERS`.
        keys: of the rows.
        paths: of the parts that rows lie in.
    """

    numbers: NDArray[np.int64]
    keys: Keys
    paths: Sequence[str]

    @classmethod
    def of_index(cls, rows: pa.Table, path: str, size: int, url: str) -> "Places":
        """Return the places of index rows, all of one part.

        Args:
            rows: with the columns of `layout.INDEX_SCHEMA`.
            path: of the part.
            size: of the part, in bytes.
            url: of the cache, for messages.

        Raises:
            CacheFormatError: a row cannot be where the index says.
        """
        rows = rows.combine_chunks()
        keys = as_keys(rows["key"].to_pylist())
        found = cls(numbers=index_numbers(rows), keys=keys, paths=[path])
        found.check(np.full(len(found), size), url)
        return found

    @classmethod
    def of(cls, places: Sequence[RowPlace]) -> "Places":
        """Return places that are known one by one."""
        paths = [*dict.fromkeys(place.path for place in places)]
        rows = [
            [paths.index(p.path), *(_UNKNOWN if v is None else v for v in _values(p))]
            for p in places
        ]
        return cls(
            numbers=np.array(rows, np.int64).reshape(len(rows), len(_COLUMN)),
            keys=as_keys([place.key for place in places]),
            paths=paths,
        )

    @classmethod
    def joined(cls, pieces: Sequence["Places"]) -> "Places":
        """Return several one behind the other."""
        if len(pieces) == 1:
            return pieces[0]
        paths = [*dict.fromkeys(path for piece in pieces for path in piece.paths)]
        number = {path: place for place, path in enumerate(paths)}
        renamed = []
        for piece in pieces:
            numbers = piece.numbers.copy()
            known = np.array([number[path] for path in piece.paths] or [0], np.int64)
            numbers[:, 0] = known[numbers[:, 0]]
            renamed.append(numbers)
        return cls(
            numbers=np.concatenate(renamed) if renamed else np.empty((0, len(_COLUMN)), np.int64),
            keys=np.concatenate([p.keys for p in pieces]) if pieces else as_keys([]),
            paths=paths,
        )

    def __reduce__(self) -> tuple[Callable[..., "Places"], tuple[object, ...]]:
        """Travel to another process without what other rows share with these."""
        used, number = np.unique(self.numbers[:, 0], return_inverse=True)
        numbers = self.numbers.copy()
        numbers[:, 0] = number
        paths = [self.paths[path] for path in used.tolist()]
        return _arrived, (numbers, self.keys.tolist(), paths)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[RowPlace]:
        """Yield the place of each row."""
        return (self.place(row) for row in range(len(self)))

    def column(self, name: str) -> NDArray[np.int64]:
        """Return one number of every row: `path` (which of `paths`) or one of `NUMBERS`."""
        return self.numbers[:, _COLUMN[name]]

    def take(self, rows: NDArray[np.int64]) -> "Places":
        """Return some of the rows, in the order given."""
        return Places(numbers=self.numbers[rows], keys=self.keys[rows], paths=self.paths)

    def slice(self, start: int, stop: int) -> "Places":
        """Return the rows from `start` to before `stop`; nothing is copied."""
        rows = slice(start, stop)
        return Places(numbers=self.numbers[rows], keys=self.keys[rows], paths=self.paths)

    def key(self, row: int) -> str:
        """Return the key of one row."""
        return str(self.keys[row])

    def place(self, row: int) -> RowPlace:
        """Return one row's place."""
        path, *numbers = self.numbers[row].tolist()
        values: dict[str, int | None] = dict(zip(NUMBERS, numbers, strict=True))
        if values["aux_crc32c"] == _UNKNOWN:
            values["aux_crc32c"] = None
        return RowPlace(key=self.key(row), path=self.paths[path], **values)  # type: ignore[arg-type]

    def where(self, row: int, url: str) -> str:
        """Return one row's place as messages name it.

        Args:
            row: its number here.
            url: of the cache.
        """
        path, offset = self.paths[int(self.numbers[row, 0])], self.column("tokens_offset")[row]
        return f"{url}/{path} key {self.key(row)!r} (byte {offset})"

    def check(self, sizes: NDArray[np.int64], url: str) -> None:
        """Refuse places that are not inside their parts, before as much is fetched as they say.

        Args:
            sizes: (R,) bytes of the part of each row.
            url: of the cache, for messages.

        Raises:
            CacheFormatError: a row cannot be where the index says.
        """
        for bad in np.flatnonzero(~self._can_be(sizes))[:1].tolist():
            place = self.place(bad)
            check_place(place, int(sizes[bad]), f"{url}/{place.path}")

    def _can_be(self, sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell of each row what `check_place` asks."""
        good = np.ones(len(self), np.bool_)
        for kind in ("tokens", "aux"):
            start, length = self.column(f"{kind}_offset"), self.column(f"{kind}_length")
            good &= (start >= 0) & (length > 0) & (length <= sizes - start)
        for name in ("row_group", "row"):
            good &= self.column(name) >= 0
        for name in ("grid_t", "grid_h", "grid_w", "width", "height", "num_tokens"):
            good &= self.column(name) > 0
        return good & (self.column("num_tokens") <= self.column("tokens_length"))


def as_keys(keys: Sequence[str]) -> Keys:
    """Return keys as `Places` holds them."""
    found = np.empty(len(keys), np.object_)
    found[:] = keys
    return found


def _arrived(numbers: NDArray[np.int64], keys: Sequence[str], paths: Sequence[str]) -> Places:
    return Places(numbers=numbers, keys=as_keys(keys), paths=paths)


def _values(place: RowPlace) -> list[int | None]:
    return [getattr(place, name) for name in NUMBERS]


def index_numbers(rows: pa.Table, *, first: str | None = None) -> NDArray[np.int64]:
    """Return the (R, C) `numbers` of index rows.

    Args:
        rows: with the columns of `layout.INDEX_SCHEMA`.
        first: the column that stands for the path; None for 0.
    """
    numbers = np.zeros((rows.num_rows, len(_COLUMN)), np.int64)
    if first is not None:
        numbers[:, 0] = rows[first].to_numpy()
    for name in NUMBERS:
        column = rows[name]
        if column.null_count:  # the one column that may be
            column = column.cast(pa.int64()).fill_null(_UNKNOWN)
        numbers[:, _COLUMN[name]] = column.to_numpy()
    return numbers
