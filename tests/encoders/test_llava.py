"""Against transformers itself: the same features, and signals as eager attention shows them."""

import pickle

import numpy as np
import pytest
import torch

from pipeline import encoders
from pipeline.errors import ConfigError, MissingSignalError, PipelineError
from pipeline.types import SIGNALS
from tests.encoders.tiny_models import (
    IMAGE_ID,
    photo,
    save_llava,
    save_processor,
    save_vit,
    upstream_pixels,
)

IMAGES = [photo("coffee"), photo("chelsea"), photo("coffee")[:90, 200:500]]
ALL_SIGNALS = frozenset(SIGNALS)


def encode(path, *, signals=frozenset(), images=IMAGES, **options):
    encoder = encoders.build("llava", {"model": str(path), "resize": "pillow", **options})
    encoder.load(signals=frozenset(signals))
    (tokens,) = encoder.encode(images)
    return tokens


def expected_features(model, path, *, stage):
    with torch.inference_mode():
        output = model.model.get_image_features(
            upstream_pixels(path, IMAGES), output_hidden_states=True
        )
    if stage == "projected":
        return torch.stack(list(output.pooler_output))
    layers = model.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    start = 1 if model.config.vision_feature_select_strategy == "default" else 0
    return torch.cat([output.hidden_states[i][:, start:] for i in layers], dim=-1)


@pytest.mark.parametrize("stage", ["pre_projector", "projected"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, -1, 2, [-2, -4, 0]])
def test_features_are_those_of_transformers(tmp_path, stage, tower, strategy, layer):
    model = save_llava(tmp_path, tower=tower, strategy=strategy, layer=layer)

    tokens = encode(tmp_path, stage=stage)

    expected = expected_features(model, tmp_path, stage=stage)
    assert tokens.features.dtype == torch.float32
    torch.testing.assert_close(tokens.features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tower", "strategy", "grid"),
    [
        ("clip", "default", (4, 4)),
        ("siglip", "full", (4, 4)),
        ("clip", "full", (1, 17)),
        ("siglip", "default", (1, 15)),
    ],
)
def test_the_grid_holds_every_token(tmp_path, tower, strategy, grid):
    save_llava(tmp_path, tower=tower, strategy=strategy)

    tokens = encode(tmp_path, signals={"received_attention", "keys"})

    assert tokens.grid == grid
    assert tokens.features.shape == (3, grid[0] * grid[1], 32)
    assert tokens.signals["received_attention"].shape == (3, grid[0] * grid[1])
    assert tokens.signals["keys"].shape == (3, grid[0] * grid[1], 32)


def eager_tower(model, path):
    """Return attention weights of each layer as the slow path of transformers computes them."""
    model.model.vision_tower.set_attn_implementation("eager")
    with torch.inference_mode():
        output = model.model.vision_tower(upstream_pixels(path, IMAGES), output_attentions=True)
    return output.attentions


