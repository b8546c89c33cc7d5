import math

import pytest
import torch

from pipeline import carvers
from pipeline.types import CarvedTokens
from tests.carvers.inputs import make_tokens

GRIDS = [((4, 6), 1), ((5, 7), 1), ((3, 4), 3), ((2, 2), 5), ((1, 11), 1)]


def carve(grid: tuple[int, int], num_views: int = 1, **options: object) -> CarvedTokens:
    tokens = make_tokens([], grid=grid, num_views=num_views, batch=2)
    first, second = carvers.build("adsc_stride", options).carve(tokens)
    assert torch.equal(first.positions, second.positions)
    assert torch.equal(second.features, tokens.features[1, second.positions])
    return first


@pytest.mark.parametrize(
    ("keep_tokens", "stride", "kept"), [(128, 5, 116), (64, 9, 64), (287, 3, 192), (1, 576, 1)]
)
def test_the_raster_keeps_every_sth_token_and_at_most_the_budget(keep_tokens, stride, kept):
    result = carve((24, 24), keep_tokens=keep_tokens)

    assert result.positions.tolist() == list(range(0, 576, stride))
    assert len(result.positions) == kept
    assert result.sizes.eq(1).all()


@pytest.mark.parametrize(("grid", "num_views"), GRIDS)
def test_the_stride_is_the_smallest_that_keeps_to_any_budget(grid, num_views):
    num_tokens = math.prod(grid) * num_views
    for keep in range(1, num_tokens + 2):
        stride = next(s for s in range(1, 99) if len(range(0, num_tokens, s)) <= keep)

        result = carve(grid, num_views, keep_tokens=keep)

        assert result.positions.tolist() == list(range(0, num_tokens, stride))


def test_rows_and_columns_are_taken_at_one_step():
    result = carve((4, 6), keep_tokens=7, pattern="rows_and_columns")

    assert result.positions.tolist() == [0, 2, 4, 12, 14, 16]


def test_576_tokens_at_128_become_every_third_row_and_column():
    result = carve((24, 24), keep_tokens=128, pattern="rows_and_columns")

    expected = [24 * r + c for r in range(0, 24, 3) for c in range(0, 24, 3)]
    assert result.positions.tolist() == expected


@pytest.mark.parametrize(("grid", "num_views"), GRIDS)
def test_the_square_step_is_the_smallest_that_keeps_to_any_budget(grid, num_views):
    rows, columns = grid
    for keep in range(1, rows * columns * num_views + 2):
        view_step = next(s for s in range(1, 99) if len(range(0, num_views, s)) <= keep)
        patterns = (
            [
                (view * rows + r) * columns + c
                for view in range(0, num_views, view_step)
                for r in range(0, rows, step)
                for c in range(0, columns, step)
            ]
            for step in range(1, 99)
        )
        expected = next(p for p in patterns if len(p) <= keep)

        result = carve(grid, num_views, keep_tokens=keep, pattern="rows_and_columns")

        assert result.positions.tolist() == expected


def test_the_best_ranked_tokens_are_spread_over_what_is_kept():
    result = carve((1, 50), keep_tokens=10)

    # Kept are 0, 5, ... 45; the middle comes first, then its two sides.
    assert result.positions[result.ranks.argsort()].tolist()[:3] == [20, 35, 5]
