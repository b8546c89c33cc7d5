"""What vLLM 0.33.0 itself makes of our inputs: its parsers, processors, schemas and decoders."""

import base64
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BatchFeature,
    CLIPVisionConfig,
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
)

from pipeline.consumers import vllm
from pipeline.consumers.vllm import grid_only_data, grid_only_part, image_part, multi_modal_data
from pipeline.types import TileLayout
from tests.carved_images import make_image
from tests.engine_source import StandIn, running_source, unpacked

ROOT = unpacked("vllm", "0.33.0")

MODELS = "vllm.model_executor.models"
NAMES = {
    # model type: file, class of the processor, class of the model
    "llava": ("llava", "LlavaMultiModalProcessor", "LlavaForConditionalGeneration"),
    "llava_next": (
        "llava_next",
        "LlavaNextMultiModalProcessor",
        "LlavaNextForConditionalGeneration",
    ),
    "llava_onevision": (
        "llava_onevision",
        "LlavaOnevisionMultiModalProcessor",
        "LlavaOnevisionForConditionalGeneration",
    ),
    "internvl": (
        "interns1",
        "InternS1MultiModalProcessor",
        "InternS1ForConditionalGeneration",
    ),
    "internvl_chat": ("internvl", "BaseInternVLMultiModalProcessor", "InternVLChatModel"),
    "qwen2_vl": ("qwen2_vl", "Qwen2VLMultiModalProcessor", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        "Qwen2_5_VLMultiModalProcessor",
        "Qwen2_5_VLForConditionalGeneration",
    ),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLMultiModalProcessor", "Qwen3VLForConditionalGeneration"),
    "paligemma": (
        "paligemma",
        "PaliGemmaMultiModalProcessor",
        "PaliGemmaForConditionalGeneration",
    ),
    "idefics3": (
        "idefics3",
        "Idefics3MultiModalProcessor",
        "Idefics3ForConditionalGeneration",
    ),
    "mistral3": (
        "mistral3",
        "Mistral3MultiModalProcessor",
        "Mistral3ForConditionalGeneration",
    ),
    "gemma3": ("gemma3_mm", "Gemma3MultiModalProcessor", "Gemma3ForConditionalGeneration"),
    "gemma3n": ("gemma3n_mm", "Gemma3nMultiModalProcessor", "Gemma3nForConditionalGeneration"),
    "gemma4": ("gemma4_mm", "Gemma4MultiModalProcessor", "Gemma4ForConditionalGeneration"),
}
REAL = (
    "vllm.utils.import_utils",
    "vllm.utils.collection_utils",
    "vllm.utils.jsontree",
    "vllm.utils.tensor_schema",
    "vllm.multimodal.inputs",
    "vllm.multimodal.parse",
    "vllm.multimodal.media.image",
    "vllm.multimodal.utils",
    "vllm.model_executor.models.utils",
    "vllm.renderers.chat_utils.item_tracker",
    *sorted({f"{MODELS}.{file}" for file, _, _ in NAMES.values()}),
)
# Not installed here, and imported beside what is run: image processing on pixels.
ABSENT = (
    "einops",
    "transformers.models.gemma3.image_processing_gemma3",
    "transformers.models.got_ocr2.image_processing_got_ocr2",
    "transformers.models.internvl.video_processing_internvl",
    "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    "transformers.models.qwen3_vl.video_processing_qwen3_vl",
)

