import dataclasses

import pytest
import torch

from pipeline import carvers
from pipeline.types import VisualTokens
from tests.carvers.inputs import make_tokens


def row(signal: str, *attention: float) -> VisualTokens:
    features = torch.arange(float(len(attention)))[None, :, None]
    return VisualTokens(
        features=features,
        grid=(1, len(attention)),
        signals={signal: torch.tensor([attention])},
    )


@pytest.mark.parametrize("signal", ["cls_attention", "received_attention"])
def test_the_most_attended_tokens_are_kept_in_position_order(signal):
    carver = carvers.build("fastervlm", {"keep_tokens": 3, "attention": signal})

    result = carver.carve(row(signal, 0.1, 0.4, 0.05, 0.2, 0.2, 0.05))[0]

    assert carver.needs == {signal}
    assert result.positions.tolist() == [1, 3, 4]
    assert result.ranks.tolist() == [0, 1, 2]
    assert result.features.flatten().tolist() == [1.0, 3.0, 4.0]


def test_ranks_follow_the_attention():
    carver = carvers.build("fastervlm", {"keep_tokens": 3})

    result = carver.carve(row("cls_attention", 0.2, 0.1, 0.3, 0.4))[0]

    assert result.positions.tolist() == [0, 2, 3]
    assert result.ranks.tolist() == [2, 1, 0]


def test_the_features_do_not_matter():
    carver = carvers.build("fastervlm", {"keep_tokens": 9})
    tokens = make_tokens(carver.needs)
    flipped = dataclasses.replace(tokens, features=-3 * tokens.features)

    for left, right in zip(carver.carve(tokens), carver.carve(flipped), strict=True):
        assert torch.equal(left.positions, right.positions)
        assert torch.equal(left.ranks, right.ranks)
