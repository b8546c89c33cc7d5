import math

import pytest
import torch

from pipeline import carvers
from pipeline.errors import ConfigError
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("id_selection", options).carve(tokens)


def picks(result: CarvedTokens) -> list[int]:
    """Positions in the order of picking."""
    return result.positions[result.ranks.argsort()].tolist()


def attended(features: list[list[float]], attention: list[float]) -> VisualTokens:
    return VisualTokens(
        features=torch.tensor([features]),
        grid=(1, len(features)),
        signals={"cls_attention": torch.tensor([attention])},
    )


def literal(
    features: torch.Tensor, attention: torch.Tensor, num_kept: int, gamma: float
) -> list[int]:
    """The rule token by token, in float64; spent scores go to the lowest position."""
    rows = [row / row.norm() for row in features.double()]
    values = attention.double().tolist()
    scores = [(v - min(values)) / (max(values) - min(values)) for v in values]
    kept: list[int] = []
    while len(kept) < num_kept:
        rest = [i for i in range(len(rows)) if i not in kept]
        chosen = max(rest, key=lambda i: scores[i])
        kept.append(chosen)
        for j in rest:
            if j != chosen:
                distance = 1 - float(rows[j] @ rows[chosen])
                lost = math.exp(-gamma * distance**2) * scores[chosen]
                scores[j] = max(0.0, scores[j] - lost)
    return kept


@pytest.mark.parametrize(("grid", "width", "keep"), [((3, 7), 6, 9), ((6, 2), 40, 12)])
@pytest.mark.parametrize("gamma", [20.0, 3.0])
def test_it_equals_the_rule_written_out(grid, width, keep, gamma):
    tokens = make_tokens(["cls_attention"], grid=grid, width=width, seed=2)

    results = carve(tokens, gamma=gamma, keep_tokens=keep, spent="position")

    for image, result in enumerate(results):
        attention = tokens.signals["cls_attention"][image]
        assert picks(result) == literal(tokens.features[image], attention, keep, gamma)


def test_a_spent_score_that_is_picked_gives_nothing_back():
    tokens = make_tokens(["cls_attention"], grid=(4, 6), width=6, seed=2)
    alike = VisualTokens(features=tokens.features + 2, grid=tokens.grid, signals=tokens.signals)

    for image, result in enumerate(carve(alike, keep_tokens=20, spent="position")):
        attention = tokens.signals["cls_attention"][image]
        assert picks(result) == literal(alike.features[image], attention, 20, 20.0)


def test_gamma_is_20_unless_told():
    tokens = make_tokens(["cls_attention"], width=5, seed=8)

    explicit = carve(tokens, gamma=20.0, keep_tokens=12)

    assert [picks(r) for r in carve(tokens, keep_tokens=12)] == [picks(r) for r in explicit]
    assert [picks(r) for r in carve(tokens, keep_tokens=12, gamma=2.0)] != [
        picks(r) for r in explicit
    ]


def test_a_pick_takes_its_score_from_its_twin_and_none_from_a_distant_token():
    tokens = attended([[1.0, 0], [1.0, 0], [0.0, 1], [-1.0, 0]], [1.0, 0.9, 0.2, 0.0])

    assert picks(carve(tokens, keep_tokens=2)[0]) == [0, 2]


def test_a_similar_but_more_important_token_still_beats_a_distant_unimportant_one():
    # cos 45 degrees: exp(-20 * 0.2929^2) = 0.18 of the first score is lost.
    tokens = attended([[1.0, 0], [1.0, 1.0], [0.0, 1], [-1.0, 0]], [1.0, 0.9, 0.5, 0.0])

    assert picks(carve(tokens, keep_tokens=2)[0]) == [0, 1]


def test_a_large_gamma_ranks_by_attention_alone():
    tokens = make_tokens(["cls_attention"], seed=1)

    results = carve(tokens, gamma=1e6, keep_tokens=10)

    expected = tokens.signals["cls_attention"].argsort(dim=1, descending=True)[:, :10]
    assert [picks(result) for result in results] == expected.tolist()


@pytest.mark.parametrize(("spent", "expected"), [("attention", [2, 4, 1, 0]), ("position", [2, 0])])
def test_once_all_scores_are_spent_the_option_decides(spent, expected):
    tokens = attended([[1.0, 1.0]] * 5, [0.1, 0.3, 0.9, 0.0, 0.5])

    assert picks(carve(tokens, keep_tokens=4, spent=spent)[0])[: len(expected)] == expected


def test_a_score_that_is_left_comes_before_every_spent_one():
    # Token 1 is spent though it was important; token 2 keeps its little score.
    tokens = attended([[1.0, 0], [1.0, 0], [-1.0, 0], [0.0, 1.0]], [1.0, 0.9, 0.05, 0.0])

    assert picks(carve(tokens, keep_tokens=4)[0]) == [0, 2, 1, 3]


def test_received_attention_can_take_the_place_of_the_class_tokens():
    tokens = make_tokens(["cls_attention", "received_attention"])

    results = carve(tokens, attention="received_attention", keep_tokens=1)

    expected = tokens.signals["received_attention"].argmax(dim=1).tolist()
    assert [picks(result)[0] for result in results] == expected


@pytest.mark.parametrize("gamma", [-1.0, 2e6, float("nan"), float("inf")])
def test_a_gamma_out_of_range_is_rejected(gamma):
    with pytest.raises(ConfigError, match="gamma"):
        carvers.build("id_selection", {"gamma": gamma})
