"""Budgets by effective rank: the rule, its mean over a sample, and both ways of carving."""

import dataclasses
import json

import pytest
import torch

from pipeline import carvers
from pipeline.carvers._rank import effective_rank
from pipeline.carvers.adaptive import Adaptive
from pipeline.errors import ConfigError, NonFiniteError
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_signals

NESTED = {"carver": "uniform_grid"}
MERGING = {"carver": "tokencarve", "options": {"attention_weight": 0.25}}
NEEDS = ["attention_output", "cls_attention"]


def build(**options: object) -> Adaptive:
    return carvers.build("adaptive", options)


def images_of_ranks(*ranks: int, grid: tuple[int, int] = (8, 8), seed: int = 0) -> VisualTokens:
    """Return images whose tokens lie in spaces of these dimensions, about a common mean."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = grid[0] * grid[1]
    rows = [
        3.0
        + torch.randn(num_tokens, rank, generator=generator)
        @ torch.randn(rank, 64, generator=generator)
        for rank in ranks
    ]
    return VisualTokens(
        features=torch.stack(rows),
        grid=grid,
        signals=make_signals(NEEDS, len(ranks), num_tokens, seed),
    )


def counts(results: list[CarvedTokens]) -> list[int]:
    return [len(result.positions) for result in results]


def assert_same(left: CarvedTokens, right: CarvedTokens) -> None:
    for field in dataclasses.fields(CarvedTokens):
        assert torch.equal(getattr(left, field.name), getattr(right, field.name)), field.name


@pytest.mark.parametrize("wrapped", [NESTED, MERGING])
def test_a_budget_is_in_proportion_to_the_rank_and_within_its_bounds(wrapped):
    tokens = images_of_ranks(1, 5, 10, 14, 30)
    ranks = effective_rank(tokens.features).tolist()

    results = build(**wrapped, mean_tokens=10, mean_rank=10.0).carve(tokens)

    assert ranks[0] < 1.1 and ranks[4] > 20.5
    middle = [round(10 * rank / 10.0) for rank in ranks[1:4]]
    assert counts(results) == [5, max(5, middle[0]), *middle[1:], 20]
    assert 5 < middle[1] < middle[2] < 20


@pytest.mark.parametrize("wrapped", [NESTED, MERGING])
def test_each_image_is_carved_as_the_wrapped_carver_does_with_that_budget(wrapped):
    tokens = images_of_ranks(2, 25, 9, 8, 25)

    results = build(**wrapped, mean_ratio=0.25, mean_rank=12.0).carve(tokens)

    assert len(set(counts(results))) >= 3
    for image, result in enumerate(results):
        options = {**wrapped.get("options", {}), "keep_tokens": len(result.positions)}
        expected = carvers.build(wrapped["carver"], options).carve(tokens)[image]
        assert_same(result, expected)


@pytest.mark.parametrize("wrapped", [NESTED, MERGING])
@pytest.mark.parametrize("bounds", [(0.5, 2.0), (0.9, 1.1), (0.05, 6.0)])
def test_calibrated_it_keeps_the_mean_budget_on_the_sample(wrapped, bounds):
    sample = [
        images_of_ranks(1, 2, 4, 30, 40, 3, 2, seed=1),
        images_of_ranks(3, 5, 8, 13, 21, grid=(6, 9), seed=2),
    ]
    carver = build(**wrapped, mean_tokens=12, min_ratio=bounds[0], max_ratio=bounds[1])

    calibrated = carver.calibrated(iter(sample))

    kept = [k for tokens in sample for k in counts(calibrated.carve(tokens))]
    assert sum(kept) / len(kept) == pytest.approx(12, abs=0.1)
    assert len(set(kept)) > 1
    assert calibrated == dataclasses.replace(carver, mean_rank=calibrated.mean_rank)
    assert calibrated.calibrated(sample) == calibrated
    assert carvers.build("adaptive", dataclasses.asdict(calibrated)) == calibrated


def test_a_budget_given_as_a_share_counts_for_images_of_any_size():
    sample = [images_of_ranks(2, 6, 20), images_of_ranks(3, 9, 20, grid=(4, 8))]

    calibrated = build(**NESTED, mean_ratio=0.25).calibrated(sample)

    kept = [sum(counts(calibrated.carve(tokens))) for tokens in sample]
    assert sum(kept) == pytest.approx(3 * 16 + 3 * 8, abs=1)


def test_no_image_gets_more_tokens_than_it_has():
    tokens = images_of_ranks(1, 3, 40)

    results = build(**NESTED, mean_tokens=50, mean_rank=2.0, max_ratio=4.0).carve(tokens)

    assert counts(results)[2] == 64


def test_until_it_is_calibrated_every_image_gets_the_mean_budget():
    tokens = images_of_ranks(1, 10, 40)

    for wrapped in (NESTED, MERGING):
        assert counts(build(**wrapped, mean_tokens=7).carve(tokens)) == [7, 7, 7]


def test_it_needs_ranks_and_merges_as_the_wrapped_carver_does():
    greedy, pooling = build(**NESTED), build(carver="average_pool")
    without_attention = build(carver="tokencarve", options={"attention_weight": 0.0})

    assert (greedy.nested, greedy.conserves, greedy.needs) == (True, False, frozenset())
    assert (pooling.nested, pooling.conserves) == (False, True)
    assert without_attention.needs == {"attention_output"}


def test_it_describes_all_that_decides_in_the_wrapped_carver():
    short = build(carver="tokencarve")
    long = build(carver="tokencarve", options={"attention_weight": 0.5, "solver": "exact"})
    other = build(carver="tokencarve", options={"attention_weight": 0.25})

    assert short.describe() == long.describe() != other.describe()
    assert short.describe()["options"]["information"] == "attention_output"
    assert json.loads(json.dumps(short.describe())) == short.describe()


def test_calibration_refuses_an_empty_sample_and_values_that_are_not_finite():
    broken = images_of_ranks(2, 3)
    broken.features[1, 3] = torch.nan

    with pytest.raises(ConfigError, match="without images"):
        build().calibrated([])
    with pytest.raises(NonFiniteError, match=r"image \[1\]"):
        build().calibrated([broken])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"carver": "identity"}, "no budget to adapt"),
        ({"carver": "adaptive"}, "no budget to adapt"),
        ({"carver": "uniform_gird"}, "did you mean 'uniform_grid'"),
        ({"options": {"keep_tokens": 4}}, "mean_tokens or mean_ratio instead"),
        ({"options": {"attention_weigth": 0.5}}, "did you mean 'attention_weight'"),
        ({"mean_tokens": 4, "mean_ratio": 0.5}, "exactly one"),
        ({"mean_tokens": 0}, "mean_tokens"),
        ({"min_ratio": 1.5}, "min_ratio"),
        ({"max_ratio": 0.5}, "max_ratio"),
        ({"mean_rank": 0.0}, "mean_rank"),
    ],
)
def test_a_wrong_option_is_rejected(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)
