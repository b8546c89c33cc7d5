import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pipeline import carvers
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens

NEEDS = ["last_cls_attention", "last_keys"]


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("prumerge_plus", options).carve(tokens)


def peaked(
    grid: tuple[int, int], sharpness: float, seed: int = 0, width: int = 12, batch: int = 2
) -> VisualTokens:
    """Return tokens whose attention is a softmax, sharper or less sharp."""
    tokens = make_tokens(NEEDS, batch=batch, grid=grid, width=width, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    logits = torch.randn(batch, grid[0] * grid[1], generator=generator)
    signals = dict(tokens.signals)
    signals["last_cls_attention"] = torch.softmax(sharpness * logits, dim=1)
    return dataclasses.replace(tokens, signals=signals)


def chosen(attention: np.ndarray) -> list[int]:
    """Outliers of the attention by falling attention, then evenly spaced ones."""
    attention = attention.astype(np.float64)
    low, high = np.percentile(attention, [25, 75])
    count = int((attention > high + 1.5 * (high - low)).sum())
    outliers = np.argsort(-attention, kind="stable")[:count].tolist()
    ratio = count / len(attention)
    spaced = range(0, len(attention) - 1, int(int(1 / ratio) / 3))
    return outliers + [i for i in spaced if i not in outliers]


def merged(tokens: VisualTokens, image: int, kept: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of the tokens kept, and the one of the rest."""
    features = tokens.features[image].double()
    keys = tokens.signals["last_keys"][image].double()
    attention = tokens.signals["last_cls_attention"][image].double()
    everyone = range(len(features))
    rows = []
    for i in kept:
        cosine = {j: float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm()) for j in everyone}
        nearest = sorted((j for j in everyone if j != i), key=lambda j: -cosine[j])[:32]
        rows.append(features[i] + sum(attention[j] * features[j] for j in nearest))
    rest = sum(attention[j] * features[j] for j in everyone if j not in kept)
    return torch.stack(rows).float(), rest.float()


@pytest.mark.parametrize(
    ("grid", "sharpness"),
    [
        pytest.param((24, 24), 1.0, marks=pytest.mark.slow),
        ((12, 12), 2.0),
        ((5, 9), 1.5),
        ((1, 37), 3.0),
    ],
)
def test_it_equals_a_slow_loop(grid, sharpness):
    tokens = peaked(grid, sharpness)
    num_tokens = grid[0] * grid[1]

    results = carve(tokens)

    for image, result in enumerate(results):
        kept = chosen(tokens.signals["last_cls_attention"][image].numpy())
        gone = [i for i in range(num_tokens) if i not in kept]
        middle = gone[(len(gone) - 1) // 2]
        features, rest = merged(tokens, image, kept)
        assert result.positions.tolist() == sorted([*kept, middle])
        by_position = dict(zip([*kept, middle], [*features, rest], strict=True))
        expected = torch.stack([by_position[p] for p in sorted(by_position)])
        assert_close(result.features, expected, rtol=1e-5, atol=1e-5)
        sizes = [len(gone) if p == middle else 1 for p in sorted(by_position)]
        assert result.sizes.tolist() == sizes


def test_images_of_one_batch_keep_different_numbers_of_tokens():
    tokens = peaked((12, 12), 1.0, batch=3)
    attention = tokens.signals["last_cls_attention"]
    attention[1] = torch.softmax(4 * attention[1].log(), dim=0)

    results = carve(tokens)

    assert len({len(result.positions) for result in results}) > 1
    for image, result in enumerate(results):
        assert len(result.positions) == len(chosen(attention[image].numpy())) + 1


def test_ranks_are_outliers_then_spaced_tokens_by_attention_then_the_rest():
    tokens = peaked((12, 12), 1.0, batch=1)
    attention = tokens.signals["last_cls_attention"][0]
    kept = chosen(attention.numpy())
    low, high = attention.double().quantile(torch.tensor([0.25, 0.75]).double())
    num_outliers = int((attention.double() > high + 1.5 * (high - low)).sum())

    result = carve(tokens)[0]

    in_order = result.positions[result.ranks.argsort()].tolist()
    assert in_order[:num_outliers] == kept[:num_outliers]
    spaced = sorted(kept[num_outliers:], key=lambda i: -attention[i])
    assert in_order[num_outliers:-1] == spaced
    assert in_order[-1] not in kept


def test_the_last_position_is_never_an_evenly_spaced_one():
    # 13 tokens, one outlier: every 4th, up to but not including position 12.
    attention = torch.full((1, 13), 0.01)
    attention[0, 5] = 0.9
    tokens = make_tokens(NEEDS, batch=1, grid=(1, 13))
    tokens = dataclasses.replace(
        tokens, signals={**tokens.signals, "last_cls_attention": attention}
    )

    result = carve(tokens)[0]

    # Not kept: 1, 2, 3, 6, 7, 9, 10, 11, 12; their lower median is 7.
    assert result.positions.tolist() == [0, 4, 5, 7, 8]
    assert result.sizes.tolist() == [1, 1, 1, 9, 1]


def test_without_outliers_the_best_token_counts_as_one():
    tokens = make_tokens(NEEDS, batch=1, grid=(3, 4))
    even = torch.full((1, 12), 0.1)
    tokens = dataclasses.replace(tokens, signals={**tokens.signals, "last_cls_attention": even})

    result = carve(tokens)[0]

    # Token 0, then every 4th; the rest stands at the lower median of 1, 2, 3, 5, 6, 7, 9, 10, 11.
    assert result.positions.tolist() == [0, 4, 6, 8]


def test_where_every_token_is_kept_nothing_is_left_to_stand_for():
    # One outlier of five: a step of 5 // 3 = 1, that is positions 0 to 3, and the outlier.
    tokens = make_tokens(NEEDS, batch=1, grid=(1, 5))
    attention = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]])
    tokens = dataclasses.replace(
        tokens, signals={**tokens.signals, "last_cls_attention": attention}
    )

    result = carve(tokens)[0]

    assert result.positions.tolist() == [0, 1, 2, 3, 4]
    assert result.sizes.eq(1).all()


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_step_below_one_is_one(num_tokens):
    tokens = make_tokens(NEEDS, batch=1, grid=(1, num_tokens))

    result = carve(tokens)[0]

    assert result.positions.tolist() == list(range(num_tokens))
    assert result.sizes.sum() == num_tokens


@pytest.mark.parametrize(
    ("grid", "keep"),
    [
        pytest.param((24, 24), 64, marks=pytest.mark.slow),
        ((16, 16), 64),
        ((12, 12), 31),
        ((5, 7), 10),
    ],
)
def test_a_budget_is_half_spent_by_attention_and_half_evenly(grid, keep):
    tokens = peaked(grid, 1.0)
    num_tokens = grid[0] * grid[1]
    num_best = (keep - 1) // 2
    step = int(1 / (num_best / num_tokens))

    results = carve(tokens, keep_tokens=keep)

    for image, result in enumerate(results):
        attention = tokens.signals["last_cls_attention"][image]
        order = attention.argsort(descending=True, stable=True).tolist()
        spaced = [i for i in range(step // 2, num_tokens - 1, step) if i not in order[:num_best]]
        spaced.sort(key=lambda i: -attention[i])
        others = [i for i in order[num_best:] if i not in spaced]
        kept = (order[:num_best] + spaced + others)[: keep - 1]
        features, rest = merged(tokens, image, kept)
        in_order = result.ranks.argsort()
        assert len(result.positions) == keep
        assert result.positions[in_order][:-1].tolist() == kept
        expected = torch.cat([features, rest[None]])
        assert_close(result.features[in_order], expected, rtol=1e-5, atol=1e-5)
        assert result.sizes.sum() == num_tokens


def test_a_budget_of_one_is_the_sum_of_all_tokens_by_attention():
    tokens = peaked((4, 5), 1.0, batch=1)

    result = carve(tokens, keep_tokens=1)[0]

    expected = tokens.signals["last_cls_attention"][0] @ tokens.features[0]
    assert_close(result.features[0], expected)
    assert result.positions.tolist() == [9]
    assert result.sizes.tolist() == [20]


def test_sums_of_half_precision_features_are_made_in_float32():
    tokens = peaked((12, 12), 1.0, batch=1)
    half = dataclasses.replace(tokens, features=tokens.features.half())
    full = dataclasses.replace(tokens, features=tokens.features.half().float())

    result, expected = carve(half)[0], carve(full)[0]

    assert torch.equal(result.features, expected.features.half())
