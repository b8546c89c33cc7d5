"""A torch dataset over a cache: checked batches of packed rows, in an order anybody can repeat."""

from collections.abc import Sequence

import pyarrow as pa

from pipeline.carved_cache import CarvedCache
from pipeline.dataset.cache_source import CacheSource, Shuffle
from pipeline.dataset.joined_columns import JoinedColumns, Missing
from pipeline.dataset.row_dataset import RowDataset
from pipeline.dataset.selection import Filters
from pipeline.dataset.shares import Ends

DEFAULT_WINDOW = 1024


class CarvedDataset(RowDataset):
    """Iterates over a cache; every row once over all ranks and workers together.

        dataset = CarvedDataset(open_cache(url), batch_size=64, shuffle=True, seed=0)
        for epoch in range(3):
            dataset.set_epoch(epoch)
            for batch in dataset:
                tokens = batch.padded(device="cuda")

    A thread reads and checks ahead, so a loop needs no worker processes; where it wants them,
    `DataLoader(dataset, batch_size=None, num_workers=2)`. The order of an epoch depends on `seed`,
    the epoch, `window` and `lanes` alone (`EpochOrder`). Step s of all ranks takes the next
    `world_size * batch_size` rows of it, rank r the r-th `batch_size` of them: so a job of another
    size, with the same rows a step, sees the same steps.

    Where an epoch stands is the number of rows taken. `state_dict()`, or `batch.state` where
    workers run ahead, says it; `load_state_dict` goes on from there on any number of ranks and
    workers, without reading what was taken.

    Memory: `prefetch_bytes`, 32 bytes a row group, up to 2 kB a part (`benchmarks/scale.md`), and
    of the index no more than 2^19 rows.

    Args:
        cache: made by `open_cache`.
        batch_size: rows of a batch of this rank. None to be given rows, for a `DataLoader` with a
            `batch_size` of its own and `collate_fn=dataset.collate`.
        batch_tokens: instead, as many rows a batch as have at most so many tokens together.
        keep_tokens: at most this many tokens an image, the most important; None for what the
            cache was opened with.
        shuffle: False for the order of storage.
        seed: of the shuffle; at least 0.
        window: rows that are shuffled together. Reading from a remote store holds so many.
        lanes: cuts the order into runs that are read side by side, each with windows of its own.
            From a remote store, give (a multiple of) the ranks times workers of the largest job:
            then no two of them fetch the same row group. Part of the order.
        ends: what becomes of the rows behind the last full step; see `Ends`. Give `pad` or `drop`
            where all ranks must take equally many steps.
        rank: of this process; None for that of `torch.distributed` where it is initialised, or 0.
        world_size: number of processes; None likewise, or 1.
        columns: of the cache, user columns among them, to give with each row.
        join: a table with a column `key`, whose other columns are given with each row.
        join_missing: what to do about a row that `join` does not have.
        filters: conditions (column, operator, value) that rows must pass; see `Filters`.
        skip_damaged: leave damaged rows out of their batch and name them in `batch.damaged`,
            instead of raising an error.
        prefetch_bytes: of rows that are loaded ahead or in use.
        threads: that read and check, of a cache on a local disk; more help where it is slow.

    Raises:
        ValueError: an option is out of its range, or there is no such column.
    """

    def __init__(  # noqa: PLR0913  (each is an independent choice of the user)
        self,
        cache: CarvedCache,
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        keep_tokens: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        window: int = DEFAULT_WINDOW,
        lanes: int = 1,
        ends: Ends = "exact",
        rank: int | None = None,
        world_size: int | None = None,
        columns: Sequence[str] = (),
        join: pa.Table | None = None,
        join_missing: Missing = "raise",
        filters: Filters | None = None,
        skip_damaged: bool = False,
        prefetch_bytes: int = 256 << 20,
        threads: int = 1,
    ) -> None:
        for name, value in (("window", window), ("lanes", lanes)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be at least 0")
        self.cache = cache if keep_tokens is None else cache.keeping(keep_tokens)
        lane_rows = batch_size or 1
        self.cache_source = CacheSource(
            cache=self.cache,
            shuffle=Shuffle(
                seed=seed,
                window=-(-window // lane_rows) * lane_rows if lanes > 1 else window,
                lanes=lanes,
                lane_rows=lane_rows if lanes > 1 else 1,
                shuffle=shuffle,
            ),
            columns=columns,
            join=None if join is None else JoinedColumns(join, missing=join_missing),
            filters=filters,
            skip_damaged=skip_damaged,
        )
        super().__init__(
            self.cache_source,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            ends=ends,
            rank=rank,
            world_size=world_size,
            prefetch_bytes=prefetch_bytes,
            threads=threads,
        )
