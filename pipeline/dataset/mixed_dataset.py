"""A torch dataset over several caches, mixed by weight."""

from collections.abc import Sequence

from pipeline.dataset.carved_dataset import CarvedDataset
from pipeline.dataset.mixed_source import MixedSource
from pipeline.dataset.row_dataset import RowDataset
from pipeline.dataset.shares import Ends


class MixedDataset(RowDataset):
    """Gives rows of several caches, each by its weight, in an order anybody can repeat.

        photos = CarvedDataset(open_cache(url), shuffle=True)
        scans = CarvedDataset(open_cache(other), shuffle=True)
        dataset = MixedDataset([photos, scans], weights=[3, 1], batch_size=64)

    Of every four rows three are photos. Order, resume, ranks and workers are as for
    `CarvedDataset`; caches that run out begin again in the order of their next epoch, and go on
    where the epoch before ended, so that all rows of one are given equally often. Weights are met
    to a thousandth, within each cycle of at most 1,024 rows.

    Args:
        datasets: of caches with one codec and one width, and the same columns. Their own shuffle,
            filters, columns and number of tokens hold; their batches, ranks and states do not.
        weights: of each, above 0.
        rows: of an epoch; None for as many as all of them have. Rounded up to whole cycles.
        seed: of the mixture; at least 0.
        batch_size: as for `CarvedDataset`, like all that follow.
        batch_tokens: likewise.
        ends: likewise.
        rank: likewise.
        world_size: likewise.
        prefetch_bytes: likewise.
        threads: likewise.

    Raises:
        ValueError: an option is out of its range, or the caches do not fit together.
    """

    def __init__(  # noqa: PLR0913  (each is an independent choice of the user)
        self,
        datasets: Sequence[CarvedDataset],
        *,
        weights: Sequence[float],
        rows: int | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        ends: Ends = "exact",
        rank: int | None = None,
        world_size: int | None = None,
        prefetch_bytes: int = 256 << 20,
        threads: int = 1,
    ) -> None:
        if len(weights) != len(datasets):
            raise ValueError(f"{len(datasets)} datasets and {len(weights)} weights; give one each")
        if seed < 0 or (rows is not None and rows < 1):
            raise ValueError(f"seed={seed}, rows={rows}: must be at least 0 and 1")
        sources = [dataset.cache_source for dataset in datasets]
        source = MixedSource(
            sources,
            weights,
            rows=rows or sum(one.length(0) for one in sources),
            seed=seed,
        )
        super().__init__(
            source,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            ends=ends,
            rank=rank,
            world_size=world_size,
            prefetch_bytes=prefetch_bytes,
            threads=threads,
        )
