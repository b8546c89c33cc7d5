import math

import pytest
import torch
from torch.testing import assert_close

from pipeline import carvers
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens
from tests.golden import golden_cases

CASES = golden_cases("divprune")


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("divprune", options).carve(tokens)


def picks(result: CarvedTokens) -> list[int]:
    """Positions in the order of picking."""
    return result.positions[result.ranks.argsort()].tolist()


def at_angles(*degrees: float) -> VisualTokens:
    radians = torch.tensor(degrees).deg2rad()
    features = torch.stack([radians.cos(), radians.sin()], dim=1)[None]
    return VisualTokens(features=features, grid=(1, len(degrees)))


def literal(features: torch.Tensor, num_kept: int) -> list[int]:
    """The rule token by token, in float64."""
    rows = features.double().tolist()

    def distance(a: list[float], b: list[float]) -> float:
        lengths = math.hypot(*a) * math.hypot(*b)
        return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / lengths

    everyone = range(len(rows))
    nearest = [min(distance(rows[i], rows[j]) for j in everyone if j != i) for i in everyone]
    kept = [nearest.index(max(nearest))]
    while len(kept) < num_kept:
        rest = [i for i in everyone if i not in kept]
        kept.append(max(rest, key=lambda i: min(distance(rows[i], rows[j]) for j in kept)))
    return kept


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_equals_the_released_code(case):
    features = case.inputs["features"]
    tokens = VisualTokens(features=features[None], grid=(1, len(features)))

    result = carve(tokens, keep_tokens=case.options["keep_tokens"])[0]

    assert torch.equal(result.positions, case.expected["positions"].long())
    assert torch.equal(result.features, case.expected["features"])
    assert picks(result) == case.expected["selection_order"].tolist()


def test_a_batch_of_released_cases_gives_each_of_them():
    case = CASES[0]
    noise = make_tokens([], batch=2, grid=(4, 9), width=32)
    features = torch.cat([noise.features, case.inputs["features"][None]])

    result = carve(VisualTokens(features=features, grid=(4, 9)), keep_tokens=9)[2]

    assert picks(result) == case.expected["selection_order"].tolist()


@pytest.mark.parametrize(("grid", "width", "keep"), [((3, 7), 5, 8), ((6, 2), 40, 5)])
def test_it_equals_the_rule_written_out(grid, width, keep):
    tokens = make_tokens([], grid=grid, width=width, seed=3)

    for features, result in zip(tokens.features, carve(tokens, keep_tokens=keep), strict=True):
        assert picks(result) == literal(features, keep)


def test_the_most_isolated_token_comes_first_and_then_the_farthest():
    tokens = at_angles(0, 5, 90, 100, 200)

    assert picks(carve(tokens, keep_tokens=3)[0]) == [4, 1, 3]


def test_lengths_of_tokens_do_not_matter():
    tokens = make_tokens([], seed=5)
    lengths = torch.linspace(0.01, 100, tokens.features.shape[1])[:, None]
    scaled = VisualTokens(features=tokens.features * lengths, grid=tokens.grid)

    for left, right in zip(carve(tokens), carve(scaled), strict=True):
        assert torch.equal(left.positions, right.positions)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_distinct_token_is_kept_before_a_duplicate_and_duplicates_in_order(dtype):
    distinct = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    features = distinct[torch.arange(24) % 6][None].to(dtype)

    result = carve(VisualTokens(features=features, grid=(4, 6)), keep_tokens=10)[0]

    assert {position % 6 for position in picks(result)[:6]} == set(range(6))
    assert result.positions.tolist() == list(range(10))


def test_an_image_of_one_colour_keeps_its_first_tokens():
    tokens = VisualTokens(features=torch.full((1, 30, 33), 0.3), grid=(5, 6))

    assert picks(carve(tokens, keep_tokens=7)[0]) == list(range(7))


def test_a_zero_token_is_as_far_from_all_as_an_orthogonal_one():
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 0.0], [1.0, 0.2]]])

    result = carve(VisualTokens(features=features, grid=(2, 2)), keep_tokens=1)[0]

    assert result.positions.tolist() == [2]
    assert_close(result.features, torch.zeros(1, 2))
