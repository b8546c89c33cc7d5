"""The first share of a remote source is there as soon as it can be."""

import threading
from collections.abc import Iterator
from concurrent.futures import Executor

import numpy as np
import pytest

from pipeline.cache.places import Places
from pipeline.cache.row_batch import of_stored
from pipeline.cache.row_fetch import Allocate
from pipeline.dataset.loaded_rows import LoadedRows
from pipeline.dataset.shares import Reader, Share, in_batches
from pipeline.dataset.stream import Numbers, Stream

ROWS, BATCH = 64, 4


class Remote:
    """Rows without content; says what is asked for, and waits before it plans or loads."""

    is_local = False

    def __init__(self, *, is_broken: bool = False) -> None:
        self.is_broken = is_broken
        self.loaded: list[list[int]] = []
        self.may_load, self.may_plan = threading.Event(), threading.Event()
        self.may_load.set(), self.may_plan.set()
        self.loads_first, self.plans_second = threading.Event(), threading.Event()

    def places(self, epoch: int, positions: Numbers) -> Numbers:
        if positions[0] >= BATCH:
            self.plans_second.set()
            assert self.may_plan.wait(20)
        return positions

    def sizes(self, places: Numbers) -> Numbers:
        return np.full(len(places), 1000)

    def boundaries(self, epoch: int, positions: Numbers) -> Numbers:
        return positions // 16

    def load(self, places: Numbers, allocate: Allocate | None, pool: Executor | None) -> LoadedRows:
        self.loaded.append(places.tolist())
        self.loads_first.set()
        assert self.may_load.wait(20)
        if self.is_broken:
            raise OSError("not to be had")
        return LoadedRows(rows=of_stored(Places.of([]), []), asked=np.arange(0))


def shares_of(source: Remote, *, rows: int = ROWS) -> Iterator[tuple[Share, LoadedRows]]:
    stream = Stream(source=source, epoch=0, allocate=None, prefetch_bytes=1 << 20, threads=1)
    reader = Reader(rank=0, world_size=1, worker=0, num_workers=1)
    return stream.load(in_batches(rows, 0, reader, size=BATCH, ends="exact"))


def test_nothing_else_is_planned_or_fetched_before_the_first_share_is_there() -> None:
    source = Remote()
    source.may_load.clear()
    found: list[Share] = []
    consumer = threading.Thread(target=lambda: found.extend(s for s, _ in shares_of(source)))
    consumer.start()

    assert source.loads_first.wait(20)
    consumer.join(0.2)
    alone, is_planning = list(source.loaded), source.plans_second.is_set()
    source.may_load.set()
    consumer.join(20)

    assert alone == [list(range(BATCH))]
    assert not is_planning
    assert [n for share in found for n in share.positions.tolist()] == list(range(ROWS))
    assert sorted(n for rows in source.loaded for n in rows) == list(range(ROWS))


def test_the_first_share_waits_for_no_plan_of_the_next() -> None:
    source = Remote()
    source.may_plan.clear()

    shares = shares_of(source)
    first, _ = next(shares)
    source.may_plan.set()

    assert first.positions.tolist() == list(range(BATCH))
    assert len(list(shares)) == ROWS // BATCH - 1


@pytest.mark.parametrize("rows", [0, 1, BATCH])
def test_an_epoch_of_no_share_or_one_ends(rows: int) -> None:
    found: list[Share] = []
    shares = shares_of(Remote(), rows=rows)
    consumer = threading.Thread(target=lambda: found.extend(s for s, _ in shares), daemon=True)
    consumer.start()
    consumer.join(20)

    assert not consumer.is_alive()
    assert [n for share in found for n in share.positions.tolist()] == list(range(rows))


def test_who_leaves_early_is_not_kept() -> None:
    shares = shares_of(Remote())
    next(shares)

    shares.close()

    assert not [t for t in threading.enumerate() if t.name.startswith(("plan", "carve-fetch"))]


def test_a_first_share_that_cannot_be_loaded_is_an_error() -> None:
    with pytest.raises(OSError, match="not to be had"):
        list(shares_of(Remote(is_broken=True)))
