"""How much of a run's input may be lost."""

import itertools

import pytest

from pipeline.error_budget import MIN_SHARDS, ErrorBudget

# (bytes, share lost) of ten shards: 260 of 1000 bytes are lost
SHARDS = [(100, 1.0), (100, 1.0), (100, 0.5), (100, 0.1), *[(100, 0.0)] * 6]


def settled(order: list[tuple[int, float]], max_ratio: float) -> list[bool]:
    """Return after each shard whether the budget is spent."""
    budget = ErrorBudget(max_ratio=max_ratio, total_bytes=sum(size for size, _ in order))
    spent = []
    for size, lost in order:
        budget.settle(size, lost_ratio=lost)
        spent.append(budget.is_spent)
    return spent


@pytest.mark.parametrize(("max_ratio", "spent"), [(0.25, True), (0.26, False), (0.3, False)])
def test_whether_it_is_spent_does_not_depend_on_the_order(max_ratio: float, spent: bool) -> None:
    orders = [
        SHARDS,
        SHARDS[::-1],
        *itertools.islice(itertools.permutations(SHARDS), 0, 10**5, 997),
    ]

    assert {settled(list(order), max_ratio)[-1] for order in orders} == {spent}


def test_once_spent_it_stays_so() -> None:
    spent = settled([*SHARDS[::-1], *SHARDS], 0.2)

    assert spent == sorted(spent)
    assert spent[-1]


def test_few_shards_say_too_little() -> None:
    lost = [(10, 1.0)] * (MIN_SHARDS + 1)

    spent = settled(lost, 0.25)

    assert spent == [False] * (MIN_SHARDS - 1) + [True, True]


def test_a_large_shard_weighs_more() -> None:
    small_lost = [(1, 1.0)] * 9 + [(1000, 0.0)]
    large_lost = [(1, 0.0)] * 9 + [(1000, 1.0)]

    assert not settled(small_lost, 0.25)[-1]
    assert settled(large_lost, 0.25)[-1]


def test_a_ratio_of_one_allows_everything_and_empty_shards_cost_nothing() -> None:
    assert not any(settled([(7, 1.0)] * 20, 1.0))
    assert not any(settled([(0, 1.0)] * 20, 0.0))
