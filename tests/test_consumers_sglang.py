"""Cached tokens as SGLang takes them; see `test_sglang_source.py` for SGLang's own judgement."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from pipeline.consumers.sglang import generate_inputs, mrope_positions
from pipeline.errors import ConfigError
from pipeline.types import TileLayout
from tests.carved_images import make_image

IMAGE = 5
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 32,
}
VISION = {"depth": 1, "num_heads": 2}
QWEN = Qwen2_5_VLConfig(text_config=TEXT, image_token_id=IMAGE)
# A config of remote code, which is not run: the same fields.
INTERNVL = SimpleNamespace(
    model_type="internvl_chat", llm_config=LlamaConfig(**TEXT), vision_config=SimpleNamespace()
)
MODELS = {
    "qwen2_vl": (Qwen2VLModel, Qwen2VLConfig, {**VISION, "embed_dim": 32, "hidden_size": 64}),
    "qwen2_5_vl": (
        Qwen2_5_VLModel,
        Qwen2_5_VLConfig,
        {**VISION, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64},
    ),
    "qwen3_vl": (
        Qwen3VLModel,
        Qwen3VLConfig,
        {
            **VISION,
            "hidden_size": 32,
            "intermediate_size": 32,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
        },
    ),
}
PROMPTS = {
    "one image": [1, 2, IMAGE, 3],
    "an image first": [IMAGE, 3, 4],
    "an image last": [3, 4, IMAGE],
    "three images": [1, IMAGE, 2, 2, 2, IMAGE, 3, IMAGE, 4, 4],
}
# A wide, a tall and a square one, so that text goes on after the rows or the columns.
GRIDS = [(1, 2, 7), (1, 6, 3), (1, 4, 4)]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    model_class, config_class, vision = MODELS[request.param]
    torch.manual_seed(0)
    config = config_class(text_config=TEXT, vision_config=vision, image_token_id=IMAGE)
    return model_class(config).eval()


def reference(model, input_ids, images):
    """Return transformers' positions of the whole images: (3, T), and the delta."""
    counts = iter([len(image.positions) for image in images])
    ids = [i for token in input_ids for i in [token] * (next(counts) if token == IMAGE else 1)]
    ids = torch.tensor([ids])
    grids = [(t, 2 * h, 2 * w) for t, h, w in (image.grid for image in images)]
    positions, delta = model.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == IMAGE).int(),
        image_grid_thw=torch.tensor(grids),
    )
    return positions[:, 0], int(delta)


def whole_images(prompt):
    return [make_image(f"k{i}", grid=GRIDS[i], seed=i) for i in range(prompt.count(IMAGE))]


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_all_tokens_stand_where_transformers_puts_them(model, prompt):
    images = whole_images(prompt)

    positions, delta = mrope_positions(prompt, images, image_token_id=IMAGE)

    expected, expected_delta = reference(model, prompt, images)
    assert torch.equal(positions, expected)
    assert delta == expected_delta


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("seed", range(3))
def test_kept_tokens_stand_where_they_stood_among_all(model, prompt, seed):
    images = whole_images(prompt)
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(len(i.positions), generator=generator) < 0.4 for i in images]
    kept = [
        replace(image, features=image.features[mask], positions=image.positions[mask])
        for image, mask in zip(images, masks, strict=True)
    ]

    positions, delta = mrope_positions(prompt, kept, image_token_id=IMAGE)

    whole, whole_delta = reference(model, prompt, images)
    rest = iter(masks)
    stays = torch.cat([next(rest) if token == IMAGE else torch.ones(1).bool() for token in prompt])
    assert torch.equal(positions, whole[:, stays])
    # What decoding counts from is the same position, whatever was dropped.
    assert delta + positions.shape[1] == whole_delta + whole.shape[1]


def test_positions_of_a_hand_made_example():
    image = make_image("a", grid=(1, 2, 5), positions=[1, 4, 8])

    positions, delta = mrope_positions([7, IMAGE, 8, 9], [image], image_token_id=IMAGE)

    assert positions.tolist() == [
        [0, 1, 1, 1, 6, 7],
        [0, 1, 1, 2, 6, 7],
        [0, 2, 5, 4, 6, 7],
    ]
    assert delta == 2  # the eighth position follows six tokens


