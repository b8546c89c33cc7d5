import math

import pytest
import torch
from torch import Tensor

from pipeline import carvers
from pipeline.errors import ConfigError
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens


def in_order(result: CarvedTokens) -> list[int]:
    return result.positions[result.ranks.argsort()].tolist()


def literal(features: Tensor, num_kept: int, temperature: float) -> list[int]:
    """The rule for one image, number by number, in float64."""
    rows = [[v / math.hypot(*row) for v in row] for row in features.double().tolist()]
    tokens = range(len(rows))
    quality: list[list[float]] = []
    for i in tokens:
        cosines = [sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) for j in tokens]
        powers = [math.exp(cosine / temperature) for cosine in cosines]
        quality.append([power / sum(powers) / len(rows) for power in powers])
    best = [0.0] * len(rows)
    picks: list[int] = []
    for _ in range(num_kept):
        gains = [sum(max(0.0, quality[i][j] - best[i]) for i in tokens) for j in tokens]
        picks.append(max((j for j in tokens if j not in picks), key=lambda j: (gains[j], -j)))
        best = [max(best[i], quality[i][picks[-1]]) for i in tokens]
    return picks


@pytest.mark.parametrize("temperature", [0.15, 0.2, 1.0])
@pytest.mark.parametrize(("grid", "keep"), [((1, 6), 3), ((4, 6), 20), ((3, 11), 9)])
def test_it_equals_the_rule_written_out(grid, keep, temperature):
    options = {"keep_tokens": keep, "temperature": temperature}
    tokens = make_tokens([], batch=2, grid=grid, width=8)

    results = carvers.build("mmtok_vision", options).carve(tokens)

    for image, result in enumerate(results):
        assert in_order(result) == literal(tokens.features[image], keep, temperature)


def test_one_token_of_each_direction_comes_first_and_large_groups_before_small():
    directions = torch.eye(3)[[0, 1, 2, 2, 1, 2]]
    tokens = VisualTokens(features=directions[None], grid=(2, 3))

    result = carvers.build("mmtok_vision", {"keep_tokens": 4, "temperature": 0.01}).carve(tokens)[0]

    # With so low a temperature every group shares its coverage, the same sum for each: 1, the
    # groups of 1, 2 and 3 tokens tie, and the lowest positions win.
    assert in_order(result) == [0, 1, 2, 3]


def test_a_token_in_the_middle_of_many_covers_most():
    # Token 4 lies between the others, which are orthogonal to each other.
    features = torch.cat([torch.eye(4), torch.ones(1, 4)])[None]
    tokens = VisualTokens(features=features, grid=(1, 5))

    result = carvers.build("mmtok_vision", {"keep_tokens": 1, "temperature": 1.0}).carve(tokens)[0]

    assert result.positions.tolist() == [4]


def test_the_length_of_a_token_does_not_matter():
    tokens = make_tokens([], batch=1)
    scales = torch.logspace(-3, 3, 35)[None, :, None]
    scaled = VisualTokens(features=tokens.features * scales, grid=tokens.grid)
    carver = carvers.build("mmtok_vision", {"keep_tokens": 12})

    assert in_order(carver.carve(scaled)[0]) == in_order(carver.carve(tokens)[0])


@pytest.mark.parametrize("temperature", [0.0, -0.2, float("inf"), float("nan")])
def test_a_temperature_that_is_not_positive_is_rejected(temperature):
    with pytest.raises(ConfigError, match="temperature"):
        carvers.build("mmtok_vision", {"temperature": temperature})
