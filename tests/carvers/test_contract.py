"""What every carver must do. Runs on each one the registry finds, with no list to keep."""

import dataclasses
import inspect
import pickle
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pipeline import carvers
from pipeline.carvers import _ops
from pipeline.carvers._base import Carver, ScoreCarver
from pipeline.errors import ConfigError, MissingSignalError, NonFiniteError
from pipeline.types import SIGNALS, CarvedTokens, TileLayout, VisualTokens
from tests.carvers.inputs import make_tokens

NAMES = carvers.names()
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]
SHAPES = [((1, 1), 4), ((1, 9), 3), ((6, 1), 16), ((4, 4), 2), ((5, 7), 64), ((12, 12), 24)]
FIELDS = [f.name for f in dataclasses.fields(CarvedTokens)]

MAX_LINES = 150  # of a carver's file

every_carver = pytest.mark.parametrize("name", NAMES)


def variants(name: str) -> Iterator[dict[str, object]]:
    """Yield the default options, and for each choice between words or True every other word."""
    yield {}
    hints = typing.get_type_hints(carvers.load(name))
    for option, field in fields(name).items():
        choices = typing.get_args(hints[option]) if "Literal" in str(hints[option]) else ()
        choices = (True, False) if hints[option] is bool else choices
        yield from ({option: c} for c in choices if c is not None and c != field.default)


def fields(name: str) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(carvers.load(name))}


def takes_budget(name: str) -> bool:
    return "keep_tokens" in fields(name)


def build(name: str, options: Mapping[str, object] | None = None, **budget: object) -> Carver:
    """Build with these or default options, and with this budget if the carver takes one."""
    return carvers.build(name, {**(options or {}), **(budget if takes_budget(name) else {})})


def assert_valid(result: CarvedTokens, source: VisualTokens) -> None:
    """Everything that holds for any result of any carver."""
    num_tokens = source.features.shape[1]
    kept = len(result.positions)
    assert 1 <= kept <= num_tokens
    assert result.features.shape == (kept, source.features.shape[2])
    assert result.features.dtype == source.features.dtype
    assert result.features.isfinite().all()
    assert {getattr(result, f).device for f in FIELDS} == {source.features.device}
    assert result.positions.dtype == torch.int64
    assert (result.positions.diff() > 0).all()
    assert result.positions[0] >= 0
    assert result.positions[-1] < num_tokens
    assert result.ranks.dtype == torch.int64
    assert result.ranks.sort().values.tolist() == list(range(kept))
    assert result.sizes.dtype == torch.float32
    assert result.sizes.shape == (kept,)
    assert (result.sizes >= 1).all() and result.sizes.sum() <= num_tokens * (1 + 1e-5)


def assert_same(left: CarvedTokens, right: CarvedTokens) -> None:
    for field in FIELDS:
        assert torch.equal(getattr(left, field), getattr(right, field)), field


def best(result: CarvedTokens, count: int) -> CarvedTokens:
    """The `count` best-ranked tokens of a result, as a reader of a prefix gets them."""
    chosen = result.ranks < count
    return CarvedTokens(**{field: getattr(result, field)[chosen] for field in FIELDS})


def only(tokens: VisualTokens, images: list[int]) -> VisualTokens:
    signals = {name: signal[images] for name, signal in tokens.signals.items()}
    return dataclasses.replace(tokens, features=tokens.features[images], signals=signals)


every_variant = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id="-".join([name, *(f"{k}={v}" for k, v in options.items())]))
        for name in NAMES
        for options in variants(name)
    ],
)


@every_carver
def test_its_file_is_short_enough_to_read_at_once(name):
    lines = inspect.getsource(inspect.getmodule(carvers.load(name))).splitlines()

    assert len(lines) <= MAX_LINES


TILED = TileLayout(rows=1, columns=2, unpadded=(1, 4, 0, 8))  # padding above
KINDS = [  # of input: grid, views, how tiles lie, budget
    ((5, 7), 1, None, 9),
    ((3, 4), 3, None, 8),
    ((1, 1), 1, None, 1),
    ((4, 4), 2, None, 32),
    ((4, 4), 3, TILED, 12),
]
KEEP_FEWER = {"adsc_stride", "average_pool", "globalcom2", "llavolta", "vqtoken"}
"""Carvers whose count has only certain values, or that find fewer tokens to keep."""

ADD_UP = {"prumerge_plus", "visionzip"}
"""Carvers that by default add tokens up rather than average them."""


