import math

import pytest
import torch
from torch.testing import assert_close

from pipeline import carvers
from pipeline.errors import ConfigError
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens

NEEDS = ["cls_attention", "received_attention", "mean_keys"]


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("token_transforming", options).carve(tokens)


@pytest.mark.parametrize("attention", ["cls_attention", "received_attention"])
@pytest.mark.parametrize(
    ("grid", "keep", "temperature"), [((5, 7), 9, 0.1), ((3, 8), 23, 0.5), ((2, 2), 1, 0.02)]
)
def test_it_equals_the_formula_entry_by_entry(attention, grid, keep, temperature):
    tokens = make_tokens(NEEDS, grid=grid, batch=2, width=6)

    results = carve(tokens, keep_tokens=keep, attention=attention, temperature=temperature)

    num_tokens = math.prod(grid)
    for image, result in enumerate(results):
        scores = tokens.signals[attention][image].tolist()
        keys = tokens.signals["mean_keys"][image].double()
        order = sorted(range(num_tokens), key=lambda i: (-scores[i], i))[:keep]
        assert result.positions.tolist() == sorted(order)
        assert result.positions[result.ranks.argsort()].tolist() == order
        shares = torch.zeros(keep, num_tokens, dtype=torch.float64)
        for row, i in enumerate(sorted(order)):
            for j in range(num_tokens):
                cosine = torch.cosine_similarity(keys[i], keys[j], dim=0)
                shares[row, j] = torch.exp(cosine / temperature)
            shares[row] /= shares[row].sum()
        assert_close(result.features, (shares @ tokens.features[image].double()).float())
        # The size is N times the row's share of all shares.
        assert_close(result.sizes, (num_tokens * shares.sum(1) / shares.sum()).float())


def test_sizes_add_up_to_the_tokens_of_the_image():
    tokens = make_tokens(NEEDS, grid=(5, 7))

    for result in carve(tokens, keep_tokens=9):
        assert_close(result.sizes, torch.full((9,), 35 / 9))


def test_a_low_temperature_keeps_the_token_and_averages_it_with_those_of_the_same_key():
    tokens = VisualTokens(
        features=torch.tensor([[[1.0], [2.0], [4.0], [8.0]]]),
        grid=(2, 2),
        signals={
            "cls_attention": torch.tensor([[0.4, 0.3, 0.2, 0.1]]),
            "mean_keys": torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-1.0, 1.0]]]),
        },
    )

    result = carve(tokens, keep_tokens=2, temperature=0.001)[0]

    assert result.positions.tolist() == [0, 1]
    assert_close(result.features, torch.tensor([[2.5], [2.0]]))


def test_a_high_temperature_gives_the_mean_of_the_image():
    tokens = make_tokens(NEEDS)

    result = carve(tokens, keep_tokens=3, temperature=1e6)[0]

    assert_close(result.features, tokens.features[0].mean(0).expand(3, -1), atol=1e-4, rtol=1e-4)


def test_a_token_without_a_key_takes_from_all_tokens_alike():
    tokens = make_tokens(NEEDS)
    tokens.signals["mean_keys"][:, 4] = 0.0
    tokens.signals["cls_attention"][:, 4] = 2.0

    result = carve(tokens, keep_tokens=1)[0]

    assert result.positions.tolist() == [4]
    assert_close(result.features[0], tokens.features[0].mean(0))


def test_features_of_a_smaller_budget_are_those_of_a_larger_one():
    tokens = make_tokens(NEEDS)

    few, many = carve(tokens, keep_tokens=4)[0], carve(tokens, keep_tokens=12)[0]

    assert_close(few.features, many.features[many.ranks < 4])


@pytest.mark.parametrize("temperature", [0, -0.1, float("inf")])
def test_a_temperature_that_is_no_positive_number_is_rejected(temperature):
    with pytest.raises(ConfigError, match="temperature"):
        carvers.build("token_transforming", {"temperature": temperature})
