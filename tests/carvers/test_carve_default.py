"""What stands out is kept, once per object, and the rest becomes means that count for all of it."""

import pytest
import torch
from torch import Tensor

from pipeline.carvers.carve_default import CarveDefault
from pipeline.types import TileLayout, VisualTokens

ROWS, COLUMNS, WIDTH = 6, 8, 16


def scene(*objects: tuple[tuple[int, ...], int], seed: int = 0) -> VisualTokens:
    """Return one image: a nearly even background, and objects at cells, each of one direction."""
    generator = torch.Generator().manual_seed(seed)
    features_ND = 0.01 * torch.randn(ROWS * COLUMNS, WIDTH, generator=generator)
    features_ND[:, 0] += 1
    for cells, direction in objects:
        for cell in cells:
            features_ND[cell] *= 0.1
            features_ND[cell, direction] += 3
    return VisualTokens(features=features_ND[None], grid=(ROWS, COLUMNS))


def picks(tokens: VisualTokens, num_kept: int, **options: float) -> list[int]:
    """Return positions of the picks, without the means, in the order of picking."""
    options = {"means_share": 0.0, "least_weight": 0.0, **options}
    (kept,) = CarveDefault(keep_tokens=num_kept, **options).carve(tokens)
    by_rank = sorted(zip(kept.ranks.tolist(), kept.positions.tolist(), strict=True))
    return [position for rank, position in by_rank if rank > 0]


def test_equal_objects_far_apart_are_kept_one_by_one() -> None:
    tokens = scene(((0,), 1), ((7,), 1), ((40,), 1), ((47,), 2))

    assert set(picks(tokens, 5)) == {0, 7, 40, 47}


def test_an_object_of_two_cells_waits_with_its_second_for_the_other_objects() -> None:
    tokens = scene(((0, 1), 1), ((20,), 2), ((47,), 3))

    first, second, third, fourth = picks(tokens, 5)

    assert {first, second, third} in ({0, 20, 47}, {1, 20, 47})
    assert {first, second, third, fourth} == {0, 1, 20, 47}


def test_a_larger_radius_spreads_the_picks() -> None:
    tokens = scene(((0, 2, 4), 1), ((20,), 2))

    assert 20 in picks(tokens, 3, radius=3.0)[:2]
    near = picks(tokens, 5, radius=0.2)
    assert set(near) == {0, 2, 4, 20}


def test_the_rest_is_its_mean_and_counts_for_all_of_it() -> None:
    tokens = scene(((9,), 1), ((30,), 2))

    (kept,) = CarveDefault(keep_tokens=3).carve(tokens)

    rest = [cell for cell in range(ROWS * COLUMNS) if cell not in (9, 30)]
    place = kept.ranks.tolist().index(0)
    torch.testing.assert_close(kept.features[place], tokens.features[0, rest].mean(dim=0))
    assert kept.positions[place] == rest[(len(rest) - 1) // 2]
    assert sorted(kept.sizes.tolist()) == [1, 1, len(rest)]
    for cell in (9, 30):
        assert torch.equal(kept.features[kept.positions == cell][0], tokens.features[0, cell])


def test_what_is_like_a_pick_and_near_is_averaged_into_it() -> None:
    tokens = scene(((9, 10, 17), 1), ((30, 31), 2), ((46,), 2))

    (kept,) = CarveDefault(keep_tokens=4, reach=1.5).carve(tokens)

    features_ND = tokens.features[0]
    for members in ([9, 10, 17], [30, 31], [46]):
        (place,) = (i for i, position in enumerate(kept.positions) if position in members)
        torch.testing.assert_close(kept.features[place], features_ND[members].mean(dim=0))
        assert kept.sizes[place] == len(members)
    assert kept.sizes.sum() == ROWS * COLUMNS


def test_what_is_beyond_reach_is_not_merged() -> None:
    tokens = scene(((0, 1, 2, 3, 4), 1), ((47,), 2))

    (kept,) = CarveDefault(keep_tokens=3, reach=1.0).carve(tokens)

    assert sorted(kept.sizes.tolist())[0] == 1
    assert sorted(kept.sizes.tolist())[1] in (2, 3)  # the pick and its neighbours, not all five


def test_picks_that_weigh_little_make_room_for_means_of_even_runs() -> None:
    tokens = scene(((9,), 1), ((30,), 2))

    (kept,) = CarveDefault(keep_tokens=4).carve(tokens)

    by_rank = sorted(zip(kept.ranks, kept.positions, kept.sizes, strict=True))
    assert [int(size) for _, _, size in by_rank] == [23, 23, 1, 1]
    assert {int(position) for _, position, _ in by_rank[2:]} == {9, 30}
    assert by_rank[0][1] < by_rank[1][1]


@pytest.mark.parametrize("num_kept", [2, 3, 7, 12])
def test_half_of_the_budget_are_picks_whatever_they_weigh(num_kept: int) -> None:
    tokens = scene(((9,), 1))

    (kept,) = CarveDefault(keep_tokens=num_kept).carve(tokens)

    assert int((kept.sizes <= 2).sum()) == -(-num_kept // 2)
    assert kept.sizes.sum() == ROWS * COLUMNS


def test_a_share_of_the_budget_is_for_means() -> None:
    generator = torch.Generator().manual_seed(0)
    features_BND = torch.randn(3, ROWS * COLUMNS, WIDTH, generator=generator)
    tokens = VisualTokens(features=features_BND, grid=(ROWS, COLUMNS))

    for kept in CarveDefault(keep_tokens=16, means_share=0.25, least_weight=0.0).carve(tokens):
        means = kept.ranks < 4
        assert bool((kept.sizes[means] > 1).any())
        assert set(kept.ranks[means].tolist()) == {0, 1, 2, 3}
        assert kept.sizes.sum() == ROWS * COLUMNS


def test_one_token_is_the_mean_of_all() -> None:
    tokens = scene(((9,), 1))

    (kept,) = CarveDefault(keep_tokens=1).carve(tokens)

    torch.testing.assert_close(kept.features[0], tokens.features[0].mean(dim=0))


def test_views_do_not_hide_one_another() -> None:
    one = scene(((9,), 1), ((30,), 2)).features
    tiles = TileLayout(rows=1, columns=1, unpadded=(0, ROWS, 0, COLUMNS))
    tokens = VisualTokens(
        features=torch.cat([one, one], dim=1), grid=(ROWS, COLUMNS), num_views=2, tiles=tiles
    )

    num_cells = ROWS * COLUMNS
    assert set(picks(tokens, 5)) == {9, 30, 9 + num_cells, 30 + num_cells}


def test_scale_of_a_token_does_not_count_only_its_direction() -> None:
    tokens = scene(((9,), 1), ((30,), 2))
    scales: Tensor = torch.rand(1, ROWS * COLUMNS, 1, generator=torch.Generator().manual_seed(1))
    scaled = VisualTokens(features=tokens.features * (0.5 + scales), grid=tokens.grid)

    assert picks(scaled, 6) == picks(tokens, 6)
