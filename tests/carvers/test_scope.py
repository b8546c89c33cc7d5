import dataclasses

import pytest
import torch
from torch import Tensor

from pipeline import carvers
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens
from tests.golden import golden_cases

CASES = golden_cases("scope")


def in_order(result: CarvedTokens) -> list[int]:
    return result.positions[result.ranks.argsort()].tolist()


def literal(features: Tensor, attention: Tensor, num_kept: int, alpha: float) -> list[int]:
    """The rule for one image, token by token, in float64."""
    rows = features.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    cosines = rows @ rows.T
    covered = torch.zeros(len(rows), dtype=torch.float64)
    picks: list[int] = []
    for _ in range(num_kept):
        best, best_gain = -1, -1.0
        for candidate in range(len(rows)):
            if candidate in picks:
                continue
            gain = sum(max(0.0, float(c)) for c in cosines[candidate] - covered)
            gain *= float(attention[candidate]) ** alpha
            if gain > best_gain:
                best, best_gain = candidate, gain
        picks.append(best)
        covered = torch.maximum(covered, cosines[best])
    return picks


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_equals_the_stored_outputs_of_the_port(case):
    options = {key: case.options[key] for key in ("keep_tokens", "alpha")}
    tokens = VisualTokens(
        features=case.inputs["features"][None],
        grid=(1, len(case.inputs["features"])),
        signals={"cls_attention": case.inputs["attention"][None]},
    )

    result = carvers.build("scope", options).carve(tokens)[0]

    assert result.positions.tolist() == case.expected["positions"].tolist()
    assert in_order(result) == case.expected["selection_order"].tolist()
    assert torch.equal(result.features, case.expected["features"])


@pytest.mark.parametrize("attention", ["cls_attention", "received_attention"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("grid", [(1, 7), (4, 6), (3, 11)])
def test_it_equals_the_rule_written_out(grid, alpha, attention):
    options = {"keep_tokens": 7, "alpha": alpha, "attention": attention}
    tokens = make_tokens([attention], batch=2, grid=grid, width=10)

    results = carvers.build("scope", options).carve(tokens)

    for image, result in enumerate(results):
        signal = tokens.signals[attention][image]
        assert in_order(result) == literal(tokens.features[image], signal, 7, alpha)


def test_without_attention_it_covers_alone_and_needs_no_signal():
    carver = carvers.build("scope", {"keep_tokens": 6, "alpha": 0.0})
    tokens = make_tokens([], batch=1)

    result = carver.carve(tokens)[0]

    assert carver.needs == frozenset()
    assert in_order(result) == literal(tokens.features[0], torch.ones(35), 6, 1.0)


def test_a_token_covered_by_a_salient_like_one_waits_for_a_lonely_one():
    # Tokens 0 to 3 are one direction, 4 another; 1 is the most salient, 4 the least.
    features = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]])[None]
    attention = torch.tensor([[0.2, 0.4, 0.2, 0.3, 0.1]])
    tokens = VisualTokens(features=features, grid=(1, 5), signals={"cls_attention": attention})

    result = carvers.build("scope", {"keep_tokens": 3}).carve(tokens)[0]

    # After 1 and 4 all gains are 0, and the lowest position is next.
    assert in_order(result) == [1, 4, 0]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("alpha", [1.0, 12.0])
def test_the_scale_of_the_attention_does_not_matter(scale, alpha):
    carver = carvers.build("scope", {"keep_tokens": 9, "alpha": alpha})
    tokens = make_tokens(carver.needs, batch=2)
    scaled = {"cls_attention": tokens.signals["cls_attention"] * scale}

    results = carver.carve(dataclasses.replace(tokens, signals=scaled))

    for left, right in zip(results, carver.carve(tokens), strict=True):
        assert in_order(left) == in_order(right)


def test_no_attention_at_all_keeps_the_first_tokens():
    carver = carvers.build("scope", {"keep_tokens": 3})
    tokens = make_tokens([], batch=1)
    silent = dataclasses.replace(tokens, signals={"cls_attention": torch.zeros(1, 35)})

    assert in_order(carver.carve(silent)[0]) == [0, 1, 2]
