import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from threadpoolctl import threadpool_info
from torch.testing import assert_close

from pipeline import carvers
from pipeline.carvers._information import contributions, contributions_batched
from pipeline.carvers._subspace import contributions_from_subspace
from pipeline.errors import ConfigError, MissingSignalError, NonFiniteError
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "tokencarve"
CASES = json.loads((GOLDEN / "cases.json").read_text())
WEIGHTS = {"information": 0.0, "attention": 1.0}
NEEDS = ["attention_output", "cls_attention"]


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("tokencarve", options).carve(tokens)


def golden(case: dict) -> tuple[dict[str, torch.Tensor], VisualTokens, dict[str, object]]:
    """Return the stored tensors of a case, and the same case in our words."""
    stored = load_file(GOLDEN / f"{case['name']}.safetensors")
    tokens = VisualTokens(
        features=stored["hidden_states"][None],
        grid=(1, case["num_tokens"]),
        signals={"llm_attention": stored["attention_last_query"].mean(dim=0)[None]},
    )
    options = {
        "information": "features",
        "attention": "llm_attention",
        "attention_weight": WEIGHTS.get(case["mode"], case["attention_weight"]),
        "keep_tokens": case["keep_tokens"],
    }
    return stored, tokens, options


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_it_equals_the_published_code(case):
    stored, tokens, options = golden(case)

    result = carve(tokens, **options)[0]

    assert torch.equal(result.positions, stored["positions"].long())
    assert_close(result.features, stored["features"], rtol=1e-4, atol=1e-5)
    merged = torch.bincount(stored["merge_target"], minlength=case["num_tokens"])
    assert torch.equal(result.sizes, 1 + merged[result.positions].float())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_contributions_equal_those_of_the_published_code(case):
    stored, tokens, _ = golden(case)

    for compute in (contributions, contributions_batched):
        scores = compute(tokens.features)[0]
        assert_close(scores, stored["contributions"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES[:6], ids=lambda case: case["name"])
def test_a_batch_of_the_published_cases_gives_each_of_them(case):
    stored, tokens, options = golden(case)
    noise = make_tokens(["llm_attention"], batch=2, grid=tokens.grid, width=case["width"])
    batch = VisualTokens(
        features=torch.cat([noise.features, tokens.features]),
        grid=tokens.grid,
        signals={
            "llm_attention": torch.cat(
                [noise.signals["llm_attention"], tokens.signals["llm_attention"]]
            )
        },
    )

    result = carve(batch, **options)[2]

    assert torch.equal(result.positions, stored["positions"].long())


def test_a_hand_made_image_is_pruned_and_merged():
    # Orthogonal rows: the singular values are the row norms, so a token's contribution is its
    # norm, except for token 5, which is parallel to token 1. Singular directions are the axes.
    rows = torch.zeros(1, 6, 8)
    rows[0, 0, 0] = 7.0
    rows[0, 1, 1] = 9.0
    rows[0, 2, 2] = 2.0
    rows[0, 3, 3] = 5.0
    rows[0, 4, 4] = 3.0
    rows[0, 5, 1] = 4.0
    tokens = VisualTokens(features=rows, grid=(2, 3))

    # K = 4: the best 6 stay in stage one; 1, 0, 3 are targets; 5, 4, 2 may merge; 2 of them do.
    # Token 5 goes into 1 (cosine 1); then 2 and 4 tie at cosine 0 with every target: the lower
    # position, 2, goes into the lowest target, 0. Token 4 stays.
    result = carve(tokens, information="features", attention_weight=0.0, keep_tokens=4)[0]

    assert result.positions.tolist() == [0, 1, 3, 4]
    assert result.ranks.tolist() == [1, 0, 2, 3]
    assert result.sizes.tolist() == [2.0, 2.0, 1.0, 1.0]
    assert result.features[0].tolist() == [3.5, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert result.features[1].tolist() == [0.0, 6.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert torch.equal(result.features[2:], rows[0, [3, 4]])


def test_rankings_are_blended_and_not_scores():
    tokens = VisualTokens(
        features=torch.diag(torch.tensor([1.0, 1000.0, 2.0, 3.0]))[None],
        grid=(2, 2),
        signals={"cls_attention": torch.tensor([[0.1, 0.2, 0.4, 0.3]])},
    )

    # Points by contribution 1 4 2 3, by attention 1 2 4 3: the sums are 2 6 6 6.
    result = carve(tokens, information="features", keep_tokens=1)[0]
    weighted = carve(tokens, information="features", keep_tokens=1, attention_weight=0.6)[0]

    assert result.positions.tolist() == [1]
    assert weighted.positions.tolist() == [2]


@pytest.mark.parametrize("weight", [0.1, 0.2, 0.3, 0.6, 0.7, 0.9])
def test_equal_blends_are_ties_for_every_weight(weight):
    # Swapping the rankings of two tokens whose points differ by (1 - w) and w in units of 0.1
    # gives equal sums that float64 computes differently.
    tenths = round(weight * 10)
    num_tokens = 12
    information = torch.arange(num_tokens, 0, -1.0)
    attention = torch.arange(num_tokens, 0, -1.0)
    low, high = 0, 10 - tenths
    attention[low], attention[high] = 0.0, 100.0
    blended = {
        i: tenths * sorted(attention.tolist()).index(attention[i])
        + (10 - tenths) * sorted(information.tolist()).index(information[i])
        for i in range(num_tokens)
    }
    expected = sorted(blended, key=lambda i: (-blended[i], i))
    tokens = VisualTokens(
        features=torch.diag(information)[None],
        grid=(3, 4),
        signals={"cls_attention": attention[None]},
    )

    result = carve(tokens, information="features", keep_tokens=num_tokens, attention_weight=weight)[
        0
    ]

    assert result.positions[result.ranks.argsort()].tolist() == expected


@pytest.mark.parametrize(("num_tokens", "width"), [(6, 9), (9, 6), (40, 40), (50, 7), (7, 50)])
def test_contributions_equal_their_definition_for_any_shape(num_tokens, width):
    matrix = make_tokens([], grid=(1, num_tokens), width=width).features
    left, singular, _ = torch.linalg.svd(matrix.double(), full_matrices=False)

    scores = contributions(matrix), contributions_batched(matrix)

    expected = (left * singular[:, None, :]).abs().sum(dim=2).float()
    assert_close(scores, (expected, expected), rtol=1e-5, atol=1e-5)


@pytest.fixture
def threads():
    """Sets the number of threads that torch may use."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(5, 96, 200), (5, 96, 40)])
def test_contributions_do_not_depend_on_batch_mates_threads_or_layout(threads, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    transposed = matrix.mT.contiguous().mT
    threads(1)
    alone = torch.cat([contributions(matrix[i : i + 1]) for i in range(len(matrix))])
    threads(3)

    assert torch.equal(contributions(matrix), alone)
    assert torch.equal(contributions(transposed), alone)
    assert contributions(matrix[:0]).shape == (0, 96)


def test_contributions_of_many_callers_at_once_are_right_and_leave_the_blas_threads_alone(threads):
    matrix = torch.randn(3, 96, 200, generator=torch.Generator().manual_seed(1))
    threads(2)
    expected = contributions(matrix)
    before = threadpool_info()

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(contributions, [matrix] * 12))

    assert all(torch.equal(result, expected) for result in results)
    assert threadpool_info() == before


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("width", [12, 64])
def test_contributions_of_a_matrix_of_low_rank_hold_no_noise(rank, width):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(1, 32, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        1, rank, width, generator=generator, dtype=torch.float64
    )
    left, singular, _ = torch.linalg.svd(matrix, full_matrices=False)

    scores = contributions(matrix)

    expected = (left * singular[:, None, :])[:, :, :rank].abs().sum(dim=2).float()
    assert_close(scores, expected, rtol=1e-6, atol=1e-6)


def test_equal_tokens_have_equal_contributions():
    matrix = make_tokens([], batch=2, grid=(8, 8), width=96).features
    matrix[:, 40:] = matrix[:, 3:4]

    scores = contributions(matrix)

    assert torch.equal(scores[:, 40:], scores[:, 3:4].expand(2, 24))


def test_a_constant_image_keeps_the_lowest_positions():
    features = torch.full((1, 576, 32), 0.3)
    tokens = VisualTokens(features=features, grid=(24, 24))

    result = carve(tokens, information="features", attention_weight=0.0, keep_tokens=4)[0]

    # 0, 1, 2 are targets; of 3, 4, 5 the lower two are merged into the lowest target.
    assert result.positions.tolist() == [0, 1, 2, 5]
    assert result.sizes.tolist() == [3.0, 1.0, 1.0, 1.0]
    assert_close(result.features, features[0, :4])


def test_zero_tokens_are_similar_to_nothing():
    features = torch.eye(8)[None, :, :6]
    features[0, 4:] = 0.0
    features[0, 4] = features[0, 0] / 2
    tokens = VisualTokens(
        features=features,
        grid=(2, 4),
        signals={"cls_attention": torch.arange(8.0, 0.0, -1.0)[None]},
    )

    # 0, 1, 2 are targets; of 3, 4, 5 only 4 resembles one; then 3 and the zero token 5 tie at 0.
    result = carve(tokens, attention_weight=1.0, keep_tokens=4)[0]

    assert result.positions.tolist() == [0, 1, 2, 5]
    assert result.sizes.tolist() == [3.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("keep_tokens", range(1, 21))
def test_the_budget_is_met_exactly_and_pruned_tokens_are_not_counted(keep_tokens):
    tokens = make_tokens(["attention_output", "cls_attention"], grid=(4, 5))

    for result in carve(tokens, keep_tokens=keep_tokens):
        assert len(result.positions) == keep_tokens
        assert result.sizes.sum() == min(20, keep_tokens + keep_tokens // 2)


def test_what_is_not_merged_is_unchanged():
    tokens = make_tokens(["attention_output", "cls_attention"], batch=2, grid=(6, 6))

    for image, result in enumerate(carve(tokens, keep_tokens=15)):
        alone = result.sizes == 1
        assert 0 < alone.sum() < 15
        kept = tokens.features[image, result.positions]
        assert torch.equal(result.features[alone], kept[alone])
        assert not torch.isclose(result.features[~alone], kept[~alone]).all(dim=1).any()


def test_attention_alone_ranks_by_attention():
    tokens = make_tokens(["llm_attention"], batch=1, grid=(1, 12))

    result = carve(tokens, attention="llm_attention", attention_weight=1.0, keep_tokens=12)[0]

    by_attention = tokens.signals["llm_attention"][0].argsort(descending=True)
    assert torch.equal(result.positions[result.ranks.argsort()], by_attention)


def test_another_matrix_is_scored_while_the_features_are_merged():
    tokens = make_tokens(["llm_hidden"], batch=1, grid=(1, 12))
    scored = VisualTokens(features=tokens.signals["llm_hidden"], grid=tokens.grid)

    result = carve(tokens, information="llm_hidden", attention_weight=0.0, keep_tokens=12)[0]
    expected = carve(scored, information="features", attention_weight=0.0, keep_tokens=12)[0]

    assert torch.equal(result.ranks, expected.ranks)
    assert torch.equal(result.features, tokens.features[0])


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, {"attention_output", "cls_attention"}),
        ({"information": "llm_hidden"}, {"llm_hidden", "cls_attention"}),
        ({"attention": "received_attention"}, {"attention_output", "received_attention"}),
        ({"attention_weight": 0.0}, {"attention_output"}),
        ({"attention_weight": 1.0}, {"cls_attention"}),
        ({"information": "features"}, {"cls_attention"}),
        ({"information": "features", "attention_weight": 0.0}, set()),
    ],
)
def test_it_needs_only_signals_that_have_weight_and_works_with_just_those(options, needs):
    carver = carvers.build("tokencarve", options)

    results = carver.carve(make_tokens(needs))

    assert carver.needs == needs
    assert len(results) == 3


def test_scaling_the_features_changes_no_choice():
    tokens = make_tokens(["cls_attention"], grid=(8, 8))
    large = dataclasses.replace(tokens, features=tokens.features * 1e30)

    results = carve(tokens, information="features", keep_tokens=16)
    scaled = carve(large, information="features", keep_tokens=16)

    for left, right in zip(results, scaled, strict=True):
        assert torch.equal(left.positions, right.positions)


def test_images_beyond_one_chunk_are_scored_the_same(monkeypatch):
    matrix = make_tokens([], batch=5, grid=(4, 4), width=24).features
    expected = contributions(matrix)

    monkeypatch.setattr("pipeline.carvers._image_pool._CHUNK_BYTES", 2 * 8 * 16 * 24)

    assert torch.equal(contributions(matrix), expected)


def test_a_missing_signal_is_reported():
    with pytest.raises(MissingSignalError, match="cls_attention"):
        carve(make_tokens(["attention_output"]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_reported_with_their_image(value):
    tokens = make_tokens(["attention_output", "cls_attention"])
    tokens.signals["attention_output"][2, 0, 0] = value

    with pytest.raises(NonFiniteError, match=r"attention_output of image \[2\]"):
        carve(tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"information": "auto"},
        {"attention": "keys"},
        {"attention_weight": 1.1},
        {"attention_weight": -0.1},
        {"attention_weight": math.nan},
        {"solver": "svd"},
        {"subspace_rank": 0},
    ],
)
def test_a_wrong_option_is_rejected(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        carvers.build("tokencarve", options)


def decaying(
    decay: float, *, images: int = 2, num_tokens: int = 120, width: int = 160
) -> torch.Tensor:
    """Return matrices of singular values 1 / j^decay in random directions."""
    generator = torch.Generator().manual_seed(4)
    small = min(num_tokens, width)

    def directions(length: int) -> torch.Tensor:
        noise = torch.randn(images, length, small, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(noise).Q

    singular = torch.arange(1, small + 1, dtype=torch.float64) ** -decay
    return (directions(num_tokens) * singular) @ directions(width).mT


@pytest.mark.parametrize("shape", [(120, 160), (160, 120), (120, 120)])
@pytest.mark.parametrize(("decay", "tolerance"), [(0.5, 0.12), (1.0, 0.10), (2.0, 0.01)])
def test_the_subspace_solver_is_near_the_exact_scores(shape, decay, tolerance):
    matrix = decaying(decay, num_tokens=shape[0], width=shape[1])

    scores, exact = contributions_from_subspace(matrix, 24), contributions(matrix)

    error = (scores - exact) / exact
    assert error.abs().mean() < tolerance
    assert error.mean().abs() < 0.05  # the estimate of the rest is right on average


def test_the_subspace_solver_estimates_the_rest_of_an_equal_spectrum_from_the_residual_alone():
    # All singular values 1: y_j of a token of residual norm rho are its coordinates in a random
    # basis of m directions, so that the sum of |y_j| is near sqrt(2 m / pi) rho.
    matrix = decaying(0.0, images=1, num_tokens=200, width=400)

    scores = contributions_from_subspace(matrix, 1)

    assert_close(matrix.norm(dim=2), torch.ones(1, 200, dtype=torch.float64))
    assert_close(scores, torch.full((1, 200), math.sqrt(2 * 199 / math.pi)), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("width", [12, 64])
def test_the_subspace_solver_is_exact_where_the_matrix_has_a_lower_rank(rank, width):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(2, 32, rank, generator=generator) @ torch.randn(
        2, rank, width, generator=generator
    )

    scores = contributions_from_subspace(matrix, 8)

    # float32 values: beyond their rank there is rounding noise of 1e-7, which has 32 directions.
    assert_close(scores, contributions(matrix), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fill", [0.0, 0.3, -4096.0])
def test_the_subspace_solver_takes_constant_images(fill):
    matrix = torch.full((1, 40, 30), fill)

    scores = contributions_from_subspace(matrix, 5)

    assert_close(scores, torch.full((1, 40), abs(fill) * math.sqrt(30)))
    assert len(scores.unique()) == 1


def test_the_subspace_solver_gives_equal_tokens_equal_scores():
    matrix = make_tokens([], batch=2, grid=(8, 8), width=96).features
    matrix[:, 40:] = matrix[:, 3:4]

    scores = contributions_from_subspace(matrix, 12)

    assert torch.equal(scores[:, 40:], scores[:, 3:4].expand(2, 24))


@pytest.mark.parametrize("shape", [(5, 96, 200), (5, 200, 96), (3, 576, 64)])
def test_the_subspace_solver_depends_on_neither_batch_mates_nor_random_state(shape, monkeypatch):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    together = contributions_from_subspace(matrix, 16)
    torch.manual_seed(6)
    state = torch.get_rng_state()

    alone = [contributions_from_subspace(matrix[i : i + 1], 16) for i in range(len(matrix))]
    monkeypatch.setattr("pipeline.carvers._image_pool._CHUNK_BYTES", 1)

    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(contributions_from_subspace(matrix, 16), together)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_subspace_solver_scales_with_the_values(scale):
    matrix = decaying(1.0).float()

    scores = contributions_from_subspace(matrix * scale, 16)

    assert_close(scores / scale, contributions_from_subspace(matrix, 16), rtol=1e-5, atol=1e-7)


def test_the_subspace_solver_keeps_nearly_the_same_tokens():
    tokens = VisualTokens(features=decaying(1.0, num_tokens=196), grid=(14, 14))
    options = {"information": "features", "attention_weight": 0.0, "keep_tokens": 64}

    exact = carve(tokens, **options)
    near = carve(tokens, **options, solver="subspace", subspace_rank=32)

    for left, right in zip(exact, near, strict=True):
        shared = torch.isin(left.positions, right.positions).sum()
        assert 56 <= shared < 64


def test_the_subspace_solver_falls_back_to_exact_where_it_would_save_nothing():
    tokens = make_tokens(NEEDS, grid=(6, 6))
    exact, all_of_it = carve(tokens), carve(tokens, solver="subspace", subspace_rank=7)

    for left, right in zip(exact, all_of_it, strict=True):
        assert torch.equal(left.ranks, right.ranks)
