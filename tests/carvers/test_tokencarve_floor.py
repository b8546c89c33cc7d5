"""TokenCarve with an even share of the budget that no ranking can take away."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from pipeline import carvers
from pipeline.carvers import _ops
from pipeline.errors import ConfigError
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens

NEEDS = ["attention_output", "cls_attention"]


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("tokencarve_floor", options).carve(tokens)


def attacked(grid: tuple[int, int], seed: int = 0) -> VisualTokens:
    """Return an image whose upper left corner has all attention and all information."""
    tokens = make_tokens(NEEDS, batch=1, grid=grid, seed=seed)
    rows, columns = grid
    corner = torch.zeros(grid)
    corner[: rows // 3, : columns // 3] = 1
    corner = corner.flatten()[None]
    return dataclasses.replace(
        tokens,
        signals={
            "cls_attention": tokens.signals["cls_attention"] * corner,
            "attention_output": tokens.signals["attention_output"] * corner[:, :, None],
        },
    )


def largest_empty_square(grid: tuple[int, int], positions: list[int]) -> int:
    rows, columns = grid
    taken = {divmod(position, columns) for position in positions}
    side = 0
    for top, left in itertools.product(range(rows), range(columns)):
        while (
            top + side < rows
            and left + side < columns
            and not any(
                (r, c) in taken
                for r in range(top, top + side + 1)
                for c in range(left, left + side + 1)
            )
        ):
            side += 1
    return side


@pytest.mark.parametrize(
    ("grid", "keep", "side"), [((24, 24), 64, 7), ((24, 24), 128, 5), ((12, 18), 32, 7)]
)
def test_an_attack_that_puts_all_mass_into_one_corner_leaves_tokens_in_every_region(
    grid, keep, side
):
    tokens = attacked(grid)

    result = carve(tokens, keep_tokens=keep)[0]
    without = carvers.build("tokencarve", {"keep_tokens": keep}).carve(tokens)[0]

    assert largest_empty_square(grid, result.positions.tolist()) <= side
    assert side < 2 * math.sqrt(grid[0] * grid[1] / (keep / 4))
    assert largest_empty_square(grid, without.positions.tolist()) > 1.4 * side


@pytest.mark.parametrize("grid", [(24, 24), (14, 14), (9, 25), (1, 30)])
def test_no_empty_square_is_larger_than_stated_whatever_the_floor(grid):
    order = _ops.coarse_to_fine(*grid)

    for count in range(1, len(order), max(1, len(order) // 24)):
        side = largest_empty_square(grid, list(order[:count]))
        assert side < 2 * math.sqrt(len(order) / count)


def test_without_a_floor_it_is_tokencarve():
    tokens = make_tokens(NEEDS, grid=(6, 8))

    for keep in (1, 7, 20, 48):
        floored = carve(tokens, keep_tokens=keep, floor_ratio=0.0)
        plain = carvers.build("tokencarve", {"keep_tokens": keep}).carve(tokens)
        for left, right in zip(floored, plain, strict=True):
            for field in dataclasses.fields(CarvedTokens):
                assert torch.equal(getattr(left, field.name), getattr(right, field.name))


def test_a_floor_of_all_is_the_uniform_grid():
    tokens = make_tokens(NEEDS, grid=(6, 8))

    floored = carve(tokens, keep_tokens=20, floor_ratio=1.0)[0]
    uniform = carvers.build("uniform_grid", {"keep_tokens": 20}).carve(tokens)[0]

    assert torch.equal(floored.positions, uniform.positions)
    assert torch.equal(floored.ranks, uniform.ranks)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("views", [1, 3])
def test_every_prefix_holds_its_share_of_the_floor_coarse_to_fine(ratio, views):
    tokens = make_tokens(NEEDS, batch=2, grid=(6, 8), num_views=views)
    order = _ops.spread_order(tokens.grid, tokens.features, views)[0].tolist()

    for result in carve(tokens, keep_tokens=24, floor_ratio=ratio):
        by_rank = result.positions[result.ranks.argsort()].tolist()
        for count in range(1, 25):
            share = math.floor(count * ratio + 0.5)
            assert set(order[:share]) <= set(by_rank[:count])


def test_floor_tokens_are_unchanged_and_the_rest_is_tokencarve_of_the_others():
    tokens = make_tokens(["cls_attention"], batch=2, grid=(5, 6))
    options = {"attention_weight": 1.0}
    floor = _ops.coarse_to_fine(5, 6)[:4]
    others = [p for p in range(30) if p not in floor]
    # By attention alone the ranking of the others does not depend on who is left out.
    left = VisualTokens(
        features=tokens.features[:, others],
        grid=(1, 26),
        signals={"cls_attention": tokens.signals["cls_attention"][:, others]},
    )

    results = carve(tokens, keep_tokens=16, floor_ratio=0.25, **options)
    expected = carvers.build("tokencarve", {"keep_tokens": 12, **options}).carve(left)

    for image, (result, part) in enumerate(zip(results, expected, strict=True)):
        is_floor = torch.isin(result.positions, torch.tensor(floor))
        assert is_floor.sum() == 4
        assert torch.equal(
            result.features[is_floor], tokens.features[image, result.positions[is_floor]]
        )
        assert result.sizes[is_floor].eq(1).all()
        assert torch.equal(result.positions[~is_floor], torch.tensor(others)[part.positions])
        assert_close(result.features[~is_floor], part.features)
        assert torch.equal(result.sizes[~is_floor], part.sizes)
        assert torch.equal(result.ranks[~is_floor].argsort(), part.ranks.argsort())


@pytest.mark.parametrize("keep", range(1, 31))
def test_the_budget_is_met_exactly(keep):
    for result in carve(make_tokens(NEEDS, batch=2, grid=(5, 6)), keep_tokens=keep):
        assert len(result.positions) == keep


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_floor_that_is_no_share_is_rejected(value):
    with pytest.raises(ConfigError, match="floor_ratio"):
        carvers.build("tokencarve_floor", {"floor_ratio": value})
