"""A model without its vision tower is the rest of the model, and the tower is nowhere."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from pipeline.consumers.checkpoint import load_without_tower
from pipeline.consumers.hf import prepare
from pipeline.errors import ConfigError
from tests.encoders.tiny_models import (
    CLIP_PROCESSOR,
    IMAGE_ID,
    TEXT,
    VISION,
    randomize,
    save_llava,
    save_processor,
    save_vit,
)
from tests.evaluation.models import save_words

TEXT_OPTIONS = {key: value for key, value in TEXT.items() if key != "model_type"}
PROMPTS = ["what is <image> in this picture", "<image> how many dogs ?"]
WEIGHTS = "model.safetensors"


def features(width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, width, generator=generator) for count in (3, 7)]


def save(folder: Path, config: transformers.PretrainedConfig, model_class: type) -> torch.nn.Module:
    model = model_class(config)
    randomize(model)
    model.save_pretrained(folder)
    save_processor(folder, CLIP_PROCESSOR)
    save_words(folder)
    return model


def save_plain(folder: Path) -> torch.nn.Module:
    model = save_llava(folder)
    save_words(folder)  # its tokenizer can pad
    return model


def save_next(folder: Path) -> torch.nn.Module:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT_OPTIONS),
        image_token_id=IMAGE_ID,
        image_grid_pinpoints=[[28, 56]],
    )
    return save(folder, config, LlavaNextForConditionalGeneration)


def save_onevision(folder: Path) -> torch.nn.Module:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Qwen2Config(**TEXT_OPTIONS, tie_word_embeddings=True),
        image_token_id=IMAGE_ID,
        image_grid_pinpoints=[[28, 56]],
        tie_word_embeddings=True,
    )
    return save(folder, config, LlavaOnevisionForConditionalGeneration)


def take_tower_away(folder: Path) -> None:
    """Make of a checkpoint one of two files, and delete the file of the tower."""
    weights = load_file(folder / WEIGHTS)
    tower = {name for name in weights if "vision_tower" in name}
    assert 0 < len(tower) < len(weights)
    (folder / WEIGHTS).unlink()
    save_file({n: w for n, w in weights.items() if n not in tower}, folder / "rest.safetensors")
    places = {n: "tower.safetensors" if n in tower else "rest.safetensors" for n in weights}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))


@torch.no_grad()
@pytest.mark.parametrize("save_model", [save_plain, save_next, save_onevision])
def test_it_gives_the_logits_of_the_whole_model_without_the_towers_file(
    save_model, tmp_path: Path
) -> None:
    whole = save_model(tmp_path).eval()
    take_tower_away(tmp_path)

    model, tokenizer = load_without_tower(str(tmp_path))

    inputs = prepare(model, tokenizer, PROMPTS, features(24))
    assert torch.equal(model(**inputs).logits, whole(**inputs).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("save_model", [save_plain, save_next, save_onevision])
def test_no_tensor_of_the_tower_has_memory(save_model, tmp_path: Path) -> None:
    whole = save_model(tmp_path)
    of_tower = {name for name, _ in whole.named_parameters() if "vision_tower" in name}

    model, _ = load_without_tower(str(tmp_path))

    held = dict(model.named_parameters())
    assert held.keys() == dict(whole.named_parameters()).keys() - of_tower
    assert not any("vision_tower" in name for name, _ in model.named_buffers())
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def test_the_projector_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    whole = save_plain(tmp_path)

    model, tokenizer = load_without_tower(str(tmp_path))

    inputs = prepare(model, tokenizer, PROMPTS, features(32), stage="pre_projector")
    expected = prepare(whole, tokenizer, PROMPTS, features(32), stage="pre_projector")
    assert torch.equal(model(**inputs).logits, whole(**expected).logits)


@torch.no_grad()
def test_it_generates_as_the_whole_model_does(tmp_path: Path) -> None:
    whole = save_plain(tmp_path)
    ends = GenerationConfig(eos_token_id=[61, 62], pad_token_id=0, max_new_tokens=5)
    ends.save_pretrained(tmp_path)

    model, tokenizer = load_without_tower(str(tmp_path))

    inputs = prepare(model, tokenizer, PROMPTS, features(24))
    whole.generation_config = ends
    assert model.generate(**inputs).tolist() == whole.generate(**inputs).tolist()
    assert model.generation_config.eos_token_id == [61, 62]


@pytest.mark.parametrize("new_names", [True, False])
def test_both_ways_to_name_the_tensors_are_read(new_names: bool, tmp_path: Path) -> None:
    whole = save_plain(tmp_path)
    if new_names:
        weights = {name: w.contiguous() for name, w in whole.state_dict().items()}
        save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    stored = set(load_file(tmp_path / WEIGHTS))

    model, _ = load_without_tower(str(tmp_path))

    assert ("model.language_model.norm.weight" in stored) is new_names
    expected = whole.model.language_model.state_dict()
    found = model.model.language_model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["chat_template.json", "chat_template.jinja"])
def test_the_processors_chat_template_is_found(name: str, tmp_path: Path) -> None:
    template = "{% for message in messages %}USER: {{ message.content }}{% endfor %} ASSISTANT:"
    save_plain(tmp_path)
    text = json.dumps({"chat_template": template}) if name.endswith("json") else template
    (tmp_path / name).write_text(text)

    _, tokenizer = load_without_tower(str(tmp_path))

    assert tokenizer.chat_template == template


def test_weights_are_in_the_type_asked_for(tmp_path: Path) -> None:
    whole = save_plain(tmp_path)

    model, _ = load_without_tower(str(tmp_path), dtype=torch.bfloat16)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight.bfloat16())


def test_pixels_are_refused(tmp_path: Path) -> None:
    save_llava(tmp_path)
    model, _ = load_without_tower(str(tmp_path))

    with pytest.raises(ConfigError, match=r"without its vision tower and cannot take pixel_values"):
        model(input_ids=torch.tensor([[1, IMAGE_ID]]), pixel_values=torch.zeros(1, 3, 28, 28))


def test_a_missing_tensor_of_the_language_model_is_named(tmp_path: Path) -> None:
    save_llava(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    missing = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    del weights[missing]
    save_file(weights, tmp_path / WEIGHTS)

    with pytest.raises(ConfigError, match=rf"lacks 1 of \d+ tensors, first '{missing}'"):
        load_without_tower(str(tmp_path))


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    save_vit(tmp_path, "clip")

    with pytest.raises(ConfigError, match=r"is a 'clip_vision_model', which cannot be loaded"):
        load_without_tower(str(tmp_path))
