"""What every encoder keeps to. Runs on every file of `pipeline/encoders` by itself."""

import dataclasses
import importlib
import inspect
import json
import pickle

import numpy as np
import pytest
import torch

from pipeline import encoders
from pipeline.errors import ConfigError, MissingSignalError
from pipeline.types import SIGNALS
from tests.encoders import tiny_models
from tests.encoders.tiny_families import FAMILIES, save_family

IMAGES = [tiny_models.photo("coffee"), tiny_models.photo("chelsea")]


@pytest.fixture(params=encoders.names())
def name(request):
    return request.param


@pytest.fixture
def options(name, tmp_path):
    """Options of an encoder on a small model."""
    if name == "vit":
        tiny_models.save_vit(tmp_path, "dinov2_with_registers")
    elif name == "llava":
        tiny_models.save_llava(tmp_path)
    else:
        save_family(tmp_path, next(n for n, f in FAMILIES.items() if f.encoder == name))
    return {"model": str(tmp_path)}


@pytest.fixture
def encoder(name, options):
    return encoders.build(name, options)


def test_every_option_has_a_default_and_building_touches_no_model(name):
    built = encoders.build(name, {})

    assert dataclasses.is_dataclass(built)
    with pytest.raises(ConfigError, match="'model'"):
        built.describe()


def test_an_unknown_option_is_refused(name):
    with pytest.raises(ConfigError, match="no option 'colour'"):
        encoders.build(name, {"colour": "red"})


def test_the_module_names_its_source(name):
    assert "Source:" in (importlib.import_module(f"pipeline.encoders.{name}").__doc__ or "")


def test_its_class_says_what_the_options_mean(name):
    documented = inspect.getdoc(encoders.load(name)) or ""
    inherited = "\n".join(inspect.getdoc(base) or "" for base in encoders.load(name).__mro__)

    assert documented
    for field in dataclasses.fields(encoders.load(name)):
        assert f"{field.name}:" in inherited


def test_it_yields_only_known_signals(encoder):
    assert encoder.yields
    assert encoder.yields <= set(SIGNALS)


def test_it_can_be_pickled_until_it_is_loaded(encoder):
    copy = pickle.loads(pickle.dumps(encoder))
    copy.load()

    assert copy.describe() == encoder.describe()
    assert copy.encode(IMAGES)


def test_its_description_is_json_and_the_same_each_time(name, options):
    first, second = (encoders.build(name, options).describe() for _ in range(2))

    assert json.loads(json.dumps(first)) == first == second
    assert {"model", "revision", "stage", "digest"} <= set(first)


def test_an_unknown_signal_is_refused_before_loading(encoder):
    with pytest.raises(MissingSignalError, match="'aura'"):
        encoder.load(signals=frozenset({"aura"}))


def test_its_tokens_keep_the_promises_of_their_type(encoder):
    encoder.load(signals=encoder.yields)

    results = encoder.encode(IMAGES)

    assert sorted(i for tokens in results for i in tokens.image_indices) == [0, 1]
    assert len({(tokens.grid, tokens.num_views) for tokens in results}) == len(results)
    for tokens in results:
        count, num_tokens, width = tokens.features.shape
        assert count == len(tokens.image_indices)
        assert num_tokens == tokens.num_views * tokens.grid[0] * tokens.grid[1]
        assert width == encoder.width
        assert tokens.features.isfinite().all()
        assert set(tokens.signals) == encoder.yields
        for signal in tokens.signals.values():
            assert signal.dtype == torch.float32
            assert signal.shape[:2] == (count, num_tokens)
            assert signal.isfinite().all()


def test_only_the_signals_asked_for_are_given(encoder):
    for wanted in sorted(encoder.yields):
        encoder.load(signals=frozenset({wanted}))
        assert all(set(tokens.signals) == {wanted} for tokens in encoder.encode(IMAGES))


def test_an_image_does_not_depend_on_its_batch_mates(encoder):
    encoder.load(signals=encoder.yields)
    (together,) = encoder.encode([*IMAGES, IMAGES[0]])

    (alone,) = encoder.encode(IMAGES[1:])

    torch.testing.assert_close(together.features[1:2], alone.features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.features[0], together.features[2], atol=1e-5, rtol=1e-5)
    for name, signal in alone.signals.items():
        torch.testing.assert_close(together.signals[name][1:2], signal, atol=1e-4, rtol=1e-4)


def test_preparing_leaves_the_image_alone_and_needs_no_weights(encoder):
    image = IMAGES[0].copy()

    prepared = encoder.preprocess(image)

    assert np.array_equal(image, IMAGES[0])
    assert prepared.dtype == np.uint8 and prepared.shape[2] == 3
    assert prepared.flags.c_contiguous


def test_the_type_asked_for_is_the_type_of_the_features(encoder):
    encoder.load(dtype=torch.bfloat16)

    assert all(tokens.features.dtype == torch.bfloat16 for tokens in encoder.encode(IMAGES))