WIDTH = 64
IMAGE = 5
TEXT = {"hidden_size": WIDTH}
END_OF_ROW = torch.full((WIDTH,), 9.0)
TILES = TileLayout(rows=1, columns=2, unpadded=(0, 4, 0, 8))
RECTANGLE = [7, 9, 10, 19, 21, 22]
CONFIGS = {
    "llava": LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig()),
    "llava_next": LlavaNextConfig(text_config=LlamaConfig(**TEXT)),
    "llava_onevision": LlavaOnevisionConfig(text_config={"model_type": "qwen2", **TEXT}),
    "internvl": InternVLConfig(text_config={"model_type": "qwen2", **TEXT}),
    "internvl_chat": SimpleNamespace(
        model_type="internvl_chat", llm_config=LlamaConfig(**TEXT), vision_config=SimpleNamespace()
    ),
    "qwen2_vl": Qwen2VLConfig(text_config=TEXT),
    "qwen2_5_vl": Qwen2_5_VLConfig(text_config=TEXT),
    "qwen3_vl": Qwen3VLConfig(
        text_config=TEXT, vision_config={"deepstack_visual_indexes": [1, 2, 3]}
    ),
}
FREE, GRIDDED = sorted(vllm.FREE), sorted(vllm.GRIDDED & CONFIGS.keys())


@pytest.fixture(scope="module")
def source() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pybase64", base64)  # the same calls, slower
        with running_source(ROOT, ("vllm", *ABSENT), REAL) as modules:
            yield modules


class Engine:
    """The way of an image through vLLM's own code, from the request to the model's schema."""

    def __init__(self, source: dict[str, ModuleType], kind: str) -> None:
        file, processor, model = NAMES[kind]
        self.source, self.kind = source, kind
        module = source[f"{MODELS}.{file}"]
        self.model = getattr(module, model)
        self.processor = getattr(module, processor)()
        self.processor.info = self._info()

    def _info(self) -> Any:
        info = StandIn()
        config = StandIn()
        config.image_token_index = IMAGE
        config.vision_config = PixtralVisionConfig(spatial_merge_size=2)
        info.get_hf_config = lambda: config
        info.get_image_processor = lambda **_: SimpleNamespace(merge_size=2)
        info.get_hf_processor = lambda **_: _HfProcessor()
        info.get_tokenizer = lambda: SimpleNamespace(
            get_vocab=lambda: dict.fromkeys(
                ("<image>", "<video>", "<IMG_CONTEXT>", "[B]", "[E]", "<vs>", "<ve>"), IMAGE
            ),
            bos_token_id=1,
            add_bos_token=True,
        )
        info.ctx = SimpleNamespace(
            model_config=SimpleNamespace(get_inputs_embeds_size=lambda: WIDTH),
            get_mm_config=lambda: SimpleNamespace(video_pruning_rate=None),
        )
        info.data_parser = self.parser()
        return info

    def parser(self, *, for_connector: bool = False) -> Any:
        options = {
            "expected_hidden_size": WIDTH,
            "allow_missing_mm_embeddings": for_connector,
        }
        if self.kind in GRIDDED:
            module = self.source[f"{MODELS}.qwen2_vl"]
            return module.Qwen2VLMultiModalDataParser(2, **options)
        return self.source["vllm.multimodal.parse"].MultiModalDataParser(**options)

    def parse(self, data: dict[str, Any], *, for_connector: bool = False) -> tuple[Any, Any]:
        """Return the parsed items, and what the engine keeps of each."""
        items = self.parser(for_connector=for_connector).parse_mm_data(data)
        given = BatchFeature(dict(items["image"].get_passthrough_data()))
        kept = self.source["vllm.multimodal.inputs"].MultiModalKwargsItems.from_hf_inputs(
            given, self.processor._get_mm_fields_config(given, {})
        )
        return items, kept

    def num_placeholders(self, items: Any, kept: Any) -> list[int]:
        """Return how many image tokens the processor writes into the prompt for each image."""
        update = self.processor._get_prompt_updates(items, {}, kept)[0].made_with
        replace = update.get("replacement") or update["insertion"]
        return [len(_ids(replace(n))) for n in range(len(items["image"]))]

    def encode(self, requests: Sequence[Any]) -> list[tuple[int, ...]]:
        """Return the shapes of features that the model has of the images of one step."""
        images = [image for kept in requests for image in kept["image"]]
        utils = self.source["vllm.multimodal.utils"]
        shapes: list[tuple[int, ...]] = []
        for _, batch in utils.group_and_batch_mm_items(images):
            model = _Model(self.model)
            inputs = self.model._parse_and_validate_image_input(model, **batch)
            process = f"_process_{'vision' if self.kind.startswith('intern') else 'image'}_input"
            features = getattr(self.model, process)(model, inputs)
            shapes += [tuple(feature.shape) for feature in features]
        return shapes


