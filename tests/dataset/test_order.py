"""The order of an epoch: a permutation that anybody can compute, of any place in it alone."""

import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.order import EpochOrder


@st.composite
def orders(draw, *, shuffle: bool | None = None) -> EpochOrder:
    lane_rows = draw(st.integers(1, 5))
    return EpochOrder(
        sizes=np.array(draw(st.lists(st.integers(0, 9), max_size=40)), np.int64),
        seed=draw(st.integers(0, 2**63)),
        epoch=draw(st.integers(0, 1000)),
        shuffle=draw(st.booleans()) if shuffle is None else shuffle,
        window=lane_rows * draw(st.integers(1, 8)),
        lanes=draw(st.integers(1, 7)),
        lane_rows=lane_rows,
    )


def pairs(order: EpochOrder, positions: np.ndarray) -> list[tuple[int, int]]:
    groups, rows = order.rows(positions)
    return list(zip(groups.tolist(), rows.tolist(), strict=True))


def whole(order: EpochOrder) -> list[tuple[int, int]]:
    return pairs(order, np.arange(len(order)))


def stored(order: EpochOrder) -> list[tuple[int, int]]:
    return [(group, row) for group, size in enumerate(order.sizes) for row in range(size)]


def by_lane(order: EpochOrder) -> list[list[int]]:
    """Return the positions that each lane gives, by taking turns as the class says."""
    starts = [lane * len(order) // order.lanes for lane in range(order.lanes + 1)]
    left = [stop - start for start, stop in itertools.pairwise(starts)]
    found: list[list[int]] = [[] for _ in left]
    position = itertools.count()
    for _ in range(min(left) // order.lane_rows):
        for mine in found:
            mine += itertools.islice(position, order.lane_rows)
    for mine, length in zip(found, left, strict=True):
        mine += itertools.islice(position, length - len(mine))
    return found


def of_shape(*, sizes: list[int], **options: int) -> EpochOrder:
    return EpochOrder(
        **{
            "sizes": np.array(sizes, np.int64),
            "seed": 0,
            "epoch": 0,
            "shuffle": True,
            "window": 16,
            **options,
        }
    )


@settings(max_examples=300, deadline=None)
@given(order=orders())
def test_every_row_has_one_position(order: EpochOrder) -> None:
    assert sorted(whole(order)) == stored(order)


@settings(deadline=None)
@given(order=orders(shuffle=False))
def test_without_shuffle_it_is_the_order_of_storage(order: EpochOrder) -> None:
    assert whole(replace(order, lanes=1)) == stored(order)


@settings(max_examples=200, deadline=None)
@given(order=orders(), data=st.data())
def test_a_position_holds_the_same_row_however_it_is_asked_for(order, data) -> None:
    expected = whole(order)
    positions = np.array(
        data.draw(st.lists(st.integers(0, max(0, len(order) - 1)), max_size=30 * bool(len(order)))),
        np.int64,
    )

    one_by_one = [pair for n in range(len(order)) for pair in pairs(order, np.array([n]))]
    backwards = pairs(replace(order), np.arange(len(order))[::-1].copy())

    assert one_by_one == expected
    assert backwards == expected[::-1]
    assert pairs(replace(order), positions) == [expected[n] for n in positions.tolist()]


@settings(max_examples=200, deadline=None)
@given(order=orders(shuffle=True))
def test_the_rows_of_a_window_come_from_one_run_of_their_lane(order: EpochOrder) -> None:
    permuted_groups = whole(replace(order, window=1, lanes=1, lane_rows=1))
    place = {pair: number for number, pair in enumerate(permuted_groups)}

    rows = whole(order)
    windows = [
        sorted(place[rows[p]] for p in lane[start : start + order.window])
        for lane in by_lane(order)
        for start in range(0, len(lane), order.window)
    ]

    assert [number for window in windows for number in window] == list(range(len(order)))


@pytest.mark.parametrize("lanes", [3, 45, 49, 64, 1000])
def test_lanes_begin_at_whole_parts_of_any_length(lanes: int) -> None:
    lengths = range(1, 3000, 4)

    found = [of_shape(sizes=[length], lanes=lanes)._lane_starts.tolist() for length in lengths]

    assert found == [[lane * n // lanes for lane in range(lanes + 1)] for n in lengths]


def test_rows_that_lie_together_have_one_number() -> None:
    shuffled = of_shape(sizes=[10] * 10, window=8, lanes=2, lane_rows=4)
    in_storage = replace(shuffled, shuffle=False)
    positions = np.arange(100)

    assert shuffled.boundaries(positions).tolist() == [p // 16 for p in range(100)]
    assert in_storage.boundaries(positions).tolist() == [p // 10 for p in range(100)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    found = {
        tuple(whole(of_shape(sizes=[7] * 30, seed=seed, epoch=epoch)))
        for seed in (0, 1, 2**40)
        for epoch in (0, 1, 2)
    }

    assert len(found) == 9


def test_windows_of_one_order_are_permuted_each_in_its_own_way() -> None:
    order = of_shape(sizes=[16 * 20], window=16)

    permutations = {
        tuple(row % 16 for _, row in whole(order)[start : start + 16])
        for start in range(0, 320, 16)
    }

    assert len(permutations) == 20


def test_shuffled_rows_are_spread_over_the_epoch() -> None:
    order = of_shape(sizes=[10] * 1000, window=1000)

    groups, _ = order.rows(np.arange(len(order)))

    halves = np.split(groups, 2)
    assert abs(float(halves[0].mean()) - float(halves[1].mean())) < 100


def test_the_order_is_the_one_that_it_was_when_states_were_saved() -> None:
    order = of_shape(sizes=[3, 0, 4, 2], seed=5, epoch=2, window=4, lanes=2, lane_rows=2)

    expected = [(0, 0), (0, 1), (2, 1), (2, 0), (3, 0), (0, 2), (3, 1), (2, 2), (2, 3)]
    assert whole(order) == expected


def test_a_million_row_groups_take_little_memory_and_any_place_is_reached_at_once() -> None:
    sizes = np.full(10**6, 128, np.int64)
    tracemalloc.start()
    order = EpochOrder(sizes=sizes, seed=0, epoch=0, shuffle=True, window=1024, lanes=8)

    groups, rows = order.rows(np.arange(64_000_000, 64_001_000))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(set(zip(groups.tolist(), rows.tolist(), strict=True))) == 1000
    assert kept < 24 * 10**6 + 8 * 2 * 1024 * 8 + 100_000
