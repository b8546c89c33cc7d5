"""Cached tokens as vLLM takes them; see `test_vllm_source.py` for vLLM's own judgement."""

import base64
import io
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SmolVLMConfig,
)

from pipeline import carvers
from pipeline.consumers import vllm
from pipeline.consumers.vllm import (
    count_buckets,
    declared_grid,
    grid_only_data,
    grid_only_part,
    image_part,
    multi_modal_data,
)
from pipeline.errors import ConfigError, KeyNotFoundError, NonFiniteError
from pipeline.types import TileLayout, VisualTokens
from tests.carved_images import make_cache, make_image

TEXT = {"hidden_size": 64}
LLAVA = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig())
QWEN = Qwen2_5_VLConfig(text_config=TEXT)
DEEPSTACK = Qwen3VLConfig(
    text_config=TEXT, vision_config={"deepstack_visual_indexes": [1, 3, 5], "out_hidden_size": 64}
)
TILES = TileLayout(rows=1, columns=2, unpadded=(0, 2, 0, 4))
RECTANGLE = [7, 9, 10, 19, 21, 22]  # rows 1 and 3, columns 1, 3 and 4 of a 4 x 6 grid


def decoded(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)


@pytest.mark.parametrize(
    "config",
    [LLAVA, InternVLConfig(text_config={"model_type": "qwen2", **TEXT})],
    ids=lambda c: c.model_type,
)
def test_models_of_free_count_take_a_list_of_features(config):
    images = [make_image("a", positions=[0, 5, 9]), make_image("b", positions=[1, 2, 3], seed=1)]

    data = multi_modal_data(config, images)

    assert [tuple(f.shape) for f in data["image"]] == [(3, 64), (3, 64)]
    assert torch.equal(data["image"][1], images[1].features)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2VLConfig(text_config=TEXT),
        QWEN,
        Qwen3VLMoeConfig(text_config=TEXT, vision_config={"deepstack_visual_indexes": []}),
    ],
    ids=lambda c: c.model_type,
)
def test_models_with_a_grid_take_the_features_in_one_and_a_grid_each(config):
    images = [make_image("a"), make_image("b", positions=RECTANGLE, seed=1)]

    data = multi_modal_data(config, images)["image"]

    assert data["image_embeds"].shape == (24 + 6, 64)
    assert torch.equal(data["image_embeds"][24:], images[1].features)
    assert data["image_grid_thw"].tolist() == [[1, 8, 12], [1, 4, 6]]
    assert data["image_grid_thw"].dtype == torch.int64


@pytest.mark.parametrize(
    "config",
    [
        LlavaNextConfig(text_config=LlamaConfig(**TEXT)),
        LlavaOnevisionConfig(text_config={"model_type": "qwen2", **TEXT}),
    ],
    ids=lambda c: c.model_type,
)
def test_rows_of_a_tiled_image_are_fed_with_their_ends(config):
    image = make_image("a", grid=(3, 2, 2), tiles=TILES)
    row_end = torch.full((64,), 9.0)
    stored = torch.cat([image.features, row_end[None]])
    end = len(image.features)

    (fed,) = multi_modal_data(config, [image], row_end=row_end)["image"]

    # The thumbnail, then a canvas of two rows over both tiles.
    order = [0, 1, 2, 3, 4, 5, 8, 9, end, 6, 7, 10, 11, end]
    assert torch.equal(fed, stored[order])
    part = image_part(config, image, dtype=torch.float32, row_end=row_end)
    assert np.array_equal(decoded(part["image_embeds"]), fed.numpy())


def test_a_dropped_row_has_no_end_and_padding_is_not_fed():
    config = LlavaNextConfig(text_config=LlamaConfig(**TEXT))
    row_end = torch.full((64,), 9.0)
    padded = replace(TILES, unpadded=(0, 2, 0, 3))
    image = make_image("a", grid=(3, 2, 2), positions=[1, 8, 9, 11], tiles=padded)

    (fed,) = multi_modal_data(config, [image], row_end=row_end)["image"]

    assert torch.equal(fed, torch.stack([*image.features[:2], row_end]))
    unseen = make_image("a", grid=(3, 2, 2), positions=[9, 11], tiles=padded)
    with pytest.raises(ValueError, match="image 0 kept only tokens that lie in its padding"):
        multi_modal_data(config, [unseen], row_end=row_end)


def test_the_end_of_a_row_is_asked_for_where_a_model_has_one():
    config = LlavaNextConfig(text_config=LlamaConfig(**TEXT))
    image = make_image("a", grid=(3, 2, 2), tiles=TILES)

    with pytest.raises(ConfigError, match=r"ends each row .* and none is given; .*\(64,\)"):
        multi_modal_data(config, [image])
    with pytest.raises(ConfigError, match=r"one of the shape \(32,\) is given"):
        multi_modal_data(config, [image], row_end=torch.zeros(32))


