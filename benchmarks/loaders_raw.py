"""The rows in one plain file: read as fast as it can be, and with no reader but numpy."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.loaders_base import Epoch, Loader, Place, RowTable, cut_row, torch_loader
from benchmarks.loaders_batch import LoadedBatch, join
from pipeline.cache.buffers import BufferPool

if TYPE_CHECKING:
    from s3fs import S3FileSystem

_READ_BYTES = 8 << 20
_GET_BYTES = 16 << 20
_GET_PIECE_BYTES = 1 << 20
_GET_THREADS = 8
_NAMES = ("rows.bin", "ends.npy", "keys.npy")


class PlainFile(Loader):
    """One file of rows, one of where they end, one of keys."""

    name: ClassVar[str] = "plain file"
    packages: ClassVar[tuple[str, ...]] = ("numpy", "s3fs")
    how: ClassVar[str] = (
        "all rows in one file that `numpy.memmap` maps, and where they end and their keys in two "
        "`.npy` files; a map-style dataset in a `DataLoader`; by key with a dict; from S3 the "
        "ranges of a batch at once with `s3fs.cat_ranges`"
    )

    def write(self, folder: Path) -> None:
        """Write the three files."""
        ends, end = [], 0
        with open(folder / _NAMES[0], "wb") as sink:
            for row in self.corpus.rows():
                end += sink.write(row.codes.tobytes()) + sink.write(row.aux)
                ends.append(end)
        np.save(folder / _NAMES[1], np.array(ends, np.int64))
        np.save(folder / _NAMES[2], np.array(self.corpus.keys()))

    def _rows(self) -> "_FileRows":
        return (_RemoteRows if self.place.is_remote else _MappedRows)(self.place.url)

    def batches(self, epoch: Epoch) -> Iterable[LoadedBatch]:
        """Let torch choose the rows."""
        return self.resumed(torch_loader(self._rows(), epoch), epoch)

    @cached_property
    def _keyed(self) -> tuple["_FileRows", dict[str, int]]:
        rows = self._rows()
        return rows, {key: number for number, key in enumerate(rows.keys)}

    def by_key(self, keys: Sequence[str]) -> LoadedBatch:
        """Look the rows' numbers up."""
        rows, numbers = self._keyed
        return rows.__getitems__([numbers[key] for key in keys])


class _FileRows(RowTable):
    ends: NDArray[np.int64]  # (rows + 1,)
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitems__(self, numbers: Sequence[int]) -> LoadedBatch:
        ranges = [(int(self.ends[n]), int(self.ends[n + 1])) for n in numbers]
        rows = [cut_row(content) for content in self._contents(ranges)]
        keys = [self.keys[n] for n in numbers]
        return join(keys, [r[0] for r in rows], [r[1] for r in rows])

    def _contents(self, ranges: Sequence[tuple[int, int]]) -> list[Any]:
        raise NotImplementedError


class _MappedRows(_FileRows):
    def __init__(self, folder: str) -> None:
        self.ends = np.concatenate([[0], np.load(Path(folder, _NAMES[1]))])
        self.keys = np.load(Path(folder, _NAMES[2])).tolist()
        self.file = np.memmap(Path(folder, _NAMES[0]), np.uint8, mode="r")

    def _contents(self, ranges: Sequence[tuple[int, int]]) -> list[Any]:
        return [self.file[start:stop] for start, stop in ranges]


class _RemoteRows(_FileRows):
    """Opens the store anew in each process: no client survives a fork."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._stores: dict[int, Any] = {}

    def _open(self) -> "S3FileSystem":
        if os.getpid() not in self._stores:
            import s3fs

            self._stores = {os.getpid(): s3fs.S3FileSystem(skip_instance_cache=True)}
        return self._stores[os.getpid()]

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        with self._open().open(f"{self.url}/{_NAMES[1]}") as file:
            return np.concatenate([[0], np.load(file)])

    @cached_property
    def keys(self) -> list[str]:
        with self._open().open(f"{self.url}/{_NAMES[2]}") as file:
            return list(np.load(file).tolist())

    def _contents(self, ranges: Sequence[tuple[int, int]]) -> list[Any]:
        path = f"{self.url}/{_NAMES[0]}"
        start, stop = ranges[0][0], ranges[-1][1]
        if stop - start == sum(last - first for first, last in ranges):
            whole = memoryview(self._open().cat_file(path, start=start, end=stop))
            return [whole[first - start : last - start] for first, last in ranges]
        starts, stops = zip(*ranges, strict=True)
        return list(self._open().cat_ranges([path] * len(ranges), list(starts), list(stops)))


def plain_read(place: Place, *, part: int = 0, parts: int = 1) -> Iterator[int]:
    """Read Parquet files below a place and throw them away; yield the bytes of each piece.

    Locally into one buffer, without another in between; from a store by ranged GETs in threads.

    Args:
        place: of the files.
        part: which of them, of
        parts: equal ones; of local files.
    """
    if not place.is_remote:
        buffer = BufferPool().take(_READ_BYTES)
        for path in sorted(Path(place.url).rglob("*.parquet"))[part::parts]:
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    yield count
        return
    yield from _plain_gets(place.url)


def _plain_gets(url: str) -> Iterator[int]:
    """Read by botocore, of libraries the one that takes least of the processor's time."""
    import botocore.config
    import botocore.session
    import s3fs

    store = s3fs.S3FileSystem()
    sizes = {p: store.size(p) for p in store.find(url) if p.endswith(".parquet")}
    settings = botocore.config.Config(max_pool_connections=_GET_THREADS)
    client = botocore.session.Session().create_client("s3", config=settings)

    pieces = [
        (path, start, min(start + _GET_BYTES, size))
        for path, size in sizes.items()
        for start in range(0, size, _GET_BYTES)
    ]
    with ThreadPoolExecutor(_GET_THREADS) as pool:
        yield from pool.map(lambda piece: sum(map(len, get_range(client, *piece))), pieces)


def get_range(client: Any, path: str, start: int, stop: int) -> Iterator[bytes]:  # noqa: ANN401
    """Yield the bytes of a range of `bucket/key` in pieces as they come, by botocore's client."""
    bucket, _, key = path.partition("/")
    wanted = f"bytes={start}-{stop - 1}"
    body = client.get_object(Bucket=bucket, Key=key, Range=wanted)["Body"]
    return iter(lambda: body.read(_GET_PIECE_BYTES), b"")