@every_variant
def test_every_choice_of_its_options_carves(name, options):
    for grid, views, tiles, keep in KINDS:
        carver = build(name, options, keep_tokens=keep)
        tokens = make_tokens(carver.needs, grid=grid, num_views=views, batch=2)
        tokens = dataclasses.replace(tokens, tiles=tiles)

        results = carver.carve(tokens)

        for image, result in enumerate(results):
            assert_valid(result, tokens)
            if name in KEEP_FEWER:
                assert len(result.positions) <= keep
            elif takes_budget(name):
                assert len(result.positions) == keep
            assert_same(carver.carve(only(tokens, [image]))[0], result)
            if carver.conserves:
                assert_close(result.sizes.sum().item(), float(tokens.features.shape[1]))


@every_variant
def test_a_choice_that_says_it_is_nested_is(name, options):
    carver = build(name, options, keep_tokens=20)
    if not carver.nested or not takes_budget(name):
        pytest.skip("not nested")
    tokens = make_tokens(carver.needs, grid=(5, 7))
    large = carver.carve(tokens)

    for count in (1, 2, 7):
        small = build(name, options, keep_tokens=count).carve(tokens)

        for few, many in zip(small, large, strict=True):
            assert_same(best(few, count), best(many, count))


@every_variant
def test_one_value_that_is_not_finite_is_an_error_that_names_the_image(name, options):
    carver = build(name, options, keep_tokens=9)
    tokens = make_tokens(carver.needs)
    for name_of, value in [("features", torch.nan), ("features", -torch.inf)] + [
        (signal, torch.nan) for signal in carver.needs
    ]:
        broken = tokens.features if name_of == "features" else tokens.signals[name_of]
        broken = broken.clone()
        broken[1, 4] = value
        damaged = (
            dataclasses.replace(tokens, features=broken)
            if name_of == "features"
            else dataclasses.replace(tokens, signals={**tokens.signals, name_of: broken})
        )

        with pytest.raises(NonFiniteError, match=rf"{name_of} of image \[1\]"):
            carver.carve(damaged)


@every_carver
def test_a_signal_that_it_needs_and_does_not_get_is_an_error(name):
    carver = build(name, keep_tokens=9)
    if not carver.needs:
        pytest.skip("needs no signal")

    with pytest.raises(MissingSignalError, match="no signal"):
        carver.carve(make_tokens([]))


@every_carver
def test_a_batch_too_large_for_its_matrices_is_cut_without_a_trace(name, monkeypatch):
    carver = build(name, keep_tokens=9)
    tokens = make_tokens(carver.needs, batch=5)
    expected = carver.carve(tokens)

    monkeypatch.setattr(_ops, "MAX_MATRIX_BYTES", 2 * 4 * 35 * 40)  # two images at once

    for left, right in zip(carver.carve(tokens), expected, strict=True):
        assert_same(left, right)


@every_carver
def test_its_module_names_the_source_and_its_test_file_exists(name):
    module = carvers.load(name).__module__

    assert module == f"pipeline.carvers.{name}"
    assert re.search(r"^Source: \S", __import__(module, fromlist=["_"]).__doc__, re.MULTILINE)
    assert (Path(__file__).parent / f"test_{name}.py").is_file()


@every_carver
def test_it_is_a_frozen_dataclass_whose_options_all_have_defaults(name):
    carver = carvers.build(name)

    missing = dataclasses.MISSING
    assert carver.__dataclass_params__.frozen
    assert all(
        f.default is not missing or f.default_factory is not missing for f in fields(name).values()
    )


@every_carver
def test_its_needs_are_known_signals(name):
    assert carvers.build(name).needs <= SIGNALS.keys()


@every_carver
def test_an_unknown_option_is_rejected(name):
    with pytest.raises(ConfigError, match="no option 'keep_everything'"):
        carvers.build(name, {"keep_everything": True})


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"keep_tokens": 4, "keep_ratio": 0.5}, "exactly one"),
        ({"keep_tokens": 0}, "keep_tokens"),
        ({"keep_tokens": True}, "keep_tokens"),
        ({"keep_tokens": 4.0}, "keep_tokens"),
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"keep_ratio": 1.5}, "keep_ratio"),
        ({"keep_ratio": float("nan")}, "keep_ratio"),
        ({"keep_ratio": "half"}, "keep_ratio"),
    ],
)
@pytest.mark.parametrize("name", [n for n in NAMES if takes_budget(n)])
def test_a_wrong_budget_is_rejected(name, budget, message):
    with pytest.raises(ConfigError, match=message):
        carvers.build(name, budget)


