"""Loaders that give Arrow tables: HF datasets, from Arrow and from Parquet files, and Lance."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
from torch.utils.data import IterableDataset, get_worker_info

from benchmarks.loaders_base import (
    SEED,
    SHUFFLE_BUFFER,
    Epoch,
    Loader,
    Place,
    RowTable,
    torch_loader,
)
from benchmarks.loaders_batch import BATCH_ROWS, LoadedBatch, join
from benchmarks.loaders_inputs import Corpus

if TYPE_CHECKING:
    import datasets
    import lance


class ArrowTable(Loader):
    """HF datasets over Arrow files that are mapped into memory."""

    name: ClassVar[str] = "datasets, Arrow"
    modules: ClassVar[tuple[str, ...]] = ("datasets",)
    packages: ClassVar[tuple[str, ...]] = ("datasets", "pyarrow")
    how: ClassVar[str] = (
        '`save_to_disk`, `load_from_disk(...).with_format("arrow")` of `large_binary` columns, '
        "map-style in a `DataLoader` that takes batches of rows (`__getitems__`); rows are copied "
        "out of the mapped files; by key with a dict over the key column"
    )
    lacks: ClassVar[dict[str, str]] = {"s3": "`load_from_disk` copies all of it to a local disk"}

    def write(self, folder: Path) -> None:
        """Write Arrow files, as many as there are shards."""
        import datasets

        parts = [
            datasets.Dataset.from_dict(_columns_of(self.corpus, numbers), features=_features())
            for numbers in self.corpus.shards()
        ]
        whole = datasets.concatenate_datasets(parts)
        whole.save_to_disk(str(folder), num_shards=self.corpus.num_shards)

    def batches(self, epoch: Epoch) -> Iterable[LoadedBatch]:
        """Let torch choose the rows."""
        loader = torch_loader(_ArrowRows(self.place.url), epoch)
        return self.resumed(loader, epoch)

    @cached_property
    def _keyed(self) -> tuple["_ArrowRows", dict[str, int]]:
        rows = _ArrowRows(self.place.url)
        return rows, {key: number for number, key in enumerate(rows.keys())}

    def by_key(self, keys: Sequence[str]) -> LoadedBatch:
        """Look the rows' numbers up."""
        rows, numbers = self._keyed
        return rows.__getitems__([numbers[key] for key in keys])


class _ArrowRows(RowTable):
    def __init__(self, folder: str) -> None:
        import datasets

        self.table = datasets.load_from_disk(folder).with_format("arrow")

    def __len__(self) -> int:
        return len(self.table)

    def keys(self) -> list[str]:
        return list(self.table.select_columns("key")[:]["key"].to_pylist())

    def __getitems__(self, numbers: Sequence[int]) -> LoadedBatch:
        first, last = numbers[0], numbers[-1]
        if last - first + 1 == len(numbers) and list(range(first, last + 1)) == list(numbers):
            return _join_table(self.table[first : last + 1], is_owned=False)
        # What `take` gathers is no longer the mapped file, and can be handed on.
        return _join_table(self.table[list(numbers)], is_owned=True)


def _features() -> "datasets.Features":
    from datasets import Features, Value

    return Features(
        {"key": Value("string"), "codes": Value("large_binary"), "aux": Value("binary")}
    )


