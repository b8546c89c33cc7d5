import dataclasses

import pytest
import torch
from torch.testing import assert_close

from pipeline import carvers
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens
from tests.golden import golden_cases

PORT = golden_cases("visionzip")
NEEDS = ["cls_attention", "mean_keys"]


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("visionzip", options).carve(tokens)


def golden(case) -> tuple[VisualTokens, dict[str, object]]:
    features = case.inputs["features"]
    tokens = VisualTokens(
        features=features[None],
        grid=(1, len(features)),
        signals={
            "cls_attention": case.inputs["attention"][None],
            "mean_keys": case.inputs["key_features"][None],
        },
    )
    options = {
        "keep_tokens": case.options["keep_tokens"],
        "contextual_share": case.options["target_share"],
    }
    return tokens, options


def slow(features, attention, keys, dominant: int, contextual: int, *, original: bool):
    """The description, token by token: {position: (feature, size)}."""
    features, keys = features.double(), keys.double()
    order = sorted(range(len(features)), key=lambda i: -attention[i])
    rest = sorted(order[dominant:])
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    members = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            likeness = [float(keys[i] @ keys[t] / keys[i].norm() / keys[t].norm()) for t in targets]
            members[targets[likeness.index(max(likeness))]].append(i)
    result = {i: (features[i], 1) for i in order[:dominant]}
    for target, joined in members.items():
        total = sum((features[i] for i in joined), torch.zeros_like(features[0]))
        if original:
            feature = features[target] + total / max(len(joined), 1)
        else:
            feature = (features[target] + total) / (1 + len(joined))
        result[target] = (feature, 1 + len(joined))
    return result


@pytest.mark.parametrize("case", PORT, ids=lambda case: case.name)
def test_the_port_equals_the_released_code(case):
    tokens, options = golden(case)

    result = carve(tokens, version="port", **options)[0]

    assert result.positions.tolist() == case.expected["positions"].tolist()
    tolerance = case.tolerance["features"]
    assert_close(
        result.features, case.expected["features"], rtol=tolerance["rtol"], atol=tolerance["atol"]
    )
    joined = torch.bincount(case.expected["assignment"], minlength=len(result.positions))
    assert torch.equal(result.sizes, joined.float())


@pytest.mark.parametrize("version", ["original", "port"])
@pytest.mark.parametrize(
    ("grid", "keep", "dominant", "contextual"),
    [((24, 24), 64, 54, 10), ((8, 8), 32, 27, 5), ((5, 7), 9, 8, 1), ((3, 5), 2, 1, 1)],
)
def test_it_equals_a_slow_loop(version, grid, keep, dominant, contextual):
    tokens = make_tokens(NEEDS, batch=2, grid=grid, width=20)

    results = carve(tokens, version=version, keep_tokens=keep)

    for image, result in enumerate(results):
        expected = slow(
            tokens.features[image],
            tokens.signals["cls_attention"][image].tolist(),
            tokens.signals["mean_keys"][image],
            dominant,
            contextual,
            original=version == "original",
        )
        assert result.positions.tolist() == sorted(expected)
        features, sizes = zip(*(expected[p] for p in sorted(expected)), strict=True)
        assert_close(result.features, torch.stack(features).float(), rtol=1e-5, atol=1e-5)
        assert result.sizes.tolist() == list(sizes)


@pytest.mark.parametrize(("version", "expected"), [("original", 1 + 3.0), ("port", 7 / 3)])
def test_a_contextual_token_is_a_sum_of_two_means_or_one_mean(version, expected):
    # Token 1 is dominant; 0 is the target and 2, 3 join it.
    tokens = VisualTokens(
        features=torch.tensor([[[1.0], [9.0], [2.0], [4.0]]]),
        grid=(2, 2),
        signals={
            "cls_attention": torch.tensor([[0.1, 0.9, 0.2, 0.3]]),
            "mean_keys": torch.ones(1, 4, 2),
        },
    )

    result = carve(tokens, version=version, keep_tokens=2)[0]

    assert result.positions.tolist() == [0, 1]
    assert_close(result.features.flatten(), torch.tensor([expected, 9.0]))
    assert result.sizes.tolist() == [3, 1]


@pytest.mark.parametrize(("keep", "contextual"), [(32, 5), (64, 10), (128, 20), (192, 30)])
def test_the_share_gives_the_published_counts(keep, contextual):
    tokens = make_tokens(NEEDS, batch=1, grid=(24, 24), width=4)

    result = carve(tokens, keep_tokens=keep)[0]

    # Every contextual token of so many has others that joined it; dominant ones have none.
    assert (result.sizes > 1).sum() == contextual


def test_the_keys_say_who_joins_whom_not_the_features():
    # Attention makes none but token 3 dominant. Targets are 0 and 2; 1, 4 and 5 join.
    keys = torch.tensor([[1.0, 0.0], [0.1, 1.0], [0.0, 1.0], [5.0, 5.0], [2.0, 0.1], [1.0, 0.9]])
    tokens = VisualTokens(
        features=torch.arange(6.0)[None, :, None],
        grid=(2, 3),
        signals={
            "cls_attention": torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]]),
            "mean_keys": keys[None],
        },
    )

    result = carve(tokens, version="port", keep_tokens=3, contextual_share=0.67)[0]

    assert result.positions.tolist() == [0, 2, 3]
    assert_close(result.features.flatten(), torch.tensor([3.0, 1.5, 3.0]))


def test_every_prefix_holds_dominant_and_contextual_tokens_in_turns():
    tokens = make_tokens(NEEDS, batch=1, grid=(8, 8))

    result = carve(tokens, keep_tokens=32)[0]

    is_contextual = result.sizes[result.ranks.argsort()] > 1
    assert is_contextual[:16].sum() in (2, 3)
    attention = tokens.signals["cls_attention"][0][result.positions[result.ranks.argsort()]]
    assert (attention[~is_contextual].diff() <= 0).all()
    assert (attention[is_contextual].diff() <= 0).all()


def test_sums_of_half_precision_features_are_made_in_float32():
    tokens = make_tokens(NEEDS, batch=1, grid=(12, 12))
    half = dataclasses.replace(tokens, features=tokens.features.half())
    full = dataclasses.replace(tokens, features=tokens.features.half().float())

    result, expected = carve(half, keep_tokens=8)[0], carve(full, keep_tokens=8)[0]

    assert torch.equal(result.features, expected.features.half())
