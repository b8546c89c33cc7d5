import itertools
import math

import numpy as np
import pytest
import torch

from pipeline import carvers
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens

SIGNAL = "projector_sensitivity"


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("cenprune", options).carve(tokens)


def picks(result: CarvedTokens) -> list[int]:
    """Positions in the order of picking."""
    return result.positions[result.ranks.argsort()].tolist()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def weights_of(rows: np.ndarray, weighting: str) -> np.ndarray:
    """Distinctiveness by all pairs, then as a weight."""
    everyone = range(len(rows))
    distinct = np.array(
        [-np.mean([cosine(rows[i], rows[j]) for j in everyone if j != i]) for i in everyone]
    )
    if weighting == "minmax":
        return (distinct - distinct.min()) / (distinct.max() - distinct.min())
    return 1 / (1 + np.exp(-(distinct - distinct.mean()) / (distinct.std() + 1e-6)))


def literal(features: torch.Tensor, sensitivity: torch.Tensor, keep: int, **options) -> list[int]:
    """All three rules, token by token in float64."""
    rows = features.double().numpy()
    if options["standardise"]:
        rows = rows / np.sqrt(rows.var(axis=0) + 1e-6)
    weights = weights_of(rows, options["weighting"])
    centred = rows - rows.mean(axis=0)
    everyone = range(len(rows))
    similarity = np.array([[cosine(centred[i], centred[j]) for j in everyone] for i in everyone])
    kept: list[int] = []
    if options["rule"] == "dpp":
        kernel = similarity * np.outer(weights, weights)
        while len(kept) < keep:
            rest = [i for i in everyone if i not in kept]
            sets = [[*kept, i] for i in rest]
            volumes = [np.linalg.det(kernel[np.ix_(s, s)]) for s in sets]
            kept.append(rest[int(np.argmax(volumes))])
        return kept
    if options["rule"] == "zoo_prune":
        values = sensitivity.double().numpy()
        weights = weights * (values - values.min()) / (values.max() - values.min())
        kept.append(int(weights.argmax()))
    else:
        nearest = [min(1 - similarity[i, j] for j in everyone if j != i) for i in everyone]
        kept.append(int(np.argmax(nearest)))
    while len(kept) < keep:
        gains = [
            -math.inf if i in kept else weights[i] * min(1 - similarity[i, j] for j in kept)
            for i in everyone
        ]
        kept.append(int(np.argmax(gains)))
    return kept


def skewed(grid: tuple[int, int], width: int, seed: int) -> VisualTokens:
    """Tokens with a mean that all share, and dimensions of very different spread."""
    tokens = make_tokens([SIGNAL], grid=grid, width=width, seed=seed)
    features = tokens.features * torch.logspace(-1, 1, width) + torch.linspace(-2, 3, width)
    return VisualTokens(features=features, grid=grid, signals=tokens.signals)


@pytest.mark.parametrize(("grid", "width", "keep"), [((3, 5), 20, 6), ((7, 2), 9, 7)])
@pytest.mark.parametrize(
    ("rule", "weighting", "standardise"),
    list(itertools.product(["divprune", "zoo_prune", "dpp"], ["minmax", "sigmoid"], [False, True])),
)
def test_it_equals_the_rules_written_out(rule, weighting, standardise, grid, width, keep):
    tokens = skewed(grid, width, seed=3)
    options = {"rule": rule, "weighting": weighting, "standardise": standardise}

    results = carve(tokens, keep_tokens=keep, **options)

    for image, result in enumerate(results):
        sensitivity = tokens.signals[SIGNAL][image]
        assert picks(result) == literal(tokens.features[image], sensitivity, keep, **options)


def test_the_defaults_are_the_form_for_llava():
    carver = carvers.build("cenprune")

    assert (carver.rule, carver.weighting, carver.standardise) == ("divprune", "minmax", False)
    assert carver.needs == frozenset()
    assert carvers.build("cenprune", {"rule": "zoo_prune"}).needs == {SIGNAL}


def test_a_mean_that_all_tokens_share_does_not_hide_their_differences():
    directions = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    twins = directions.repeat_interleave(2, dim=0)
    features = (twins + 40)[None]  # cosines before centring are all above 0.99

    result = carve(VisualTokens(features=features, grid=(6, 10)), keep_tokens=25)[0]

    assert len({position // 2 for position in picks(result)}) == 25


def test_the_first_token_of_divprune_is_the_most_isolated_whatever_its_weight():
    tokens = skewed((5, 7), 40, seed=1)
    centred = tokens.features - tokens.features.mean(dim=1, keepdim=True)

    plain = carvers.build("divprune", {"keep_tokens": 1})
    expected = plain.carve(VisualTokens(features=centred, grid=(5, 7)))

    for left, right in zip(carve(tokens, keep_tokens=1), expected, strict=True):
        assert picks(left) == picks(right)


def test_the_least_distinct_token_is_picked_last_with_minmax():
    tokens = skewed((3, 5), 20, seed=4)
    distinct = weights_of(tokens.features[0].double().numpy(), "minmax")

    order = picks(carve(tokens, keep_tokens=14)[0])

    assert int(distinct.argmin()) not in order


def test_standardising_makes_the_scale_of_a_dimension_irrelevant():
    tokens = make_tokens([], seed=2)
    scaled = VisualTokens(
        features=tokens.features * torch.tensor([1.0, 512.0]).repeat(20), grid=tokens.grid
    )

    def kept(source: VisualTokens, standardise: bool) -> list[list[int]]:
        return [picks(r) for r in carve(source, standardise=standardise)]

    assert kept(tokens, True) == kept(scaled, True)
    assert kept(tokens, False) != kept(scaled, False)


def test_every_frame_has_its_own_mean_and_an_equal_share():
    frames = [skewed((3, 4), 20, seed=s).features[:1] + 10 * s for s in range(3)]
    clip = VisualTokens(features=torch.cat(frames, dim=1), grid=(3, 4), num_views=3)

    result = carve(clip, keep_tokens=12)[0]

    for view, frame in enumerate(frames):
        alone = carve(VisualTokens(features=frame, grid=(3, 4)), keep_tokens=4)[0]
        assert [p - view * 12 for p in picks(result) if p // 12 == view] == picks(alone)


@pytest.mark.parametrize("weighting", ["minmax", "sigmoid"])
@pytest.mark.parametrize("fill", [0.0, 0.1, -3.0])
def test_an_image_of_one_colour_keeps_its_first_tokens(weighting, fill):
    tokens = VisualTokens(features=torch.full((1, 30, 33), fill), grid=(5, 6))

    result = carve(tokens, weighting=weighting, keep_tokens=7)[0]

    assert result.positions.tolist() == list(range(7))


@pytest.mark.parametrize("width", [3, 8])
def test_dpp_goes_on_where_the_kernel_has_no_further_rank(width):
    tokens = make_tokens([], grid=(6, 10), width=width)

    for result in carve(tokens, rule="dpp", keep_tokens=40):
        assert len(set(picks(result))) == 40