class _HfProcessor:
    image_token, video_token = "<image>", "<video>"
    image_break_token, image_end_token = "[B]", "[E]"
    image_token_id = IMAGE

    def __getattr__(self, name: str) -> Any:
        return StandIn()


class _Model:
    """A model without weights: what its methods read of it before the tower."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.config = SimpleNamespace(
            vision_config=SimpleNamespace(model_type="clip_vision_model"), text_config=StandIn()
        )
        self.visual = SimpleNamespace(dtype=torch.float32, spatial_merge_size=2)

    def __getattr__(self, name: str) -> Any:
        return StandIn()


def _ids(replacement: Any) -> Sequence[int]:
    return replacement if isinstance(replacement, list) else replacement.made_with["full"]


def width_of(kind: str) -> int:
    return 4 * WIDTH if kind == "qwen3_vl" else WIDTH


def images_of(kind: str, counts: Sequence[Sequence[int] | None]) -> list[Any]:
    tiles = TILES if kind in ("llava_next", "llava_onevision") else None
    grid = (1, 4, 6) if tiles is None else (3, 4, 4)
    return [
        make_image(
            f"k{n}", positions=positions, width=width_of(kind), seed=n, grid=grid, tiles=tiles
        )
        for n, positions in enumerate(counts)
    ]


def data_of(kind: str, images: Sequence[Any]) -> dict[str, Any]:
    return multi_modal_data(CONFIGS[kind], images, row_end=END_OF_ROW)


@pytest.mark.parametrize("kind", FREE)
def test_a_prompt_of_a_model_of_free_count_has_room_for_the_kept_tokens(source, kind):
    engine = Engine(source, kind)
    images = images_of(kind, [[1, 2, 3], [0, 9, 15]])

    items, kept = engine.parse(data_of(kind, images))

    assert [items["image"].get_feature_size(n) for n in range(2)] == [3, 3]
    if kind.startswith("llava"):
        assert engine.num_placeholders(items, kept) == [3, 3]
    assert engine.encode([kept, kept]) == [(3, WIDTH)] * 4


@pytest.mark.parametrize("kind", FREE)
def test_images_of_unequal_count_in_one_step_break_a_model_of_free_count(source, kind):
    engine = Engine(source, kind)
    one, other = (
        engine.parse(data_of(kind, images_of(kind, [positions])))[1]
        for positions in ([1, 2, 3], [0, 9])
    )

    with pytest.raises(ValueError, match="contains inconsistent shapes"):
        engine.encode([one, other])


@pytest.mark.parametrize("kind", GRIDDED)
def test_a_declared_grid_has_room_for_the_kept_tokens(source, kind):
    engine = Engine(source, kind)
    images = images_of(kind, [None, RECTANGLE])

    items, kept = engine.parse(data_of(kind, images))

    assert engine.num_placeholders(items, kept) == [24, 6]
    shapes = [(24, width_of(kind)), (6, width_of(kind))]
    assert engine.encode([kept]) == shapes
    assert engine.encode([kept, kept]) == shapes * 2


@pytest.mark.parametrize("kind", GRIDDED)
def test_the_model_sees_the_features_themselves(source, kind):
    engine = Engine(source, kind)
    (image,) = images_of(kind, [RECTANGLE])

    _, kept = engine.parse(data_of(kind, [image]))

    assert torch.equal(kept["image"][0]["image_embeds"].data, image.features)


@pytest.mark.parametrize("kind", FREE + GRIDDED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_content_parts_of_a_chat_arrive_as_the_same_features(source, kind, dtype):
    engine = Engine(source, kind)
    images = images_of(kind, [RECTANGLE, RECTANGLE])
    decoder = source["vllm.multimodal.media.image"].ImageEmbeddingMediaIO()
    parts = [
        image_part(CONFIGS[kind], image, dtype=dtype, row_end=END_OF_ROW)["image_embeds"]
        for image in images
    ]

    received = [
        decoder.load_base64("", part)
        if isinstance(part, str)
        else {k: decoder.load_base64("", v) if isinstance(v, str) else v for k, v in part.items()}
        for part in parts
    ]
    tracker = source["vllm.renderers.chat_utils.item_tracker"]
    data = {"image": tracker._get_embeds_data("image", received, engine.processor)}
    _, kept = engine.parse(data)

    given = data_of(kind, images)["image"]
    fed = given["image_embeds"].split(6) if isinstance(given, dict) else given
    assert engine.encode([kept]) == [tuple(rows.shape) for rows in fed]
    for item, rows in zip(kept["image"], fed, strict=True):
        assert torch.equal(item["image_embeds"].data, rows.to(dtype))


@pytest.mark.parametrize("kind", GRIDDED)
def test_a_consumer_with_a_connector_takes_the_grid_alone(source, kind):
    engine = Engine(source, kind)
    (image,) = images_of(kind, [RECTANGLE])
    config = CONFIGS[kind]
    tracker = source["vllm.renderers.chat_utils.item_tracker"]
    part = grid_only_part(config, image, uuid=image.key)["image_embeds"]

    offline = grid_only_data(config, [image])
    online = {"image": tracker._get_embeds_data("image", [part], engine.processor)}

    for data in (offline, online):
        items, kept = engine.parse(data, for_connector=True)
        assert list(kept["image"][0]) == ["image_grid_thw"]
        assert engine.num_placeholders(items, kept) == [6]
        with pytest.raises(ValueError, match="should contain the fields"):
            engine.parse(data)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_of_a_declared_grid_are_those_of_a_smaller_image(source, kind):
    engine = Engine(source, kind)
    (image,) = images_of(kind, [RECTANGLE])
    _, kept = engine.parse(data_of(kind, [image]))
    inputs = source["vllm.multimodal.inputs"]
    feature = inputs.MultiModalFeatureSpec(
        data=kept["image"][0],
        modality="image",
        identifier=image.key,
        mm_position=inputs.PlaceholderRange(offset=1, length=6),
    )
    owner = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    )
    owner.iter_mm_grid_thw = lambda features: engine.model.iter_mm_grid_thw(owner, features)
    owner.iter_mm_features = lambda features: engine.model.iter_mm_features(owner, features)

    positions, delta = engine.model.get_mrope_input_positions(owner, [9] * 8, [feature])

    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
    assert delta == -3


def features() -> dict[str, Any]:
    return {"image": [make_image("a").features]}


def test_a_plain_tensor_of_another_width_is_refused_by_vllm_too(source):
    with pytest.raises(ValueError, match="hidden dimension mismatch: got 32"):
        Engine(source, "llava").parse({"image": [make_image("a", width=32).features]})


def test_paligemma_loses_its_features_on_the_way(source):
    _, kept = Engine(source, "paligemma").parse(features())

    assert "image" not in kept
    assert PaliGemmaConfig.model_type in vllm.REFUSED


@pytest.mark.parametrize("kind", ["idefics3", "mistral3"])
def test_models_that_size_their_prompt_by_pixels_find_none(source, kind):
    engine = Engine(source, kind)
    items, kept = engine.parse(features())

    with pytest.raises(TypeError, match="ImageProcessorItems"):
        engine.num_placeholders(items, kept)
    assert kind in vllm.REFUSED


@pytest.mark.parametrize("kind", ["gemma3", "gemma3n", "gemma4"])
def test_models_that_want_pixels_say_so(source, kind):
    model = Engine(source, kind).model

    with pytest.raises(AssertionError, match="does not support image_embeds"):
        model._parse_and_validate_image_input(_Model(model), image_embeds=torch.ones(1, 2, WIDTH))
    assert kind in vllm.REFUSED