class ParquetStream(Loader):
    """HF datasets streaming Parquet files."""

    name: ClassVar[str] = "datasets, Parquet stream"
    modules: ClassVar[tuple[str, ...]] = ("datasets",)
    packages: ClassVar[tuple[str, ...]] = ("datasets", "pyarrow", "s3fs")
    how: ClassVar[str] = (
        "`to_parquet(batch_size=64, use_content_defined_chunking=False)`, faster than its "
        'defaults; `load_dataset("parquet", streaming=True).with_format("arrow")`, `shuffle('
        "buffer_size=1000)`, `iter(batch_size=64)`; workers by `shard`; its pause of 5 s at the "
        "end of a shuffled epoch is set to 0; from S3 with the prefetching "
        "`fragment_scan_options` of its documentation"
    )
    lacks: ClassVar[dict[str, str]] = {"by_key": "a stream cannot be asked for a row"}

    def write(self, folder: Path) -> None:
        """Write a Parquet file for each shard."""
        import datasets

        for shard, numbers in enumerate(self.corpus.shards()):
            columns = _columns_of(self.corpus, numbers)
            part = datasets.Dataset.from_dict(columns, features=_features())
            part.to_parquet(
                str(folder / f"part-{shard:05d}.parquet"),
                batch_size=BATCH_ROWS,
                use_content_defined_chunking=False,
            )

    def batches(self, epoch: Epoch) -> Iterable[LoadedBatch]:
        """Stream, each worker its own files."""
        import datasets
        from pyarrow.dataset import ParquetFragmentScanOptions

        remote: dict[str, Any] = {}
        if self.place.is_remote:
            cache = pa.CacheOptions(prefetch_limit=1, range_size_limit=128 << 20)
            remote = {"fragment_scan_options": ParquetFragmentScanOptions(cache_options=cache)}
        files = [f"{self.place.url}/part-{s:05d}.parquet" for s in range(self.corpus.num_shards)]
        rows = datasets.load_dataset(
            "parquet", data_files=files, split="train", streaming=True, **remote
        ).with_format("arrow")
        if epoch.shuffle:
            datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.0
            rows = rows.shuffle(seed=SEED, buffer_size=SHUFFLE_BUFFER)
        loader = torch_loader(_ParquetBatches(rows), epoch)
        return self.resumed(loader, epoch)


class _ParquetBatches(IterableDataset[LoadedBatch]):
    def __init__(self, rows: "datasets.IterableDataset") -> None:
        super().__init__()
        self.rows = rows
        self._mine: Any = None
        self._state: Any = None

    def __iter__(self) -> Iterator[LoadedBatch]:
        number, count = _worker()
        self._mine = self.rows.shard(num_shards=count, index=number, contiguous=False)
        if self._state is not None:
            self._mine.load_state_dict(self._state)
            self._state = None
        for table in self._mine.iter(batch_size=BATCH_ROWS):
            yield _join_table(table, is_owned=True)

    def state_dict(self) -> dict[str, Any] | None:
        return self._mine.state_dict() if self._mine is not None else None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._state = state


class Lance(Loader):
    """Lance with its blobs of the second kind."""

    name: ClassVar[str] = "lance"
    modules: ClassVar[tuple[str, ...]] = ("lance",)
    packages: ClassVar[tuple[str, ...]] = ("pylance",)
    how: ClassVar[str] = (
        "storage version 2.2, codes in a `blob_field`; in order `scanner(batch_size=64, "
        'blob_handling="all_binary")`, each worker its fragments; shuffled a map-style dataset '
        "with `read_blobs` and `take`, workers spawned, as its `get_safe_loader` has it; by key a "
        "BTREE index and `read_blobs` by row id"
    )
    _opened: Any = None

    def write(self, folder: Path) -> None:
        """Write fragments of a shard each, and the index."""
        import lance

        fields = [pa.field("key", pa.string()), lance.blob_field("codes")]
        schema = pa.schema([*fields, pa.field("aux", pa.binary())])
        for numbers in self.corpus.shards():
            columns = _columns_of(self.corpus, numbers)
            columns["codes"] = lance.blob_array(columns["codes"])
            table = pa.table(list(columns.values()), schema=schema)
            lance.write_dataset(table, str(folder), mode="append", data_storage_version="2.2")
        lance.dataset(str(folder)).create_scalar_index("key", "BTREE")

    def batches(self, epoch: Epoch) -> Iterable[LoadedBatch]:
        """Scan in order; take in any other."""
        kind = _LanceRows if epoch.shuffle else _LanceScan
        dataset = kind(self.place.url, _lance_options(self.place), self.corpus.num_rows)
        loader = torch_loader(dataset, epoch, context="spawn")
        return self.resumed(loader, epoch)

    def by_key(self, keys: Sequence[str]) -> LoadedBatch:
        """Ask the index for the row ids, then fetch the blobs."""
        if self._opened is None:
            self._opened = _open_lance(self.place.url, _lance_options(self.place))
        listed = ", ".join(f"'{key}'" for key in keys)
        table = self._opened.to_table(
            columns=["key", "aux"], filter=f"key IN ({listed})", with_row_id=True
        )
        place = {key: number for number, key in enumerate(table["key"].to_pylist())}
        table = table.take([place[key] for key in keys])
        blobs = self._opened.read_blobs("codes", ids=table["_rowid"].to_pylist())
        return join(keys, [b for _, b in blobs], [v.as_buffer() for v in table["aux"]])


