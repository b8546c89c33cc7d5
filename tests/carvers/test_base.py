"""The budget rule, and the path from scores to results, on a carver made here."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pipeline.carvers import _ops
from pipeline.carvers._base import BudgetCarver, ScoreCarver
from pipeline.errors import MissingSignalError, NonFiniteError
from pipeline.types import VisualTokens
from tests.carvers.inputs import make_tokens


@dataclass(frozen=True, kw_only=True)
class FirstFeature(ScoreCarver):
    """Score a token by its first feature."""

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.features[:, :, 0].float()


def column(*values: float) -> VisualTokens:
    return VisualTokens(features=torch.tensor(values)[None, :, None], grid=(1, len(values)))


def test_the_best_scores_are_kept_in_position_order_and_ranked():
    result = FirstFeature(keep_tokens=3).carve(column(1.0, 9.0, 4.0, 7.0, 2.0))[0]

    assert result.positions.tolist() == [1, 2, 3]
    assert result.ranks.tolist() == [0, 2, 1]
    assert result.features.flatten().tolist() == [9.0, 4.0, 7.0]
    assert result.sizes.tolist() == [1.0, 1.0, 1.0]


def test_equal_scores_keep_the_lower_positions():
    result = FirstFeature(keep_tokens=16).carve(column(*[5.0] * 576))[0]

    assert result.positions.tolist() == list(range(16))
    assert result.ranks.tolist() == list(range(16))


def test_a_smaller_budget_keeps_the_best_ranked_of_a_larger_one():
    tokens = make_tokens([], batch=2)

    few = FirstFeature(keep_tokens=4).carve(tokens)
    many = FirstFeature(keep_tokens=20).carve(tokens)

    for small, large in zip(few, many, strict=True):
        assert torch.equal(small.positions, large.positions[large.ranks < 4])


@pytest.mark.parametrize(
    ("budget", "num_tokens", "expected"),
    [
        ({}, 576, 144),
        ({"keep_tokens": 128}, 576, 128),
        ({"keep_tokens": 128}, 100, 100),
        ({"keep_ratio": 0.5}, 7, 4),  # 3.5, half to even
        ({"keep_ratio": 0.5}, 5, 2),  # 2.5
        ({"keep_ratio": 0.001}, 576, 1),
        ({"keep_ratio": 1.0}, 576, 576),
    ],
)
def test_the_budget_of_an_image(budget, num_tokens, expected):
    assert FirstFeature(**budget).budget(num_tokens) == expected


def test_a_carver_without_a_budget_shows_the_default_ratio():
    assert FirstFeature() == FirstFeature(keep_ratio=0.25)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"keep_tokens": 4, "keep_ratio": 0.5}, "keep_tokens=4 and keep_ratio=0.5 are both given"),
        ({"keep_tokens": 0}, "keep_tokens=0 must be at least 1"),
        ({"keep_ratio": 0.0}, "keep_ratio=0.0 must be above 0"),
        ({"keep_ratio": 2.0}, "at most 1"),
        ({"keep_ratio": float("nan")}, "keep_ratio=nan"),
    ],
)
def test_a_wrong_budget_is_rejected_without_a_config_too(budget, message):
    with pytest.raises(ValueError, match=message):
        FirstFeature(**budget)


def test_the_bases_are_abstract():
    with pytest.raises(TypeError, match="abstract"):
        BudgetCarver()
    with pytest.raises(TypeError, match="abstract"):
        ScoreCarver()


def test_a_missing_signal_is_named_with_those_that_are_there():
    tokens = make_tokens(["cls_attention"])

    with pytest.raises(MissingSignalError, match=r"'keys'.*holds: cls_attention"):
        _ops.signal(tokens, "keys")


def test_the_images_with_values_that_are_not_finite_are_named():
    features = torch.zeros(3, 4, 5)
    features[1, 2, 3] = float("nan")
    features[2, 0, 0] = float("inf")

    with pytest.raises(NonFiniteError, match=r"image \[1, 2\]"):
        _ops.require_finite(features, "features")


def test_group_mean_of_a_hand_made_example():
    rows = torch.tensor([[[1.0], [2.0], [6.0], [10.0]], [[1.0], [2.0], [3.0], [4.0]]])
    owners = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]])

    means, sizes = _ops.group_mean(rows, owners, 2)

    assert means.flatten(1).tolist() == [[6.0, 3.5], [2.0, 4.0]]
    assert sizes.tolist() == [[2.0, 2.0], [3.0, 1.0]]