@every_carver
def test_a_built_carver_can_be_built_again_from_its_own_fields(name):
    carver = carvers.build(name)

    again = carvers.build(name, dataclasses.asdict(carver))

    assert again == carver


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in HALVES)]
)
@pytest.mark.parametrize(("grid", "width"), SHAPES)
@pytest.mark.parametrize(
    "budget", [{}, {"keep_tokens": 1}, {"keep_tokens": 5}, {"keep_ratio": 0.6}]
)
@every_carver
def test_results_are_well_formed(name, budget, grid, width, dtype):
    carver = build(name, **budget)
    tokens = make_tokens(carver.needs, grid=grid, width=width)
    tokens = dataclasses.replace(tokens, features=tokens.features.to(dtype))

    results = carver.carve(tokens)

    assert len(results) == 3
    for result in results:
        assert_valid(result, tokens)


@every_carver
def test_the_input_is_left_unchanged(name):
    carver = build(name, keep_tokens=9)
    tokens = make_tokens(carver.needs)
    features = tokens.features.clone()
    signals = {key: signal.clone() for key, signal in tokens.signals.items()}

    carver.carve(tokens)

    assert torch.equal(tokens.features, features)
    assert tokens.signals.keys() == signals.keys()
    assert all(torch.equal(tokens.signals[key], signals[key]) for key in signals)


@every_carver
def test_results_own_exactly_the_memory_they_show(name):
    carver = build(name, keep_tokens=9)
    tokens = make_tokens(carver.needs)

    results = carver.carve(tokens)

    storages = [getattr(result, f).untyped_storage() for result in results for f in FIELDS]
    shown = [getattr(result, f).nbytes for result in results for f in FIELDS]
    assert [storage.nbytes() for storage in storages] == shown
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert tokens.features.untyped_storage().data_ptr() not in {s.data_ptr() for s in storages}


@every_carver
def test_it_neither_reads_nor_moves_the_global_random_state(name):
    carver = build(name, keep_tokens=9)
    tokens = make_tokens(carver.needs)
    torch.manual_seed(1)
    first = carver.carve(tokens)

    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = carver.carve(tokens)

    assert torch.equal(torch.get_rng_state(), state)
    for left, right in zip(first, second, strict=True):
        assert_same(left, right)


@every_carver
def test_a_pickled_copy_that_has_seen_nothing_carves_the_same(name):
    carver = build(name, keep_tokens=9)
    copy = pickle.loads(pickle.dumps(carver))
    tokens = make_tokens(carver.needs)
    carver.carve(make_tokens(carver.needs, grid=(3, 5), seed=9))  # must leave no trace

    results, copied = carver.carve(tokens), copy.carve(tokens)

    for left, right in zip(results, copied, strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [12, 48])
@every_carver
def test_an_image_does_not_depend_on_its_batch_mates_or_its_place(name, width, dtype):
    carver = build(name, keep_tokens=9)
    tokens = make_tokens(carver.needs, batch=4, width=width)
    tokens = dataclasses.replace(tokens, features=tokens.features.to(dtype))
    order = [2, 0, 3, 1]

    together = carver.carve(tokens)
    shuffled = carver.carve(only(tokens, order))
    alone = [carver.carve(only(tokens, [image]))[0] for image in range(4)]

    for image in range(4):
        assert_same(alone[image], together[image])
        assert_same(shuffled[order.index(image)], together[image])


@every_carver
def test_memory_layout_does_not_matter(name):
    carver = build(name, keep_tokens=9)
    tokens = make_tokens(carver.needs)
    strided = tokens.features.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()

    expected = carver.carve(tokens)
    results = carver.carve(dataclasses.replace(tokens, features=strided))

    for left, right in zip(results, expected, strict=True):
        assert torch.equal(left.positions, right.positions)
        assert_close(left.features, right.features)


@pytest.mark.parametrize("budget", [{"keep_tokens": 35}, {"keep_tokens": 99}, {"keep_ratio": 1.0}])
@pytest.mark.parametrize("name", [n for n in NAMES if takes_budget(n)])
def test_a_budget_of_all_tokens_keeps_every_token_unchanged(name, budget):
    carver = build(name, **budget)
    tokens = make_tokens(carver.needs)

    results = carver.carve(tokens)

    for image, result in enumerate(results):
        assert result.positions.tolist() == list(range(35))
        assert torch.equal(result.features, tokens.features[image])
        assert result.sizes.eq(1).all()


@pytest.mark.parametrize("larger", [8, 20, 35])
@pytest.mark.parametrize("name", [n for n in NAMES if carvers.load(n).nested])
def test_a_nested_carver_keeps_the_best_of_any_larger_result(name, larger):
    tokens = make_tokens(build(name).needs, grid=(5, 7))
    large = build(name, keep_tokens=larger).carve(tokens)

    for count in (1, 3, 7):
        small = build(name, keep_tokens=count).carve(tokens)

        for few, many in zip(small, large, strict=True):
            assert_same(best(few, count), best(many, count))