def _open_lance(url: str, options: Mapping[str, str]) -> "lance.LanceDataset":
    import lance

    return lance.dataset(url, storage_options=dict(options) or None)


class _LanceScan(IterableDataset[LoadedBatch]):
    def __init__(self, url: str, options: Mapping[str, str], num_rows: int) -> None:
        super().__init__()
        self.url, self.options = url, options

    def __iter__(self) -> Iterator[LoadedBatch]:
        number, count = _worker()
        table = _open_lance(self.url, self.options)
        fragments = table.get_fragments()[number::count]
        scanner = table.scanner(
            batch_size=BATCH_ROWS, blob_handling="all_binary", fragments=fragments
        )
        for batch in scanner.to_batches():
            yield _join_table(batch, is_owned=True)


class _LanceRows(RowTable):
    def __init__(self, url: str, options: Mapping[str, str], num_rows: int) -> None:
        self.url, self.options, self.num_rows = url, options, num_rows
        self._table: Any = None

    def __len__(self) -> int:
        return self.num_rows

    def __getitems__(self, numbers: Sequence[int]) -> LoadedBatch:
        if self._table is None:
            self._table = _open_lance(self.url, self.options)
        blobs = self._table.read_blobs("codes", indices=list(numbers))
        rest = self._table.take(list(numbers), columns=["key", "aux"])
        return join(
            rest["key"].to_pylist(),
            [content for _, content in blobs],
            [value.as_buffer() for value in rest["aux"]],
        )


def _lance_options(place: Place) -> dict[str, str]:
    """Return what Lance needs to reach the store, from the environment."""
    if not place.is_remote:
        return {}
    return {
        "aws_endpoint": os.environ["AWS_ENDPOINT_URL"],
        "aws_region": os.environ["AWS_DEFAULT_REGION"],
        "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
        "allow_http": "true",
    }


def _worker() -> tuple[int, int]:
    """Return number of this worker and how many there are."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


def _columns_of(corpus: Corpus, numbers: Iterable[int]) -> dict[str, list[Any]]:
    rows = [corpus.row(number) for number in numbers]
    return {
        "key": [row.key for row in rows],
        "codes": [row.codes.tobytes() for row in rows],
        "aux": [row.aux for row in rows],
    }


def _join_table(table: pa.Table | pa.RecordBatch, *, is_owned: bool) -> LoadedBatch:
    """Join the rows of an Arrow table of key, codes and aux."""
    codes = table["codes"]
    chunks = codes.chunks if isinstance(codes, pa.ChunkedArray) else [codes]
    return join(
        table["key"].to_pylist(),
        [_values(chunk) for chunk in chunks if len(chunk)],
        [value.as_buffer() for value in table["aux"]],
        is_owned=is_owned,
    )


def _values(column: pa.Array) -> pa.Buffer:
    """Return the bytes of a binary column without its offsets, not copied."""
    kind = "<q" if pa.types.is_large_binary(column.type) else "<i"
    offsets = memoryview(column.buffers()[1]).cast("B").cast(kind[1])
    start, stop = offsets[column.offset], offsets[column.offset + len(column)]
    return column.buffers()[2][start:stop]
