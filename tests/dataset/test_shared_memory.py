"""Memory that workers share with their main process is used again, whatever is asked for."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from pipeline import CarvedDataset
from pipeline.dataset.shared_memory import SharedBytes, SharedSlots, forget_gone
from tests.dataset.caches import make_cache

MIB = 1 << 20


def mapped_bytes() -> int:
    """Return how much memory of torch's own files this process maps."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/torch_" in line:
            first, last = line.split(maxsplit=1)[0].split("-")
            total += int(last, 16) - int(first, 16)
    return total


class Growing(IterableDataset):
    """Gives pieces of slots, each larger than the one before, and what its worker maps by then."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __iter__(self) -> Iterator[tuple[SharedBytes, int]]:
        slots = SharedSlots()
        for number, size in enumerate(self.sizes):
            values = slots.take(size)
            values[:] = number
            piece = SharedBytes(values)
            del values
            yield piece, mapped_bytes()
            del piece


@pytest.fixture
def sizes() -> list[int]:
    return [MIB + number * MIB // 3 for number in range(40)]


def test_pieces_that_grow_take_no_more_memory_than_the_largest_in_use_at_once(
    sizes: list[int],
) -> None:
    loader = DataLoader(Growing(sizes), batch_size=None, num_workers=1, prefetch_factor=1)
    most_here = most_there = count = 0
    before = mapped_bytes()

    for values, there in loader:
        assert len(values) == sizes[count]
        assert (np.asarray(values) == count).all()
        most_here = max(most_here, mapped_bytes() - before)
        most_there = max(most_there, there - before)
        count += 1
        del values

    assert count == len(sizes)
    # At most four at once: one is used here, one waits, one is on its way, one is filled.
    limit = 4 * sizes[-1] * 9 // 8
    assert limit < sum(sizes) / 4
    assert 0 < most_here <= limit
    assert 0 < most_there <= limit


def test_of_a_slot_that_another_took_the_place_of_nothing_is_lost() -> None:
    slots = SharedSlots()
    first = slots.take(MIB)
    first[:] = 1
    kept = torch.from_numpy(first)[10:20]
    del first

    second = slots.take(2 * MIB)  # the first one is in use
    second[:] = 2
    del second
    third = slots.take(3 * MIB)  # in place of the second
    third[:] = 3

    assert kept.tolist() == [1] * 10
    assert int(third.min()) == 3


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_memory_of_workers_that_are_gone_is_given_up_when_others_start(
    sizes: list[int], start: str, tmp_path: Path
) -> None:
    forget_gone()  # of the tests before
    before = mapped_bytes()
    loader = DataLoader(Growing(sizes[:4]), batch_size=None, num_workers=1)
    assert len(list(loader)) == 4
    del loader
    assert mapped_bytes() > before  # nobody can tell yet that there will be no more

    rows = CarvedDataset(make_cache(str(tmp_path), 4), batch_size=2)
    workers = DataLoader(rows, batch_size=None, num_workers=1, multiprocessing_context=start)
    seen = [mapped_bytes() for _ in workers]

    assert seen and seen[0] - before < sizes[0]