@pytest.mark.parametrize("fill", [0.0, 0.1, -3.0, 4096.0])
@pytest.mark.parametrize("dtype", DTYPES)
@every_variant
def test_tokens_that_are_all_equal_are_carved(name, options, dtype, fill):
    carver = build(name, options, keep_tokens=9)
    tokens = make_tokens(carver.needs)
    features = torch.full_like(tokens.features, fill, dtype=dtype)
    signals = {key: torch.full_like(signal, 0.25) for key, signal in tokens.signals.items()}
    constant = VisualTokens(features=features, grid=tokens.grid, signals=signals)

    for result in carver.carve(constant):
        assert_valid(result, constant)
        if carver.averages:
            assert_close(result.features, features[0, : len(result.features)])


@pytest.mark.parametrize(
    "name", [n for n in NAMES if issubclass(carvers.load(n), ScoreCarver) and takes_budget(n)]
)
def test_equal_scores_keep_the_lower_positions(name):
    carver = build(name, keep_tokens=9)
    tokens = make_tokens(carver.needs)
    constant = VisualTokens(
        features=torch.ones_like(tokens.features),
        grid=tokens.grid,
        signals={key: torch.ones_like(signal) for key, signal in tokens.signals.items()},
    )

    for result in carver.carve(constant):
        assert result.positions.tolist() == list(range(9))
        assert result.ranks.tolist() == list(range(9))


@every_carver
def test_large_values_of_half_precision_are_carved_or_refused_by_name(name):
    carver = build(name, keep_tokens=9)
    tokens = make_tokens(carver.needs)
    signs = torch.where(tokens.features > -1, 1.0, -1.0)
    large = dataclasses.replace(tokens, features=(60000 * signs).half())

    if name not in ADD_UP:
        for result in carver.carve(large):
            assert_valid(result, large)
    else:
        with pytest.raises(NonFiniteError, match=rf"{type(carver).__name__} adds .* float16 holds"):
            carver.carve(large)


@every_variant
def test_duplicate_tokens_are_carved(name, options):
    carver = build(name, options, keep_tokens=9)
    tokens = make_tokens(carver.needs, grid=(4, 8))
    signals = {key: signal[:, torch.arange(32) // 4] for key, signal in tokens.signals.items()}
    duplicated = VisualTokens(
        features=tokens.features[:, torch.arange(32) // 4], grid=(4, 8), signals=signals
    )

    for result in carver.carve(duplicated):
        assert_valid(result, duplicated)


@every_carver
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    image=st.fixed_dictionaries(
        {
            "grid": st.tuples(st.integers(1, 7), st.integers(1, 7)),
            "width": st.integers(1, 20),
            "seed": st.integers(0, 999),
        }
    ),
    distinct=st.integers(1, 49),
    scale=st.sampled_from([0.0, 1e-4, 1.0, 300.0]),
    budget=st.one_of(
        st.builds(dict, keep_tokens=st.integers(1, 60)),
        st.builds(dict, keep_ratio=st.floats(0, 1, exclude_min=True)),
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_any_image_and_budget_give_a_well_formed_result(
    name, image, distinct, scale, budget, dtype
):
    carver = build(name, **budget)
    tokens = make_tokens(carver.needs, batch=2, **image)
    repeat = torch.arange(tokens.features.shape[1]) % distinct
    features = (tokens.features[:, repeat] * scale).to(dtype)
    tokens = dataclasses.replace(tokens, features=features)

    first, second = carver.carve(tokens)

    assert_valid(first, tokens)
    assert_valid(second, tokens)
    assert_same(second, carver.carve(only(tokens, [1]))[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@every_carver
def test_results_stay_on_the_gpu_and_match_the_cpu(name, dtype):
    carver = build(name, keep_tokens=9)
    tokens = make_tokens(carver.needs)
    tokens = dataclasses.replace(tokens, features=tokens.features.to(dtype))
    on_gpu = VisualTokens(
        features=tokens.features.cuda(),
        grid=tokens.grid,
        signals={key: signal.cuda() for key, signal in tokens.signals.items()},
    )

    expected, results = carver.carve(tokens), carver.carve(on_gpu)

    for left, right in zip(results, expected, strict=True):
        assert_valid(left, on_gpu)
        assert torch.equal(left.positions.cpu(), right.positions)
        assert_close(left.features.cpu(), right.features)