def test_internvl_is_fed_the_thumbnail_last():
    config = InternVLConfig(text_config={"model_type": "qwen2", **TEXT})
    image = make_image("a", grid=(3, 2, 2), positions=[0, 3, 4, 10], tiles=TILES)

    (fed,) = multi_modal_data(config, [image])["image"]

    assert torch.equal(fed, image.features[[2, 3, 0, 1]])


def test_an_image_carved_for_another_kind_of_model_is_refused():
    tiled, whole = make_image("a", grid=(3, 2, 2), tiles=TILES), make_image("b")

    with pytest.raises(ConfigError, match="'llava' see an image whole"):
        multi_modal_data(LLAVA, [tiled])
    with pytest.raises(ConfigError, match="'llava_next' see an image in tiles"):
        multi_modal_data(LlavaNextConfig(text_config=LlamaConfig(**TEXT)), [whole])


def test_deepstack_planes_lie_side_by_side():
    image = make_image("a", width=4 * 64)

    data = multi_modal_data(DEEPSTACK, [image])["image"]

    assert data["image_embeds"].shape == (24, 256)
    with pytest.raises(ConfigError, match="are 64 wide and a qwen3_vl of this config takes 256"):
        multi_modal_data(DEEPSTACK, [make_image("a")])


def test_images_of_one_prompt_must_have_equal_counts_where_vllm_wants_that():
    images = [make_image("a", positions=[0, 5, 9]), make_image("b", positions=[1, 2])]

    with pytest.raises(ValueError, match=r"take 2, 3 tokens.* see count_buckets"):
        multi_modal_data(LLAVA, images)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma3Config(), "asserts that Gemma 3 is given pixels"),
        (PaliGemmaConfig(), "drops image_embeds"),
        (Idefics3Config(), "sizes its prompt by the pixels"),
        (SmolVLMConfig(), "sizes its prompt by the pixels"),
    ],
    ids=lambda c: getattr(c, "model_type", ""),
)
def test_models_that_take_pixels_only_are_refused_by_name(config, reason):
    with pytest.raises(ConfigError, match=f"'{config.model_type}' cannot be served .*{reason}"):
        multi_modal_data(config, [make_image("a")])


def test_a_llava_with_a_pixtral_tower_is_refused():
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=PixtralVisionConfig())

    with pytest.raises(ConfigError, match="tower of type 'pixtral'"):
        multi_modal_data(config, [make_image("a")])


def test_a_model_that_nobody_tried_is_refused():
    class Unknown(LlavaConfig):
        model_type = "unheard_of"

    config = Unknown(text_config=LlamaConfig(**TEXT))

    with pytest.raises(ConfigError, match=r"'unheard_of' are not known .*; known: internvl, "):
        multi_modal_data(config, [make_image("a")])


def test_no_images_and_codes_are_refused():
    codes = make_image("a")
    object.__setattr__(codes, "features", torch.ones(24, 64, dtype=torch.int8))

    with pytest.raises(ValueError, match="no images"):
        multi_modal_data(LLAVA, [])
    with pytest.raises(ValueError, match=r"image 0 are torch\.int8 .*floating point"):
        multi_modal_data(LLAVA, [codes])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_content_part_is_json_and_brings_back_the_features(dtype):
    image = make_image("a", positions=[0, 5, 9])

    part = json.loads(json.dumps(image_part(LLAVA, image, uuid="a@3", dtype=dtype)))

    assert set(part) == {"type", "image_embeds", "uuid"}
    assert (part["type"], part["uuid"]) == ("image_embeds", "a@3")
    assert base64.b64decode(part["image_embeds"])[:6] == b"\x93NUMPY"
    assert torch.equal(torch.from_numpy(decoded(part["image_embeds"])), image.features.to(dtype))


def test_a_content_part_of_a_model_with_a_grid_names_the_grid():
    image = make_image("a", positions=RECTANGLE)

    part = json.loads(json.dumps(image_part(QWEN, image, dtype=torch.float32)))

    assert set(part) == {"type", "image_embeds"}  # no uuid: vLLM hashes the numbers
    assert part["image_embeds"]["image_grid_thw"] == [1, 4, 6]
    assert np.array_equal(decoded(part["image_embeds"]["image_embeds"]), image.features.numpy())


def test_numbers_that_do_not_fit_are_not_sent():
    image = make_image("a")
    image.features[3, 5] = 7e4

    with pytest.raises(NonFiniteError, match=r"up to 70000 do not fit into torch\.float16"):
        image_part(LLAVA, image)
    with pytest.raises(ConfigError, match=r"torch\.bfloat16: \.npy can carry"):
        image_part(LLAVA, image, dtype=torch.bfloat16)
    assert decoded(image_part(LLAVA, image, dtype=torch.float32)["image_embeds"])[3, 5] == 7e4


def test_a_request_for_a_connector_carries_the_grid_alone():
    image = make_image("some/key", positions=RECTANGLE)

    data = grid_only_data(QWEN, [make_image("b"), image])["image"]
    part = grid_only_part(QWEN, image, uuid=image.key)

    assert list(data) == ["image_grid_thw"]
    assert data["image_grid_thw"].tolist() == [[1, 8, 12], [1, 4, 6]]
    assert part == {
        "type": "image_embeds",
        "image_embeds": {"image_grid_thw": [1, 4, 6]},
        "uuid": "some/key",
    }
    with pytest.raises(ConfigError, match="cannot size the prompt of a llava without its features"):
        grid_only_data(LLAVA, [image])


