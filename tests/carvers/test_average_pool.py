import pytest
import torch
from torch.testing import assert_close

from pipeline import carvers
from pipeline.carvers.average_pool import pooled_grid
from pipeline.types import VisualTokens
from tests.carvers.inputs import make_tokens


def numbered(rows: int, columns: int) -> VisualTokens:
    """Tokens whose single feature is their position."""
    values = torch.arange(float(rows * columns))
    return VisualTokens(features=values[None, :, None], grid=(rows, columns))


def test_four_cells_of_a_4_by_4_grid_are_averaged():
    result = carvers.build("average_pool", {"keep_tokens": 4}).carve(numbered(4, 4))[0]

    #  0  1 |  2  3      each cell's mean is that of its corners,
    #  4  5 |  6  7      its place the upper left of its middle
    assert result.features.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert result.positions.tolist() == [0, 2, 8, 10]
    assert result.sizes.tolist() == [4.0] * 4


def test_a_line_that_does_not_divide_gives_cells_that_do_not_overlap():
    result = carvers.build("average_pool", {"keep_tokens": 3}).carve(numbered(1, 7))[0]

    # 7 cells in 3: {0, 1, 2} {3, 4} {5, 6}
    assert result.features.flatten().tolist() == [1.0, 3.5, 5.5]
    assert result.positions.tolist() == [1, 3, 5]
    assert result.sizes.tolist() == [3.0, 2.0, 2.0]


@pytest.mark.parametrize("keep_tokens", [1, 2, 5, 17, 30, 63])
@pytest.mark.parametrize("grid", [(7, 9), (1, 63), (63, 1), (21, 3)])
def test_every_token_counts_exactly_once(grid, keep_tokens):
    tokens = make_tokens([], batch=2, grid=grid, width=4)

    results = carvers.build("average_pool", {"keep_tokens": keep_tokens}).carve(tokens)

    for image, result in enumerate(results):
        assert len(result.positions) <= keep_tokens
        assert result.sizes.sum() == 63
        total = (result.features * result.sizes[:, None]).sum(dim=0)
        assert_close(total, tokens.features[image].sum(dim=0), rtol=1e-4, atol=1e-4)


def test_it_equals_torch_where_the_grid_divides():
    tokens = make_tokens([], batch=2, grid=(6, 8), width=5)
    images = tokens.features.mT.reshape(2, 5, 6, 8)

    results = carvers.build("average_pool", {"keep_tokens": 12}).carve(tokens)

    expected = torch.nn.functional.avg_pool2d(images, 2).flatten(2).mT
    assert_close(torch.stack([r.features for r in results]), expected)


@pytest.mark.parametrize(
    ("grid", "max_cells", "expected"),
    [
        ((24, 24), 128, (11, 11)),
        ((24, 24), 144, (12, 12)),
        ((12, 48), 64, (4, 16)),
        ((24, 24), 1, (1, 1)),
        ((1, 100), 30, (1, 30)),
        ((2, 3), 99, (2, 3)),
    ],
)
def test_the_pooled_grid_has_the_squarest_cells_the_budget_allows(grid, max_cells, expected):
    assert pooled_grid(*grid, max_cells) == expected


def test_halves_are_summed_in_float32():
    features = torch.full((1, 64, 2), 60000.0, dtype=torch.float16)
    tokens = VisualTokens(features=features, grid=(8, 8))

    result = carvers.build("average_pool", {"keep_tokens": 1}).carve(tokens)[0]

    assert torch.equal(result.features, features[0, :1])