def test_a_request_to_a_model_with_places():
    images = [make_image("a", positions=[1, 4, 8]), make_image("b", positions=[0, 23], seed=1)]

    inputs = generate_inputs(QWEN, [1, IMAGE, 2, IMAGE], images)

    assert inputs["input_ids"] == [1, IMAGE, IMAGE, IMAGE, 2, IMAGE, IMAGE]
    (item,) = inputs["image_data"]
    assert set(item) == {
        "format",
        "precomputed_embeddings",
        "offsets",
        "hash",
        "mrope_positions",
        "mrope_position_delta",
    }
    assert item["format"] == "processor_output"
    assert item["offsets"] == [(1, 3), (5, 6)]
    assert torch.equal(item["precomputed_embeddings"], torch.cat([i.features for i in images]))
    assert item["mrope_positions"].shape == (3, 7)
    assert item["mrope_positions"].dtype == torch.int64
    assert item["mrope_position_delta"].tolist() == [[1 + 6 + 1 + 6 - 7]]


@pytest.mark.parametrize(
    ("config", "token"),
    [
        (Gemma3Config(text_config={"hidden_size": 64}, image_token_id=IMAGE), None),
        (
            INTERNVL,
            IMAGE,
        ),
    ],
    ids=lambda c: getattr(c, "model_type", ""),
)
def test_a_request_to_a_model_whose_images_stand_like_words(config, token):
    image = make_image("a", positions=[1, 4, 8])

    inputs = generate_inputs(config, [1, IMAGE, 2], [image], image_token_id=token)

    (item,) = inputs["image_data"]
    assert inputs["input_ids"] == [1, IMAGE, IMAGE, IMAGE, 2]
    assert set(item) == {"format", "precomputed_embeddings", "offsets", "hash"}
    assert item["offsets"] == [(1, 3)]


def test_internvl_is_fed_the_thumbnail_last():
    tiles = TileLayout(rows=1, columns=2, unpadded=(0, 2, 0, 4))
    image = make_image("a", grid=(3, 2, 2), positions=[0, 3, 4, 10], tiles=tiles)

    inputs = generate_inputs(INTERNVL, [1, IMAGE, 2], [image], image_token_id=IMAGE)

    (item,) = inputs["image_data"]
    assert torch.equal(item["precomputed_embeddings"], image.features[[2, 3, 0, 1]])


def hash_of(*images):
    inputs = generate_inputs(QWEN, [IMAGE] * len(images), images)
    return inputs["image_data"][0]["hash"]


def test_the_hash_tells_tokens_and_places_apart():
    image = make_image("a", positions=[1, 4, 8])
    others = [
        replace(image, features=image.features + 1),
        replace(image, features=image.features.bfloat16()),
        replace(image, positions=torch.tensor([1, 4, 9])),
        replace(image, grid=(1, 6, 4)),
    ]

    hashes = [hash_of(image), *map(hash_of, others), hash_of(image, image)]

    assert hash_of(replace(image, key="another")) == hashes[0]
    assert len(set(hashes)) == 6
    assert all(0 <= h < 1 << 64 for h in hashes)


def test_models_that_sglang_gives_to_the_tower_are_refused():
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), image_token_id=IMAGE)

    with pytest.raises(ConfigError, match=r"'llava' cannot be served .*runs the vision tower"):
        generate_inputs(config, [IMAGE], [make_image("a")])


def test_images_and_image_tokens_must_be_as_many():
    with pytest.raises(ValueError, match=r"1 images for 2 image tokens \(id 5\)"):
        generate_inputs(QWEN, [IMAGE, 1, IMAGE], [make_image("a")])


def test_a_clip_and_a_token_outside_its_grid_are_refused():
    with pytest.raises(ValueError, match=r"grid \(2, 4, 6\) is of a clip of 2 frames"):
        generate_inputs(QWEN, [IMAGE], [make_image("a", grid=(2, 4, 6))])
    with pytest.raises(ValueError, match="image 0 has a token at position 24"):
        generate_inputs(QWEN, [IMAGE], [make_image("a", positions=[3, 24])])


def test_an_image_token_that_the_config_does_not_name_is_asked_for():
    with pytest.raises(ConfigError, match="names no image token; give image_token_id"):
        generate_inputs(INTERNVL, [IMAGE], [make_image("a")])
