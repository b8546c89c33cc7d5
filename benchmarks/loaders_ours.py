"""This project's loader, behind the interface of the others."""

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.loaders_base import SEED, Epoch, Loader
from benchmarks.loaders_batch import BATCH_ROWS, LoadedBatch
from benchmarks.loaders_inputs import GRID, WIDTH, Row
from pipeline import Batch, CarvedDataset, open_cache
from pipeline.cache.commit import claim_identity, try_commit
from pipeline.cache.snapshot import build_snapshot
from pipeline.cache.writer import RowToWrite, ShardWriter
from pipeline.carved_cache import CarvedCache
from pipeline.storage import open_store
from pipeline.types import PackedTokens
from tests.cache.rows import make_commit

_SETTINGS = {
    "encoder": {"name": "random"},
    "carver": {"name": "uniform_grid", "options": {}},
    "codec": {"name": "int8", "options": {}},
    "width": WIDTH,
}
_IDENTITY = {"fingerprint": "0123456789abcdef", "settings": _SETTINGS, "nested": True}


class Carvecache(Loader):
    """`CarvedDataset` and `Batch.of_keys`; checks every row's checksums."""

    name: ClassVar[str] = "carvecache"
    # pandas: pyarrow imports it with the first array that it makes, where it is installed.
    modules: ClassVar[tuple[str, ...]] = ("pipeline.dataset", "s3fs", "botocore.auth", "pandas")
    packages: ClassVar[tuple[str, ...]] = ("carvecache", "pyarrow", "botocore")
    how: ClassVar[str] = (
        "`ShardWriter` with its default sizes; `CarvedDataset(cache, batch_size=64, shuffle=...)` "
        "as it comes, which reads and checks in a thread; with two workers in "
        "`DataLoader(dataset, batch_size=None, num_workers=2)`, shuffled from S3 with two lanes, "
        "as docs/loader.md advises; by key `Batch.of_keys`; shuffled within windows of 1,024 rows "
        "of permuted row groups; every row's checksums are checked"
    )
    _cache: CarvedCache | None = None

    def write(self, folder: Path) -> None:
        """Write and commit a shard at a time."""
        store = open_store(str(folder))
        claim_identity(store, _IDENTITY)
        for shard, numbers in enumerate(self.corpus.shards()):
            writer = ShardWriter(
                store=store,
                shard_id=f"shard-{shard:05d}",
                attempt=uuid.uuid4().hex,
                columns=(),
                metadata={"settings": _SETTINGS},
            )
            with writer:
                for number in numbers:
                    writer.write(_row_to_write(self.corpus.row(number)))
                writer.finish([])
            try_commit(store, make_commit(writer))
        build_snapshot(store)

    def batches(self, epoch: Epoch) -> Iterable[LoadedBatch]:
        """Give batches as they were read."""
        has_lanes = self.place.is_remote and epoch.shuffle and epoch.num_workers > 0
        dataset = CarvedDataset(
            open_cache(self.place.url),
            batch_size=BATCH_ROWS,
            shuffle=epoch.shuffle,
            seed=SEED,
            lanes=epoch.num_workers if has_lanes else 1,
        )
        return self.resumed(_Source(dataset, epoch.num_workers), epoch)

    def by_key(self, keys: Sequence[str]) -> LoadedBatch:
        """Look the keys up in the index and fetch the rows by their place in the files."""
        if self._cache is None:
            self._cache = open_cache(self.place.url)
        return _loaded(Batch.of_keys(self._cache, keys))


class _Source:
    """A dataset, or a DataLoader over it, and the state behind its last batch."""

    def __init__(self, dataset: CarvedDataset, num_workers: int) -> None:
        self._dataset = dataset
        self._num_workers = num_workers
        self._state: Mapping[str, Any] = {}

    def __iter__(self) -> Iterator[LoadedBatch]:
        source: Iterable[Batch] = self._dataset
        if self._num_workers:
            source = DataLoader(self._dataset, batch_size=None, num_workers=self._num_workers)
        for batch in source:
            self._state = batch.state or {}
            yield _loaded(batch)

    def state_dict(self) -> Mapping[str, Any]:
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._dataset.load_state_dict(state)


def _loaded(batch: Batch) -> LoadedBatch:
    rows = batch.rows
    return LoadedBatch(
        keys=batch.keys,
        num_tokens=rows.num_tokens.tolist(),
        codes=batch.codes.view(torch.int8),
        scales=torch.from_numpy(rows.codec_aux.view(np.float32)),
        positions=torch.from_numpy(rows.positions.view(np.int32)),
        sizes=torch.from_numpy(rows.sizes),
    )


def _row_to_write(row: Row) -> RowToWrite:
    return RowToWrite(
        key=row.key,
        content_hash=np.random.default_rng(0).bytes(16),
        packed=PackedTokens(
            tokens=row.codes.tobytes(), aux=row.scales.tobytes(), num_tokens=len(row.codes)
        ),
        positions=row.positions,
        sizes=row.sizes,
        grid=(1, GRID, GRID),
        image_size=(336, 336),
        columns={},
    )
