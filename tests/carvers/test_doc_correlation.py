"""Redundancy of early keys against a literal loop, hand-made images, and the calibrated count."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pipeline import carvers
from pipeline.carvers.doc_correlation import DocCorrelation
from pipeline.errors import ConfigError, NonFiniteError
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens

NEEDS = ["shallow_keys", "shallow_attention", "cls_attention"]


def build(**options: object) -> DocCorrelation:
    return carvers.build("doc_correlation", options)


def clustered(
    *, batch: int = 2, grid: tuple[int, int] = (6, 7), width: int = 12, seed: int = 0
) -> VisualTokens:
    """Return tokens whose keys lie around few directions, some crowded, and peaked scores."""
    tokens = make_tokens(NEEDS, batch=batch, grid=grid, width=width, seed=seed)
    generator = torch.Generator().manual_seed(seed + 7)
    num_tokens = tokens.features.shape[1]
    centres = torch.randn(batch, 6, 7, generator=generator)
    members = torch.randint(0, 6, (batch, num_tokens), generator=generator).square() // 6
    keys = centres.gather(1, members[:, :, None].expand(-1, -1, 7))
    keys = keys + 0.3 * torch.randn(keys.shape, generator=generator)
    return dataclasses.replace(
        tokens,
        signals={
            "shallow_keys": keys,
            "shallow_attention": tokens.signals["shallow_attention"] ** 2,
            "cls_attention": tokens.signals["cls_attention"] ** 6,
        },
    )


def literally(tokens: VisualTokens, image: int, epsilon: float, max_similar: int) -> tuple:
    """Return kept positions best first, their features and sizes, token by token."""
    features = tokens.features[image].double().numpy()
    keys = tokens.signals["shallow_keys"][image].double().numpy()
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    early = tokens.signals["shallow_attention"][image].tolist()
    deep = tokens.signals["cls_attention"][image].double().numpy()
    n = len(features)
    cosine = [[float(keys[i] @ keys[j]) for j in range(n)] for i in range(n)]
    redundant = sum(
        sum(cosine[i][j] > epsilon for j in range(n) if j != i) > max_similar for i in range(n)
    )
    density = 1 - redundant / n
    num_local = max(1, math.ceil(density * n - 1e-9))
    local = sorted(range(n), key=lambda i: (-early[i], i))[:num_local]
    low, high = np.percentile(deep, [25, 75])
    outliers = [i for i in range(n) if deep[i] > high + 1.5 * (high - low)]
    outliers.sort(key=lambda i: (-deep[i], i))
    kept = [*outliers, *(i for i in local if i not in outliers)]
    clusters: dict[int, list[tuple[float, int]]] = {i: [(1.0, i)] for i in kept}
    for i in range(n):
        if i not in clusters:
            owner = max(kept, key=lambda j: (cosine[i][j], -j))
            clusters[owner].append((max(cosine[i][owner], 0.0), i))
    merged = [
        sum(w * features[i] for w, i in clusters[k]) / sum(w for w, _ in clusters[k]) for k in kept
    ]
    return kept, np.stack(merged), [len(clusters[k]) for k in kept]


def best_first(result: CarvedTokens) -> tuple[list[int], torch.Tensor, list[float]]:
    order = result.ranks.argsort()
    return result.positions[order].tolist(), result.features[order], result.sizes[order].tolist()


@pytest.mark.parametrize(("epsilon", "max_similar"), [(0.9, 4), (0.5, 2), (0.95, 0), (-0.5, 3)])
@pytest.mark.parametrize(("grid", "width"), [((6, 7), 12), ((3, 9), 40), ((1, 20), 5)])
def test_it_equals_the_text_token_by_token(epsilon, max_similar, grid, width):
    tokens = clustered(grid=grid, width=width)

    results = build(epsilon=epsilon, max_similar=max_similar).carve(tokens)

    for image, result in enumerate(results):
        positions, features, sizes = best_first(result)
        kept, merged, counts = literally(tokens, image, epsilon, max_similar)
        assert positions == kept
        assert sizes == counts
        assert_close(features.double(), torch.from_numpy(merged), rtol=1e-4, atol=1e-5)


def test_a_page_with_a_white_margin_keeps_what_is_not_margin():
    # Twelve equal keys, four of their own: 4 of 16 are not redundant, so 4 are chosen by attention.
    keys = torch.zeros(1, 16, 5)
    keys[:, :12, 0] = 1
    keys[0, 12:, 1:] = torch.eye(4)
    early = torch.tensor([[0.01] * 12 + [0.1, 0.2, 0.3, 0.05]])
    features = torch.arange(16.0)[None, :, None].expand(1, 16, 3).contiguous()
    tokens = VisualTokens(
        features=features,
        grid=(4, 4),
        signals={
            "shallow_keys": keys,
            "shallow_attention": early,
            "cls_attention": torch.full((1, 16), 0.5),
        },
    )

    result = build(max_similar=4).carve(tokens)[0]

    assert result.positions.tolist() == [12, 13, 14, 15]
    assert result.ranks.tolist() == [2, 1, 0, 3]
    # The margin is like none of them: it is counted with the lowest, and weighs nothing.
    assert result.sizes.tolist() == [13.0, 1.0, 1.0, 1.0]
    assert torch.equal(result.features, features[0, 12:])


def test_an_outlier_of_the_deep_attention_stays_whatever_the_early_one_says():
    tokens = clustered(batch=1)
    tokens.signals["cls_attention"][0] = 0.01
    tokens.signals["cls_attention"][0, 5] = 1.0
    tokens.signals["shallow_attention"][0, 5] = 0.0

    result = build(epsilon=-1.0, max_similar=0).carve(tokens)[0]

    # All are redundant, and yet one is chosen by early attention.
    assert len(result.positions) == 2
    assert result.ranks[result.positions == 5].item() == 0


def test_attention_received_can_take_the_place_of_the_class_tokens():
    carver = build(global_attention="received_attention")

    assert carver.needs == {"shallow_keys", "shallow_attention", "received_attention"}


@pytest.mark.parametrize("target", [0.2, 0.34, 0.6])
def test_calibration_makes_the_sample_keep_the_target_on_average(target):
    sample = [
        clustered(batch=5, grid=(8, 8), seed=1),
        clustered(batch=3, grid=(7, 10), seed=2),
    ]
    carver = build(target_ratio=target)

    calibrated = carver.calibrated(iter(sample))

    shares = [
        len(result.positions) / tokens.features.shape[1]
        for tokens in sample
        for result in calibrated.carve(tokens)
    ]
    assert sum(shares) / len(shares) == pytest.approx(target, abs=0.01)
    assert calibrated == dataclasses.replace(carver, epsilon=calibrated.epsilon)
    assert calibrated.calibrated(sample) == calibrated
    assert carvers.build("doc_correlation", dataclasses.asdict(calibrated)) == calibrated


def test_calibration_goes_as_near_as_it_can_where_the_target_is_out_of_reach():
    # Orthogonal keys: no token is redundant at an epsilon of 0 or more.
    tokens = clustered(batch=1, grid=(1, 7))
    tokens.signals["shallow_keys"][0] = torch.eye(7)

    calibrated = build(target_ratio=0.9).calibrated([tokens])

    assert len(calibrated.carve(tokens)[0].positions) == 7


def test_calibration_refuses_an_empty_sample_and_values_that_are_not_finite():
    broken = clustered(batch=2)
    broken.signals["shallow_keys"][1, 3, 2] = torch.nan

    with pytest.raises(ConfigError, match="without images"):
        build().calibrated([])
    with pytest.raises(NonFiniteError, match=r"shallow_keys of image \[1\]"):
        build().calibrated([broken])


@pytest.mark.parametrize(
    "options",
    [{"epsilon": 1.1}, {"max_similar": -1}, {"target_ratio": 0.0}, {"keep_tokens": 4}],
)
def test_a_wrong_option_is_rejected(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(**options)