@pytest.mark.parametrize(
    ("positions", "grid"),
    [
        ([0], (1, 2, 2)),
        (RECTANGLE, (1, 4, 6)),
        ([2, 8, 14, 20], (1, 8, 2)),
        ([6, 7, 8, 9, 10, 11], (1, 2, 12)),
        (None, (1, 8, 12)),
    ],
)
def test_kept_rows_and_columns_declare_a_smaller_grid(positions, grid):
    assert declared_grid(make_image("a", positions=positions), 2) == grid


@pytest.mark.parametrize("positions", [[0, 7], [7, 9, 10, 19, 21], [0, 1, 2, 6]])
def test_tokens_that_do_not_fill_rows_and_columns_are_refused(positions):
    with pytest.raises(ValueError, match=r"do not fill them.*carve with identity or average_pool"):
        declared_grid(make_image("a", positions=positions), 2)


def test_a_clip_is_refused():
    with pytest.raises(ValueError, match=r"grid \(2, 4, 6\) is of a clip of 2 frames"):
        multi_modal_data(QWEN, [make_image("a", grid=(2, 4, 6))])


def carved(name: str, grid: tuple[int, int], keep_tokens: int):
    tokens = VisualTokens(
        features=torch.randn(1, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(0)),
        grid=grid,
    )
    options = {} if name == "identity" else {"keep_tokens": keep_tokens}
    (result,) = carvers.build(name, options).carve(tokens)
    return make_image("a", grid=(1, *grid), positions=result.positions.tolist())


@pytest.mark.parametrize("name", vllm.RECTANGULAR)
@pytest.mark.parametrize("grid", [(24, 24), (8, 12), (13, 20), (30, 7)], ids=str)
@pytest.mark.parametrize("keep_tokens", [1, 4, 7, 16, 25, 64])
def test_carvers_said_to_be_rectangular_are(name, grid, keep_tokens):
    image = carved(name, grid, keep_tokens)

    _, rows, columns = declared_grid(image, 1)

    assert rows * columns == len(image.positions)


def test_an_even_spread_is_no_rectangle():
    with pytest.raises(ValueError, match="do not fill them"):
        declared_grid(carved("uniform_grid", (24, 24), 64), 2)


def test_buckets_hold_each_image_under_the_largest_count_it_can_give(tmp_path):
    images = [
        make_image("k0", positions=range(5)),
        make_image("k1", positions=range(8)),
        make_image("k2", positions=range(24)),
        make_image("k3", positions=range(7)),
    ]
    cache = make_cache(str(tmp_path), images)

    buckets = count_buckets(cache, ["k3", "k2", "k1", "k0"], [5, 8, 16])

    assert list(buckets.items()) == [(16, ["k2"]), (8, ["k1"]), (5, ["k3", "k0"])]
    assert list(count_buckets(cache.keeping(8), ["k2"], [5, 8, 16])) == [8]
    read = cache.keeping(5).get_many(buckets[5])
    assert [len(f) for f in multi_modal_data(LLAVA, read)["image"]] == [5, 5]
    # The most important ones: the ranks of these images run against the positions.
    assert torch.equal(read[0].features, images[3].features[2:])


READ = """
import sys
from types import SimpleNamespace
sys.modules.update(dict.fromkeys(["ray", "transformers", "webdataset"]))  # cannot be imported
import pipeline
from pipeline.consumers import sglang, vllm
text = SimpleNamespace(hidden_size=64)
config = SimpleNamespace(
    model_type="qwen2_5_vl", get_text_config=lambda: text, image_token_id=5,
    vision_config=SimpleNamespace(spatial_merge_size=2),
)
image = pipeline.open_cache(sys.argv[1])["some/key"]
print(vllm.multi_modal_data(config, [image])["image"]["image_embeds"].shape[0])
print(len(sglang.generate_inputs(config, [1, 5], [image])["input_ids"]))
"""


def test_an_engine_needs_neither_transformers_nor_ray_of_ours(tmp_path):
    make_cache(str(tmp_path), [make_image("some/key")])

    command = [sys.executable, "-c", READ, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.stdout.split(), done.stderr) == (["24", "25"], "")


def test_buckets_without_room_for_an_image_are_refused(tmp_path):
    cache = make_cache(str(tmp_path), [make_image("k", positions=range(5))])

    with pytest.raises(ValueError, match="image 'k' has 5 tokens, fewer than the smallest count 6"):
        count_buckets(cache, ["k"], [8, 6])
    with pytest.raises(ValueError, match=r"counts=\[0\]: give at least one"):
        count_buckets(cache, ["k"], [0])
    with pytest.raises(KeyNotFoundError):
        count_buckets(cache, ["other"], [4])