def test_cls_attention_is_the_class_tokens_row_of_the_selected_layer(tmp_path):
    model = save_llava(tmp_path)
    weights_BHTT = eager_tower(model, tmp_path)[-2]

    tokens = encode(tmp_path, signals={"cls_attention"})

    expected = weights_BHTT[:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(tokens.signals["cls_attention"], expected, atol=1e-6, rtol=1e-5)
    assert set(tokens.signals) == {"cls_attention"}


@pytest.mark.parametrize(
    ("tower", "strategy", "start"), [("clip", "default", 1), ("siglip", "full", 0)]
)
def test_received_attention_is_the_mean_over_visual_queries(tmp_path, tower, strategy, start):
    model = save_llava(tmp_path, tower=tower, strategy=strategy)
    weights_BHTT = eager_tower(model, tmp_path)[-2]

    tokens = encode(tmp_path, signals={"received_attention"})

    expected = weights_BHTT[:, :, start:, start:].mean(dim=(1, 2))
    torch.testing.assert_close(tokens.signals["received_attention"], expected, atol=1e-6, rtol=1e-5)


def test_keys_and_attention_output_are_those_of_the_selected_layer(tmp_path):
    model = save_llava(tmp_path)
    caught = {}
    attention = model.model.vision_tower.encoder.layers[-2].self_attn
    attention.k_proj.register_forward_hook(lambda m, i, out: caught.update(keys=out[:, 1:]))
    attention.register_forward_hook(lambda m, i, out: caught.update(output=out[0][:, 1:]))
    expected_features(model, tmp_path, stage="projected")

    tokens = encode(tmp_path, signals={"keys", "attention_output"})

    torch.testing.assert_close(tokens.signals["keys"], caught["keys"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        tokens.signals["attention_output"], caught["output"], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("text", [{}, {"model_type": "mistral"}, {"model_type": "qwen2"}])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_llm_signals_are_those_of_the_whole_model(tmp_path, text, num_layers):
    model = save_llava(tmp_path, text=text)
    model.model.language_model.set_attn_implementation("eager")
    caught = {}
    layer = model.model.language_model.layers[num_layers - 1]
    layer.register_forward_hook(lambda m, i, out: caught.update(hidden=out))
    before, after = [1, 3], [4, 5, 6, 7, 8, 9]
    ids = torch.tensor([before + [IMAGE_ID] * 16 + after] * 3)
    with torch.inference_mode():
        output = model(
            input_ids=ids, pixel_values=upstream_pixels(tmp_path, IMAGES), output_attentions=True
        )

    tokens = encode(
        tmp_path, signals={"llm_hidden", "llm_attention"}, stage="projected", llm_layers=num_layers
    )

    attention = output.attentions[num_layers - 1][:, :, -1, 2:18].mean(dim=1)
    hidden = caught["hidden"][:, 2:18]
    torch.testing.assert_close(tokens.signals["llm_attention"], attention, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens.signals["llm_hidden"], hidden, atol=1e-4, rtol=1e-4)


def test_a_sliding_window_hides_what_the_last_prompt_token_cannot_see(tmp_path):
    model = save_llava(tmp_path, text={"model_type": "mistral", "sliding_window": 12})
    model.model.language_model.set_attn_implementation("eager")
    ids = torch.tensor([[1, 3] + [IMAGE_ID] * 16 + [4, 5, 6, 7, 8, 9]] * 3)
    with torch.inference_mode():
        output = model(
            input_ids=ids, pixel_values=upstream_pixels(tmp_path, IMAGES), output_attentions=True
        )

    tokens = encode(tmp_path, signals={"llm_attention"})

    attention = output.attentions[1][:, :, -1, 2:18].mean(dim=1)
    assert (attention == 0).any()
    torch.testing.assert_close(tokens.signals["llm_attention"], attention, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", ["pre_projector", "projected"])
def test_asking_for_all_signals_changes_no_feature(tmp_path, stage):
    save_llava(tmp_path)

    bare = encode(tmp_path, stage=stage)
    full = encode(tmp_path, stage=stage, signals=ALL_SIGNALS)

    assert torch.equal(bare.features, full.features)
    assert bare.signals == {}
    assert set(full.signals) == ALL_SIGNALS
    assert {signal.dtype for signal in full.signals.values()} == {torch.float32}


def test_half_precision_gives_half_features_and_float32_signals(tmp_path):
    save_llava(tmp_path)
    encoder = encoders.build("llava", {"model": str(tmp_path), "stage": "projected"})
    encoder.load(dtype=torch.bfloat16, signals=ALL_SIGNALS)

    (tokens,) = encoder.encode(IMAGES)

    exact = encode(tmp_path, stage="projected", signals=ALL_SIGNALS)
    assert tokens.features.dtype == torch.bfloat16
    assert {signal.dtype for signal in tokens.signals.values()} == {torch.float32}
    for name, signal in tokens.signals.items():
        distance = (signal - exact.signals[name]).norm() / exact.signals[name].norm()
        assert distance < 0.05, name


def test_layers_behind_the_selected_one_are_neither_read_nor_run(tmp_path):
    save_llava(tmp_path, layer=1)
    sound = encode(tmp_path, stage="pre_projector")
    model = save_llava(tmp_path / "cut", layer=1)
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ".layers.0." in name or ".layers." not in name
    }
    model.save_pretrained(tmp_path / "cut", state_dict=state)

    tokens = encode(tmp_path / "cut", stage="pre_projector")

    assert torch.equal(tokens.features, sound.features)


@pytest.mark.parametrize(
    ("options", "width"),
    [({}, 32), ({"stage": "projected"}, 24), ({"stage": "pre_projector"}, 32)],
)
def test_width_and_yields_need_no_weights(tmp_path, options, width):
    save_llava(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    encoder = encoders.build("llava", {"model": str(tmp_path), **options})

    assert encoder.width == width
    assert encoder.yields == ALL_SIGNALS


def test_several_selected_layers_add_up_in_width(tmp_path):
    save_llava(tmp_path, layer=[-2, 1])

    assert encoders.build("llava", {"model": str(tmp_path)}).width == 64


def test_a_tower_without_class_token_yields_no_cls_attention(tmp_path):
    save_llava(tmp_path, tower="siglip", strategy="full")
    encoder = encoders.build("llava", {"model": str(tmp_path)})

    assert "cls_attention" not in encoder.yields
    with pytest.raises(MissingSignalError, match="'cls_attention'"):
        encoder.load(signals=frozenset({"cls_attention"}))


def test_embeddings_alone_yield_no_tower_attention(tmp_path):
    save_llava(tmp_path, layer=0)

    encoder = encoders.build("llava", {"model": str(tmp_path)})

    assert encoder.yields == {"llm_hidden", "llm_attention", "projector_sensitivity"}
    assert encode(tmp_path).features.shape == (3, 16, 32)


def test_encoding_before_loading_says_what_to_do(tmp_path):
    save_llava(tmp_path)
    encoder = encoders.build("llava", {"model": str(tmp_path)})

    with pytest.raises(PipelineError, match="call load first"):
        encoder.encode(IMAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "raw"}, "stage"),
        ({"llm_layers": 0}, "llm_layers must be at least 1"),
        ({"modle": "x"}, "did you mean 'model'"),
    ],
)
def test_a_wrong_option_is_refused_when_building(options, message):
    with pytest.raises(ConfigError, match=message):
        encoders.build("llava", options)


@pytest.mark.parametrize(
    ("saving", "options", "message"),
    [
        ({"layer": 7}, {}, r"vision_feature_layer \[7\] is out of range"),
        ({}, {"llm_layers": 4}, "'llm_layers' is 4, the language model has 3"),
    ],
)
def test_layers_that_do_not_exist_are_refused(tmp_path, saving, options, message):
    save_llava(tmp_path, **saving)
    encoder = encoders.build("llava", {"model": str(tmp_path), **options})

    with pytest.raises(ConfigError, match=message):
        encoder.yields  # noqa: B018


def test_a_bare_tower_is_refused_with_a_hint(tmp_path):
    save_vit(tmp_path, "clip")

    with pytest.raises(ConfigError, match="use the encoder 'vit'"):
        encoders.build("llava", {"model": str(tmp_path)}).describe()


def test_a_language_model_of_another_kind_yields_no_llm_signals(tmp_path):
    save_llava(tmp_path, text={"model_type": "gpt_neox"})
    encoder = encoders.build("llava", {"model": str(tmp_path), "stage": "projected"})
    encoder.load()

    assert "llm_hidden" not in encoder.yields
    assert encoder.encode(IMAGES)[0].features.shape == (3, 16, 24)


@pytest.mark.parametrize("prompt", ["USER: ASSISTANT:", "<image> <image> USER:", "USER: <image>"])
def test_a_prompt_without_one_image_before_text_is_refused(tmp_path, prompt):
    save_llava(tmp_path)
    encoder = encoders.build("llava", {"model": str(tmp_path), "prompt": prompt})

    with pytest.raises(ConfigError, match="'prompt'"):
        encoder.load(signals=frozenset({"llm_hidden"}))


def test_a_missing_tokenizer_is_named(tmp_path):
    save_llava(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    encoder = encoders.build("llava", {"model": str(tmp_path)})

    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        encoder.load(signals=frozenset({"llm_hidden"}))


def test_a_processor_for_another_size_is_refused_before_weights_are_read(tmp_path):
    save_llava(tmp_path)
    settings = {"image_processor_type": "CLIPImageProcessor", "crop_size": 56, "size": 56}
    save_processor(tmp_path, settings)
    (tmp_path / "model.safetensors").unlink()

    with pytest.raises(ConfigError, match=r"gives \(56, 56\), its tower takes \(28, 28\)"):
        encoders.build("llava", {"model": str(tmp_path)}).load()


def test_a_loaded_encoder_refuses_to_be_pickled(tmp_path):
    save_llava(tmp_path)
    encoder = encoders.build("llava", {"model": str(tmp_path)})
    copy = pickle.loads(pickle.dumps(encoder))
    encoder.load()

    assert copy == encoder
    assert copy.width == 32
    with pytest.raises(TypeError, match="before load"):
        pickle.dumps(encoder)


def test_images_of_any_batch_get_the_same_tokens(tmp_path):
    save_llava(tmp_path)
    together = encode(tmp_path, signals=ALL_SIGNALS)

    for place, image in enumerate(IMAGES):
        alone = encode(tmp_path, signals=ALL_SIGNALS, images=[image])
        np.testing.assert_allclose(alone.features[0], together.features[place], atol=1e-5)
        for name in ALL_SIGNALS:
            np.testing.assert_allclose(
                alone.signals[name][0], together.signals[name][place], atol=1e-4
            )
