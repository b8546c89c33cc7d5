import dataclasses
import math

import pytest
import torch

from pipeline import carvers
from pipeline.errors import MissingSignalError
from pipeline.types import CarvedTokens, TileLayout, VisualTokens
from tests.carvers.inputs import make_tokens

SIGNAL = "projector_sensitivity"


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("zoo_prune", options).carve(tokens)


def picks(result: CarvedTokens) -> list[int]:
    """Positions in the order of picking."""
    return result.positions[result.ranks.argsort()].tolist()


def with_sensitivity(features: list[list[float]], sensitivity: list[float]) -> VisualTokens:
    return VisualTokens(
        features=torch.tensor([features]),
        grid=(1, len(features)),
        signals={SIGNAL: torch.tensor([sensitivity])},
    )


def literal(features: torch.Tensor, sensitivity: torch.Tensor, num_kept: int) -> list[int]:
    """The rule token by token, in float64."""
    rows = features.double()
    values = sensitivity.double().tolist()
    low, high = min(values), max(values)
    weights = [(value - low) / (high - low) for value in values]

    def distance(i: int, j: int) -> float:
        return float(1 - rows[i] @ rows[j] / (rows[i].norm() * rows[j].norm()))

    kept = [weights.index(max(weights))]
    while len(kept) < num_kept:
        gains = [
            -math.inf if i in kept else weights[i] * min(distance(i, j) for j in kept)
            for i in range(len(rows))
        ]
        kept.append(gains.index(max(gains)))
    return kept


@pytest.mark.parametrize(("grid", "width", "keep"), [((3, 7), 6, 21), ((6, 2), 40, 5)])
def test_it_equals_the_rule_written_out(grid, width, keep):
    tokens = make_tokens([SIGNAL], grid=grid, width=width, seed=1)

    for image, result in enumerate(carve(tokens, keep_tokens=keep)):
        sensitivity = tokens.signals[SIGNAL][image]
        assert picks(result) == literal(tokens.features[image], sensitivity, keep)


def test_the_most_sensitive_token_comes_first_and_its_twin_last():
    east, north = [1.0, 0.0], [0.0, 1.0]
    tokens = with_sensitivity([east, north, east, north], [0.9, 0.3, 1.0, 0.2])

    result = carve(tokens, keep_tokens=3)[0]

    # Token 0 is nearly the most sensitive, but equal to the first pick.
    assert picks(result)[:2] == [2, 1]


def test_sensitivity_is_stretched_so_that_the_least_sensitive_token_weighs_nothing():
    tokens = with_sensitivity([[1, 0], [-1, 0.0], [1, 0.5], [1, 1]], [9.0, 5.0, 5.5, 5.6])

    assert picks(carve(tokens, keep_tokens=4)[0]) == [0, 3, 2, 1]


def test_equal_sensitivity_leaves_the_choice_to_distance():
    tokens = with_sensitivity([[1, 0], [1, 0.1], [0.0, 1], [-1, 0]], [2.0] * 4)

    assert picks(carve(tokens, keep_tokens=3)[0]) == [0, 3, 2]


def test_scale_and_offset_of_the_sensitivity_do_not_matter():
    tokens = make_tokens([SIGNAL], seed=4)
    moved = dataclasses.replace(tokens, signals={SIGNAL: tokens.signals[SIGNAL] * 512 + 64})

    for left, right in zip(carve(tokens), carve(moved), strict=True):
        assert picks(left) == picks(right)


def test_every_frame_is_selected_from_by_itself_with_an_equal_share():
    tokens = make_tokens([SIGNAL], grid=(3, 4), num_views=3, seed=2)

    result = carve(tokens, keep_tokens=12)[1]

    for view in range(3):
        cells = slice(view * 12, view * 12 + 12)
        expected = literal(tokens.features[1, cells], tokens.signals[SIGNAL][1, cells], 4)
        assert [p - view * 12 for p in picks(result) if p // 12 == view] == expected


def test_views_take_turns_and_differ_by_at_most_one_token():
    tokens = make_tokens([SIGNAL], grid=(3, 4), num_views=3)
    tiled = make_tokens([SIGNAL], grid=(3, 4), num_views=5)
    tiled = dataclasses.replace(tiled, tiles=TileLayout(rows=2, columns=2, unpadded=(0, 6, 0, 8)))

    frames = [position // 12 for position in picks(carve(tokens, keep_tokens=8)[0])]
    views = [position // 12 for position in picks(carve(tiled, keep_tokens=7)[0])]

    assert [frames.count(view) for view in range(3)] in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert sorted(frames[:3]) == sorted(frames[3:6]) == [0, 1, 2]
    assert views == [0, 1, 2, 3, 4, 0, 1]


def test_without_the_sensitivity_it_says_what_is_missing():
    with pytest.raises(MissingSignalError, match="no signal 'projector_sensitivity'"):
        carve(make_tokens(["cls_attention"]))
