"""What identifies the numbers of an encoder: all that changes them, and nothing else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import encoders
from pipeline.errors import ConfigError
from tests.encoders.tiny_models import TEXT, save_llava, save_vit

LLM = frozenset({"llm_hidden"})
TOWER = "vision_tower.encoder.layers.0.mlp.fc1.weight"
UNUSED_LAYER = "vision_tower.encoder.layers.3.mlp.fc1.weight"  # behind the selected one
PROJECTOR = "multi_modal_projector.linear_2.bias"
DECODER = "language_model.model.layers.1.mlp.up_proj.weight"
UNUSED_DECODER = "language_model.model.layers.2.mlp.up_proj.weight"  # behind the second
EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


def describe(model, *, signals=frozenset(), **options):
    return encoders.build("llava", {"model": str(model), **options}).describe(signals)


def change_tensor(path, key, rows=slice(None)):
    tensors = load_file(path / "model.safetensors")
    tensors[key][rows] += 1
    save_file(tensors, path / "model.safetensors")


def change_settings(path, change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_it_is_the_same_wherever_the_files_lie(tmp_path):
    save_llava(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there" / "renamed")
    path = tmp_path / "there" / "renamed" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"_name_or_path": str(path), **config}))

    described = describe(tmp_path / "here")

    assert described == describe(tmp_path / "there" / "renamed")
    assert json.loads(json.dumps(described)) == described
    assert str(tmp_path) not in str(described)


def test_it_is_the_same_however_the_weights_are_spread_over_files(tmp_path):
    save_llava(tmp_path / "one")
    save_llava(tmp_path / "many", max_shard_size="12KB")

    assert describe(tmp_path / "one", signals=LLM) == describe(tmp_path / "many", signals=LLM)


@pytest.mark.parametrize(
    ("key", "options", "signals"),
    [
        (TOWER, {}, frozenset()),
        (PROJECTOR, {"stage": "projected"}, frozenset()),
        (PROJECTOR, {}, LLM),
        (DECODER, {}, LLM),
    ],
)
def test_it_changes_with_the_weights_that_are_used(tmp_path, key, options, signals):
    save_llava(tmp_path)
    before = describe(tmp_path, signals=signals, **options)
    change_tensor(tmp_path, key)

    assert describe(tmp_path, signals=signals, **options)["digest"] != before["digest"]


@pytest.mark.parametrize(
    ("key", "options", "signals"),
    [
        (UNUSED_LAYER, {}, frozenset()),
        (PROJECTOR, {}, frozenset({"cls_attention"})),
        (DECODER, {"stage": "projected"}, frozenset({"keys"})),
        (UNUSED_DECODER, {}, LLM),
        (HEAD, {}, LLM),
    ],
)
def test_it_does_not_change_with_weights_that_are_not_read(tmp_path, key, options, signals):
    save_llava(tmp_path)
    before = describe(tmp_path, signals=signals, **options)
    change_tensor(tmp_path, key)

    assert describe(tmp_path, signals=signals, **options) == before


def test_of_the_vocabulary_only_the_words_of_the_prompt_count(tmp_path):
    save_llava(tmp_path)
    before = describe(tmp_path, signals=LLM)

    change_tensor(tmp_path, EMBEDDINGS, rows=slice(20, 40))  # no word of the prompt
    unused = describe(tmp_path, signals=LLM)
    change_tensor(tmp_path, EMBEDDINGS, rows=3)  # `USER:`
    used = describe(tmp_path, signals=LLM)

    assert unused == before
    assert used["digest"] != before["digest"]


def test_the_same_tower_with_another_language_model_is_the_same(tmp_path):
    save_llava(tmp_path / "small")
    wide = {"hidden_size": 40, "num_hidden_layers": 4, "vocab_size": 80}
    save_llava(tmp_path / "wide", text=wide)
    tensors = load_file(tmp_path / "wide" / "model.safetensors")
    tower = load_file(tmp_path / "small" / "model.safetensors")
    tensors |= {key: tower[key] for key in tower if key.startswith("vision_tower.")}
    save_file(tensors, tmp_path / "wide" / "model.safetensors")

    assert wide.items() & TEXT.items() == set()
    assert describe(tmp_path / "small") == describe(tmp_path / "wide")
    assert describe(tmp_path / "small", signals=LLM) != describe(tmp_path / "wide", signals=LLM)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"vision_feature_layer": -3}),
        ("config.json", {"vision_feature_select_strategy": "full"}),
        ("preprocessor_config.json", {"resample": 2}),
    ],
)
def test_it_changes_with_the_settings(tmp_path, name, change):
    save_llava(tmp_path)
    before = describe(tmp_path)
    change_settings(tmp_path / name, change)

    assert describe(tmp_path)["digest"] != before["digest"]


@pytest.mark.parametrize(
    ("change", "options", "signals"),
    [
        ({"projector_hidden_act": "relu"}, {"stage": "projected"}, frozenset()),
        ({"text_config": {**TEXT, "rope_theta": 500.0}}, {}, LLM),
    ],
)
def test_settings_of_the_projector_and_the_language_model_count_where_they_run(
    tmp_path, change, options, signals
):
    save_llava(tmp_path)
    before = describe(tmp_path, **options, signals=signals), describe(tmp_path)
    change_settings(tmp_path / "config.json", change)

    assert describe(tmp_path, **options, signals=signals)["digest"] != before[0]["digest"]
    assert describe(tmp_path) == before[1]


@pytest.mark.parametrize("options", [{"llm_layers": 1}, {"prompt": "USER: <image> the image"}])
def test_options_of_the_language_model_count_only_with_its_signals(tmp_path, options):
    save_llava(tmp_path)

    assert describe(tmp_path, **options) == describe(tmp_path)
    assert describe(tmp_path, **options, signals=LLM) != describe(tmp_path, signals=LLM)


def test_the_tokenizer_counts_with_the_signals_of_the_language_model(tmp_path):
    save_llava(tmp_path)
    before = describe(tmp_path, signals=LLM), describe(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["the"], vocabulary["in"] = vocabulary["in"], vocabulary["the"]
    path.write_text(json.dumps(tokenizer))

    assert describe(tmp_path, signals=LLM)["digest"] != before[0]["digest"]
    assert describe(tmp_path) == before[1]


def test_the_stage_counts(tmp_path):
    save_llava(tmp_path)

    assert describe(tmp_path)["stage"] == "pre_projector"
    assert describe(tmp_path, stage="projected") != describe(tmp_path)


def test_signals_that_cannot_be_given_change_nothing(tmp_path):
    save_llava(tmp_path, text={"model_type": "gpt_neox"})

    assert describe(tmp_path, signals=LLM) == describe(tmp_path)


def test_a_missing_tensor_is_found_before_anything_is_loaded(tmp_path):
    save_llava(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[TOWER]
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(ConfigError, match=f"lacks 1 of .* first '{TOWER}'"):
        describe(tmp_path)


@pytest.mark.parametrize(("layer", "changes"), [(2, False), (3, True)])
def test_a_bare_tower_counts_as_deep_as_it_runs(tmp_path, layer, changes):
    save_vit(tmp_path, "dinov2_swiglu")
    encoder = encoders.build("vit", {"model": str(tmp_path), "layer": layer})
    before = encoder.describe()
    keys = load_file(tmp_path / "model.safetensors").keys()
    key = next(k for k in keys if "layer.2." in k and "weights_in.weight" in k)
    change_tensor(tmp_path, key)

    after = encoders.build("vit", {"model": str(tmp_path), "layer": layer}).describe()

    assert (after != before) == changes


def test_a_tensor_stored_in_another_type_is_another_tensor(tmp_path):
    save_llava(tmp_path)
    before = describe(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[TOWER] = tensors[TOWER].to(torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")

    assert describe(tmp_path)["digest"] != before["digest"]


@pytest.mark.parametrize("part", [[], ["vision_config"]])
def test_where_a_config_was_saved_does_not_count(tmp_path, part):
    save_llava(tmp_path)
    before = describe(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    place = config
    for name in part:
        place = place[name]
    place["_name_or_path"] = str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert describe(tmp_path) == before


def test_where_the_config_of_a_bare_tower_was_saved_does_not_count(tmp_path):
    save_vit(tmp_path, "siglip")
    before = encoders.build("vit", {"model": str(tmp_path)}).describe()
    change_settings(tmp_path / "config.json", {"_name_or_path": str(tmp_path)})

    assert encoders.build("vit", {"model": str(tmp_path)}).describe() == before
