import dataclasses
import math

import pytest
import torch

from pipeline import carvers
from pipeline.types import CarvedTokens, TileLayout, VisualTokens
from tests.carvers.inputs import make_tokens


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("todre", options).carve(tokens)


def picks(result: CarvedTokens) -> list[int]:
    """Positions in the order of picking."""
    return result.positions[result.ranks.argsort()].tolist()


def at_angles(degrees: list[float], attention: list[float]) -> VisualTokens:
    radians = torch.tensor(degrees).deg2rad()
    return VisualTokens(
        features=torch.stack([radians.cos(), radians.sin()], dim=1)[None],
        grid=(1, len(degrees)),
        signals={"cls_attention": torch.tensor([attention])},
    )


def literal_max_sum(features: torch.Tensor, pivot: int, num_kept: int) -> list[int]:
    """Version 2 of the rule, token by token in float64."""
    rows = [row / row.norm() for row in features.double()]
    sums = [float(row @ rows[pivot]) for row in rows]
    sums[pivot] = math.inf
    kept = [pivot]
    while len(kept) < num_kept:
        chosen = sums.index(min(sums))
        kept.append(chosen)
        sums = [s + float(row @ rows[chosen]) for s, row in zip(sums, rows, strict=True)]
        sums[chosen] = math.inf
    return kept


def literal_k_center(features: torch.Tensor, pivot: int, num_kept: int) -> list[int]:
    """Version 1 of the rule, token by token in float64."""
    rows = [row / row.norm() for row in features.double()]
    kept = [pivot]
    while len(kept) < num_kept:
        nearest = [
            -1.0 if i in kept else min(1 - float(row @ rows[j]) for j in kept)
            for i, row in enumerate(rows)
        ]
        kept.append(nearest.index(max(nearest)))
    return kept


LITERAL = {"max_sum": literal_max_sum, "k_center": literal_k_center}


@pytest.mark.parametrize(("grid", "width", "keep"), [((3, 7), 6, 9), ((6, 2), 40, 12)])
@pytest.mark.parametrize("rule", ["max_sum", "k_center"])
def test_it_equals_the_rule_written_out(rule, grid, width, keep):
    tokens = make_tokens(["cls_attention"], grid=grid, width=width, seed=2)

    for image, result in enumerate(carve(tokens, rule=rule, keep_tokens=keep)):
        pivot = int(tokens.signals["cls_attention"][image].argmax())
        assert picks(result) == LITERAL[rule](tokens.features[image], pivot, keep)


def test_the_two_versions_keep_different_tokens():
    # The sum over both picks is least for the neighbour of the second, nearest to which it is.
    tokens = at_angles([0, 150, 140, 90], [1.0, 0, 0, 0])

    assert picks(carve(tokens, keep_tokens=3)[0]) == [0, 1, 2]
    assert picks(carve(tokens, keep_tokens=3, rule="k_center")[0]) == [0, 1, 3]


def test_the_pivot_is_the_first_of_the_most_attended_tokens():
    tokens = at_angles([0, 10, 20, 30], [0.1, 0.4, 0.4, 0.1])

    assert picks(carve(tokens, keep_tokens=1)[0]) == [1]


def test_received_attention_can_choose_the_pivot():
    tokens = make_tokens(["cls_attention", "received_attention"])

    results = carve(tokens, attention="received_attention", keep_tokens=1)

    expected = tokens.signals["received_attention"].argmax(dim=1).tolist()
    assert [picks(result)[0] for result in results] == expected
    assert expected != tokens.signals["cls_attention"].argmax(dim=1).tolist()


@pytest.mark.parametrize(
    ("grid", "views", "expected"),
    [((3, 5), 1, 7), ((4, 4), 1, 5), ((1, 1), 1, 0), ((3, 5), 3, 22), ((3, 5), 4, 22)],
)
def test_the_centre_needs_no_signal(grid, views, expected):
    tokens = make_tokens([], grid=grid, num_views=views)

    assert [picks(r)[0] for r in carve(tokens, pivot="center", keep_tokens=1)] == [expected] * 3


def test_the_pivot_of_a_tiled_image_lies_in_its_thumbnail():
    tokens = make_tokens(["cls_attention"], grid=(3, 4), num_views=5)
    tokens.signals["cls_attention"][:, 40] = 2.0
    layout = TileLayout(rows=2, columns=2, unpadded=(0, 6, 0, 8))
    tiled = dataclasses.replace(tokens, tiles=layout)

    by_attention = [picks(result)[0] for result in carve(tiled, keep_tokens=6)]
    by_place = [picks(result)[0] for result in carve(tiled, keep_tokens=6, pivot="center")]

    assert by_attention == tokens.signals["cls_attention"][:, :12].argmax(dim=1).tolist()
    assert by_place == [5, 5, 5]
    assert [picks(result)[0] for result in carve(tokens, keep_tokens=6)] == [40, 40, 40]


def test_tokens_of_all_tiles_are_weighed_against_one_another():
    tokens = make_tokens(["cls_attention"], grid=(3, 4), num_views=5, seed=7)
    layout = TileLayout(rows=2, columns=2, unpadded=(0, 6, 0, 8))

    result = carve(dataclasses.replace(tokens, tiles=layout), keep_tokens=20)[0]

    pivot = int(tokens.signals["cls_attention"][0, :12].argmax())
    assert picks(result) == literal_max_sum(tokens.features[0], pivot, 20)


@pytest.mark.parametrize("rule", ["max_sum", "k_center"])
def test_an_image_of_one_colour_keeps_the_pivot_and_the_first_tokens(rule):
    tokens = VisualTokens(
        features=torch.ones(1, 12, 4), grid=(3, 4), signals={"cls_attention": torch.eye(12)[9:10]}
    )

    assert picks(carve(tokens, rule=rule, keep_tokens=4)[0]) == [9, 0, 1, 2]
