"""Against transformers itself: patch tokens of every layer, of every kind of tower."""

import json

import numpy as np
import pytest
import torch
import transformers

from pipeline import encoders
from pipeline.errors import ConfigError, EncodeError, MissingSignalError
from tests.encoders.tiny_models import (
    DINO_PROCESSOR,
    VISION,
    VITS,
    photo,
    randomize,
    save_llava,
    save_processor,
    save_vit,
    upstream_pixels,
)

IMAGES = [photo("coffee"), photo("chelsea")[:, :120], photo("chelsea")]
NUM_PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_swiglu": 1, "dinov2_with_registers": 5}
GRID = {"clip": (4, 4), "siglip": (4, 4)}


def encode(path, *, signals=frozenset(), images=IMAGES, **options):
    encoder = encoders.build("vit", {"model": str(path), "resize": "pillow", **options})
    encoder.load(signals=frozenset(signals))
    return encoder.encode(images)


def upstream(model, path, **kwargs):
    with torch.inference_mode():
        return model(upstream_pixels(path, IMAGES), **kwargs)


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("layer", [-1, 4])
def test_the_last_layer_is_the_last_hidden_state(tmp_path, kind, layer):
    model = save_vit(tmp_path, kind)

    (tokens,) = encode(tmp_path, layer=layer)

    expected = upstream(model, tmp_path).last_hidden_state[:, NUM_PREFIX[kind] :]
    torch.testing.assert_close(tokens.features, expected, atol=1e-5, rtol=1e-5)
    assert tokens.grid == GRID.get(kind, (5, 5))
    assert tokens.image_indices == (0, 1, 2)


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("layer", [-2, 0, 2, -5])
def test_other_layers_are_the_hidden_states(tmp_path, kind, layer):
    model = save_vit(tmp_path, kind)

    (tokens,) = encode(tmp_path, layer=layer)

    states = upstream(model, tmp_path, output_hidden_states=True).hidden_states
    expected = states[layer][:, NUM_PREFIX[kind] :]
    torch.testing.assert_close(tokens.features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in VITS if kind != "siglip"])
@pytest.mark.parametrize("layer", [-1, 2])
def test_attention_signals_leave_out_class_token_and_registers(tmp_path, kind, layer):
    model = save_vit(tmp_path, kind)
    model.set_attn_implementation("eager")
    weights = upstream(model, tmp_path, output_attentions=True).attentions[layer % 5 - 1]

    (tokens,) = encode(tmp_path, layer=layer, signals={"cls_attention", "received_attention"})

    start = NUM_PREFIX[kind]
    from_class = weights[:, :, 0, start:].mean(dim=1)
    received = weights[:, :, start:, start:].mean(dim=(1, 2))
    torch.testing.assert_close(tokens.signals["cls_attention"], from_class, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(tokens.signals["received_attention"], received, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_the_tower_of_a_model_of_images_and_text_is_found(tmp_path, family):
    config_class = getattr(transformers, f"{family}Config")
    text = {**VISION, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = config_class(text_config=text, vision_config=VISION)
    model = getattr(transformers, f"{family}Model")(config)
    randomize(model)
    model.save_pretrained(tmp_path)
    tower = save_vit(tmp_path / "tower", family.lower())
    tower.load_state_dict(model.vision_model.state_dict())
    (tmp_path / "preprocessor_config.json").write_bytes(
        (tmp_path / "tower" / "preprocessor_config.json").read_bytes()
    )

    (tokens,) = encode(tmp_path)

    expected = upstream(tower, tmp_path).last_hidden_state
    expected = expected[:, expected.shape[1] - 16 :]
    torch.testing.assert_close(tokens.features, expected, atol=1e-5, rtol=1e-5)


def test_images_of_several_shapes_come_back_by_grid(tmp_path):
    model = save_vit(tmp_path, "dinov2")
    save_processor(tmp_path, {**DINO_PROCESSOR, "do_center_crop": False})
    square = photo("coffee")[:300, :300]
    wide = photo("coffee")

    first, second = encode(tmp_path, images=[wide, square, wide[::-1].copy()], signals={"keys"})

    assert first.image_indices == (0, 2)
    assert second.image_indices == (1,)
    assert first.grid == (5, 8)  # 40 x 60 pixels in patches of 7
    assert second.grid == (5, 5)
    assert first.signals["keys"].shape == (2, 40, 32)
    with torch.inference_mode():
        expected = model(upstream_pixels(tmp_path, [wide])).last_hidden_state[:, 1:]
    torch.testing.assert_close(first.features[:1], expected, atol=1e-5, rtol=1e-5)


def test_an_image_smaller_than_a_patch_is_refused_as_a_sample(tmp_path):
    save_vit(tmp_path, "dinov2")
    save_processor(tmp_path, {**DINO_PROCESSOR, "do_resize": False, "do_center_crop": False})
    encoder = encoders.build("vit", {"model": str(tmp_path)})

    with pytest.raises(EncodeError, match="6 x 90 pixels is smaller than one patch of 7"):
        encoder.preprocess(photo()[:6, :90])


def test_no_images_give_no_tokens(tmp_path):
    save_vit(tmp_path, "clip")

    assert encode(tmp_path, images=[]) == []


@pytest.mark.parametrize("kind", VITS)
def test_signals_do_not_change_features(tmp_path, kind):
    save_vit(tmp_path, kind)
    encoder = encoders.build("vit", {"model": str(tmp_path)})

    (bare,) = encode(tmp_path)
    (full,) = encode(tmp_path, signals=encoder.yields)

    assert torch.equal(bare.features, full.features)
    assert set(full.signals) == encoder.yields
    assert all(np.isfinite(signal.numpy()).all() for signal in full.signals.values())


def test_the_language_signals_are_not_to_be_had(tmp_path):
    save_vit(tmp_path, "clip")

    with pytest.raises(MissingSignalError, match="'llm_hidden'"):
        encode(tmp_path, signals={"llm_hidden"})


def test_a_llava_model_is_refused(tmp_path):
    save_llava(tmp_path)

    with pytest.raises(ConfigError, match="is a 'llava', not a vision tower"):
        encode(tmp_path)


@pytest.mark.parametrize("layer", [5, -6])
def test_a_layer_that_does_not_exist_is_refused(tmp_path, layer):
    save_vit(tmp_path, "clip")

    with pytest.raises(ConfigError, match="option 'layer'"):
        encode(tmp_path, layer=layer)


def test_equal_layers_are_described_equally_however_they_are_counted(tmp_path):
    save_vit(tmp_path, "clip")
    described = [
        encoders.build("vit", {"model": str(tmp_path), "layer": layer}).describe()
        for layer in (-1, 4, 3)
    ]

    assert described[0] == described[1] != described[2]


def test_a_config_of_unknown_kind_is_refused(tmp_path):
    save_vit(tmp_path, "clip")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov3_vit"}))

    with pytest.raises(ConfigError, match="is a 'dinov3_vit'"):
        encode(tmp_path)
