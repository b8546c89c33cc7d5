import dataclasses

import pytest
import torch
from torch.testing import assert_close

from pipeline import carvers
from pipeline.errors import ConfigError
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens
from tests.golden import golden_cases

CASES = golden_cases("llavolta_pool")


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("llavolta", options).carve(tokens)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("option", ["stride", "keep_tokens"])
def test_it_equals_the_published_code(case, option):
    features = case.inputs["features"]
    value = case.options["stride" if option == "stride" else "output_tokens"]
    tokens = VisualTokens(features=features[None], grid=(1, len(features)))

    result = carve(tokens, **{option: value})[0]

    tolerance = case.tolerance["features"]
    assert_close(
        result.features,
        case.expected["features"],
        rtol=tolerance["rtol"],
        atol=tolerance["atol"],
    )


def test_runs_are_averaged_and_stand_at_their_lower_middle_token():
    values = torch.tensor([1.0, 3.0, 5.0, 7.0, 2.0, 4.0, 6.0, 8.0, 100.0])
    tokens = VisualTokens(features=values[None, :, None], grid=(3, 3))

    result = carve(tokens, stride=4)[0]

    # Two whole runs; the ninth token is in none of them.
    assert result.features.flatten().tolist() == [4.0, 5.0]
    assert result.positions.tolist() == [1, 5]
    assert result.sizes.tolist() == [4.0, 4.0]


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 10, 36])
def test_a_budget_takes_the_smallest_stride_that_keeps_to_it(num_tokens):
    tokens = make_tokens([], grid=(1, num_tokens), batch=2)
    for keep in range(1, num_tokens + 3):
        stride = next(s for s in range(1, 99) if num_tokens // s <= keep)

        results = carve(tokens, keep_tokens=keep)

        for image, result in enumerate(results):
            starts = range(0, num_tokens - stride + 1, stride)
            runs = [tokens.features[image, s : s + stride].mean(dim=0) for s in starts]
            assert_close(result.features, torch.stack(runs))
            assert result.positions.tolist() == [s + (stride - 1) // 2 for s in starts]
            assert result.sizes.eq(stride).all()


def test_a_run_goes_on_over_the_end_of_a_row_and_of_a_view():
    tokens = make_tokens([], grid=(2, 3), num_views=2, batch=1)

    result = carve(tokens, stride=4)[0]

    assert_close(result.features[1], tokens.features[0, [4, 5, 6, 7]].mean(dim=0))


def test_a_stride_above_the_number_of_tokens_averages_them_all():
    tokens = make_tokens([], grid=(2, 3), batch=1)

    result = carve(tokens, stride=8)[0]

    assert_close(result.features, tokens.features[0].mean(dim=0, keepdim=True))
    assert result.positions.tolist() == [2]


@pytest.mark.parametrize(
    "options",
    [{"stride": 8, "keep_tokens": 4}, {"stride": 8, "keep_ratio": 0.5}, {"stride": 0}],
)
def test_a_stride_beside_a_budget_or_below_one_is_rejected(options):
    with pytest.raises(ConfigError, match="stride"):
        carvers.build("llavolta", options)


def test_a_carver_with_a_stride_can_be_built_again_from_its_own_fields():
    carver = carvers.build("llavolta", {"stride": 8})

    assert carvers.build("llavolta", dataclasses.asdict(carver)) == carver
    assert dataclasses.replace(carver, stride=4).stride == 4


def test_the_best_ranked_runs_are_spread_over_the_sequence():
    tokens = make_tokens([], grid=(1, 40), batch=1)

    result = carve(tokens, stride=4)[0]

    # Of runs 0 to 9 the lower middle one first, then those that shorten the way to it most.
    assert result.ranks.argsort().tolist()[:3] == [4, 7, 1]
