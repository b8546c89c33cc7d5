"""Means with intervals: against literal loops, and against what is known of a distribution."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.evaluation.statistics import Bootstrap, row_spearman


def ranks(values: list[float]) -> list[float]:
    """Return mean ranks by counting."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def pearson(x: list[float], y: list[float]) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def drawn(weights_I: NDArray) -> list[int]:
    """Return which images a resample holds, each as often as it was drawn."""
    return [i for i, w in enumerate(weights_I) for _ in range(int(w))]


def test_means_and_intervals_equal_a_loop_over_resamples_and_questions() -> None:
    generator = np.random.default_rng(0)
    questions = [generator.normal(size=int(n)).tolist() for n in generator.integers(1, 5, size=12)]
    bootstrap = Bootstrap(num_images=12, resamples=300, seed=3)

    (found,) = bootstrap.means(
        np.array([[sum(own)] for own in questions]),
        np.array([[float(len(own))] for own in questions]),
    )

    means = []
    for weights_I in bootstrap.weights:
        values = [value for i in drawn(weights_I) for value in questions[i]]
        means.append(sum(values) / len(values))
    everything = [value for own in questions for value in own]
    assert found.mean == pytest.approx(sum(everything) / len(everything))
    assert found.low == pytest.approx(np.quantile(means, 0.025))
    assert found.high == pytest.approx(np.quantile(means, 0.975))
    assert found.images == 12


def test_resamples_draw_as_many_images_as_there_are_and_depend_on_the_seed_alone() -> None:
    first, same, other = (Bootstrap(num_images=9, resamples=100, seed=s).weights for s in (1, 1, 2))

    assert (first.sum(axis=1) == 9).all()
    assert (first == same).all()
    assert not (first == other).all()
    assert first.mean(axis=0) == pytest.approx(np.ones(9), abs=0.5)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(5)
    # 4 questions an image, right together more often than apart: images differ in difficulty.
    hits = 0
    for trial in range(300):
        difficulty_I1 = generator.beta(2, 2, size=(80, 1))
        right_I4 = generator.uniform(size=(80, 4)) < difficulty_I1
        (found,) = Bootstrap(num_images=80, resamples=400, seed=trial).means(
            right_I4.sum(axis=1, keepdims=True).astype(float), np.full((80, 1), 4.0)
        )
        hits += found.low <= 0.5 <= found.high

    # 285 expected; below 270 or above 296 once in a thousand times each.
    assert 270 <= hits <= 296


def test_resampling_questions_as_if_they_were_images_would_be_too_sure() -> None:
    generator = np.random.default_rng(6)
    right_I4 = np.repeat(generator.integers(0, 2, size=(60, 1)), 4, axis=1).astype(float)

    (by_image,) = Bootstrap(num_images=60, resamples=2000, seed=0).means(
        right_I4.sum(axis=1, keepdims=True), np.full((60, 1), 4.0)
    )
    (by_question,) = Bootstrap(num_images=240, resamples=2000, seed=0).means(
        right_I4.reshape(-1, 1), np.ones((240, 1))
    )

    ratio = (by_image.high - by_image.low) / (by_question.high - by_question.low)
    assert ratio == pytest.approx(2.0, rel=0.15)


def test_differences_are_paired() -> None:
    generator = np.random.default_rng(7)
    full_I1 = generator.normal(scale=10.0, size=(100, 1))
    carved_I1 = full_I1 - 0.5 + generator.normal(scale=0.1, size=(100, 1))
    ones_I1 = np.ones((100, 1))

    bootstrap = Bootstrap(num_images=100, resamples=1000, seed=0)
    (carved,) = bootstrap.means(carved_I1, ones_I1)
    (difference,) = bootstrap.means(carved_I1 - full_I1, ones_I1)

    assert -0.6 < difference.low < difference.mean < difference.high < -0.4
    assert carved.high - carved.low > 20 * (difference.high - difference.low)


def test_the_mean_over_families_weighs_families_alike() -> None:
    # 30 easy questions and 3 hard ones on each image.
    sums_IFC = np.array([[[30.0], [0.0]], [[30.0], [3.0]]])
    counts_IFC = np.array([[[30.0], [3.0]], [[30.0], [3.0]]])

    (found,) = Bootstrap(num_images=2, resamples=500, seed=0).family_means(sums_IFC, counts_IFC)

    assert found.mean == pytest.approx((1.0 + 0.5) / 2)
    assert (found.low, found.high) == (0.5, 1.0)


def test_an_empty_family_is_left_out_of_the_mean_over_families() -> None:
    sums_IFC = np.array([[[1.0], [0.0]], [[0.0], [0.0]]])
    counts_IFC = np.array([[[1.0], [0.0]], [[1.0], [0.0]]])

    (found,) = Bootstrap(num_images=2, resamples=100, seed=0).family_means(sums_IFC, counts_IFC)

    assert found.mean == 0.5


@pytest.mark.parametrize("counts", [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
def test_less_than_two_images_give_no_interval(counts: list[float]) -> None:
    counts_I1 = np.array(counts)[:, None]

    (found,) = Bootstrap(num_images=3, resamples=100, seed=0).means(counts_I1, counts_I1)

    assert np.isnan([found.low, found.high]).all()
    assert np.isnan(found.mean) == (sum(counts) == 0)


tied = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12).filter(
    lambda pairs: len({x for x, _ in pairs}) > 1 and len({y for _, y in pairs}) > 1
)


@given(tied)
@settings(max_examples=50, deadline=None)
def test_rank_correlations_and_their_intervals_equal_a_literal_computation(
    pairs: list[tuple[int, int]],
) -> None:
    x, y = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    bootstrap = Bootstrap(num_images=len(pairs), resamples=100, seed=1)

    found = bootstrap.spearman(np.array(x), np.array(y))

    samples = []
    for weights_I in bootstrap.weights:
        some_x, some_y = ([values[i] for i in drawn(weights_I)] for values in (x, y))
        if len(set(some_x)) > 1 and len(set(some_y)) > 1:
            samples.append(pearson(ranks(some_x), ranks(some_y)))
    assert found.mean == pytest.approx(pearson(ranks(x), ranks(y)), abs=1e-9)
    assert found.low == pytest.approx(np.quantile(samples, 0.025), abs=1e-9)
    assert found.high == pytest.approx(np.quantile(samples, 0.975), abs=1e-9)
    by_rows = row_spearman(np.array([x, x]), np.array([y, x]))
    assert by_rows == pytest.approx([found.mean, 1.0])


def test_a_constant_has_no_rank_correlation_and_unknown_images_are_left_out() -> None:
    bootstrap = Bootstrap(num_images=5, resamples=100, seed=0)
    rising = np.array([1.0, 2.0, 3.0, 4.0, np.nan])

    constant = bootstrap.spearman(np.ones(5), rising)
    known = bootstrap.spearman(rising, rising)
    nothing = bootstrap.spearman(np.full(5, np.nan), rising)

    assert np.isnan(constant.mean) and np.isnan(nothing.mean)
    assert known.mean == pytest.approx(1.0) and known.images == 4
