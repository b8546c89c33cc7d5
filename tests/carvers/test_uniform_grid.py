import pytest
import torch

from pipeline import carvers
from pipeline.carvers._ops import coarse_to_fine
from tests.carvers.inputs import make_tokens


def kept(grid: tuple[int, int], keep_tokens: int) -> tuple[list[int], list[int]]:
    tokens = make_tokens([], batch=1, grid=grid)
    result = carvers.build("uniform_grid", {"keep_tokens": keep_tokens}).carve(tokens)[0]
    return result.positions.tolist(), result.ranks.tolist()


def test_the_centre_of_a_line_comes_first_and_then_both_sides():
    # Squared distances to the nearest kept of 7 cells: 3 leaves 9 4 1 0 1 4 9, the least sum.
    # Then 0 turns 9 4 1 into 0 1 1, and 1 into 1 0 1: both save 12, as do 5 and 6 on the other
    # side, so the lowest wins, 0; and of 5 and 6 the lower, 5.
    assert kept((1, 7), 3) == ([0, 3, 5], [1, 0, 2])


def test_one_token_is_the_centre_of_the_grid():
    assert kept((3, 5), 1) == ([7], [0])


def test_a_column_is_ordered_like_a_row():
    assert kept((7, 1), 3) == kept((1, 7), 3)


@pytest.mark.parametrize(("keep_tokens", "most"), [(16, 5.4), (64, 2.3), (144, 1.5), (192, 1.1)])
def test_no_cell_is_far_from_a_kept_one(keep_tokens, most):
    positions = torch.tensor(kept((24, 24), keep_tokens)[0])
    cells = torch.cartesian_prod(torch.arange(24.0), torch.arange(24.0))

    distances = torch.cdist(cells, cells[positions]).amin(dim=1)

    assert len(positions) == keep_tokens
    assert distances.max() < most


def test_every_image_of_a_batch_keeps_the_same_positions():
    tokens = make_tokens([], batch=3, grid=(4, 6))

    results = carvers.build("uniform_grid", {"keep_ratio": 0.25}).carve(tokens)

    assert len({tuple(r.positions.tolist()) for r in results}) == 1
    assert torch.equal(results[2].features, tokens.features[2, results[2].positions])


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (2, 3), (5, 5), (3, 8)])
def test_the_lazy_order_equals_the_order_of_trying_every_cell(grid):
    rows, columns = grid
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)
    squares = (cells[:, None] - cells).square().sum(dim=2)
    nearest = torch.full((rows * columns,), rows**2 + columns**2)
    order: list[int] = []
    for _ in range(rows * columns):
        losses = torch.minimum(nearest, squares).sum(dim=1)
        losses[order] = losses.max() + 1
        order.append(int(losses.min(dim=0).indices))
        nearest = torch.minimum(nearest, squares[order[-1]])

    assert list(coarse_to_fine(rows, columns)) == order
