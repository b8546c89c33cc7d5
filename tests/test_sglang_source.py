"""What SGLang 0.5.23 itself makes of our inputs: its processors, and how features meet a prompt.

Needs msgspec beside the unpacked wheel.
"""

import asyncio
from array import array
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BaseImageProcessor,
    CLIPVisionModel,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionModel,
)
from transformers.models.auto import modeling_auto, processing_auto
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from pipeline.consumers import sglang
from pipeline.consumers.sglang import generate_inputs
from tests.carved_images import make_image
from tests.engine_source import running_source, unpacked

ROOT = unpacked("sglang", "0.5.23")
pytest.importorskip("msgspec", reason="SGLang's items are structs of msgspec: pip install msgspec")

# Loaded before torchvision has a stand-in, which they must not see.
BEFORE = (
    BaseImageProcessor,
    CLIPVisionModel,
    SiglipVisionModel,
    LlavaMultiModalProjector,
    modeling_auto,
    processing_auto,
)
SRT = "sglang.srt"
PROCESSORS = f"{SRT}.multimodal.processors"
REAL = (
    f"{SRT}.environ",
    f"{SRT}.multimodal.modality",
    f"{SRT}.multimodal.cache.identity",
    f"{SRT}.managers.schedule_batch",
    f"{SRT}.managers.mm_schedule",
    f"{SRT}.managers.mm_utils",
    f"{PROCESSORS}.base_processor",
    f"{SRT}.managers.multimodal_processor",
    f"{PROCESSORS}.qwen_vl",
    f"{PROCESSORS}.internvl",
    f"{PROCESSORS}.gemma3",
    f"{PROCESSORS}.llava",
    f"{SRT}.models.qwen3_vl",
    f"{SRT}.models.llava",
)
IMAGE, START, END = 5, 10, 11
WIDTH = 64
TEXT = {"hidden_size": WIDTH}
TOKENS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}
GEMMA = SimpleNamespace(
    model_type="gemma3",
    get_text_config=lambda: LlamaConfig(**TEXT),
    vision_config=SimpleNamespace(),
    image_token_id=IMAGE,
    image_token_index=IMAGE,
    boi_token_index=START,
    eoi_token_index=END,
)
INTERNVL = SimpleNamespace(
    model_type="internvl_chat",
    llm_config=LlamaConfig(**TEXT),
    vision_config=SimpleNamespace(image_size=448, patch_size=14),
    downsample_ratio=0.5,
)
CONFIGS = {
    "qwen2_vl": Qwen2VLConfig(text_config=TEXT, **TOKENS),
    "qwen2_5_vl": Qwen2_5_VLConfig(text_config=TEXT, **TOKENS),
    "qwen3_vl": Qwen3VLConfig(
        text_config=TEXT, vision_config={"deepstack_visual_indexes": [1, 2]}, **TOKENS
    ),
    "gemma3": GEMMA,
    "internvl_chat": INTERNVL,
}
CLASSES = {
    "gemma3": ("gemma3", "Gemma3SGLangImageProcessor"),
    "internvl_chat": ("internvl", "InternVLProcessor"),
}
PROMPT = [1, START, IMAGE, END, 2, 3, START, IMAGE, END, 4]
KEPT = ([1, 4, 8, 20], [0, 7, 23])


@pytest.fixture(scope="module")
def source() -> Iterator[dict[str, ModuleType]]:
    with (
        running_source(ROOT, ("sglang", "einops", "torchvision"), REAL) as modules,
        pytest.MonkeyPatch.context() as patch,
    ):
        base = modules[f"{PROCESSORS}.base_processor"]
        settings = SimpleNamespace(
            allowed_media_domains=None,
            media_url_max_file_size_mb=1,
            mm_feature_transport="cpu",
            image_processor_backend="pil",
            disable_fast_image_processor=True,
            mm_process_config={},
            mm_preprocess_cache_size_mb=0,
            trust_mm_content_hashes=False,
            mm_io_worker_num=1,
            mm_processor_worker_num=1,
        )
        patch.setattr(base, "get_mm", lambda: settings)
        serving = SimpleNamespace(skip_tokenizer_init=False, tokenizer_worker_num=1)
        patch.setattr(base, "get_serving", lambda: serving)
        patch.setattr(base.BaseMultimodalProcessor, "_create_cpu_executor", lambda self: None)
        identity = modules[f"{SRT}.multimodal.cache.identity"]
        # They reach these through packages whose own files are not run.
        import sglang.srt.multimodal.cache as cache

        patch.setattr(cache, "resolve_multimodal_item_hash", identity.resolve_multimodal_item_hash)
        patch.setattr(
            modules[f"{SRT}.managers.mm_utils"],
            "flatten_nested_list",
            lambda nested: [value for part in nested for value in part],
        )
        yield modules


class _Tokenizer:
    """Ids of the few tokens that processors ask for."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return []

    def __call__(self, text: str, **_: Any) -> Any:
        assert text == ""
        return SimpleNamespace(input_ids=torch.zeros(1, 0))

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<IMG_CONTEXT>": IMAGE, "<img>": START, "</img>": END}.get(token, 30)

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        return [f"<{i}>" for i in ids] if isinstance(ids, list) else f"<{ids}>"


def process(source: dict[str, ModuleType], kind: str, inputs: dict[str, Any]) -> Any:
    """Return what SGLang's processor for a kind of model makes of a request."""
    file, name = CLASSES.get(kind, ("qwen_vl", "QwenVLImageProcessor"))
    kind_of_processor = getattr(source[f"{PROCESSORS}.{file}"], name)
    hf_processor = SimpleNamespace(tokenizer=_Tokenizer())
    processor = kind_of_processor(
        CONFIGS[kind], SimpleNamespace(max_context_len=4096), hf_processor, "default"
    )
    request = SimpleNamespace(video_data=None, audio_data=None, rid="r")
    try:
        return asyncio.run(
            processor.process_mm_data_async(
                image_data=inputs["image_data"],
                input_text=inputs["input_ids"],
                request_obj=request,
            )
        )
    finally:
        processor.io_executor.shutdown()


def images_of(kind: str) -> list[Any]:
    width = 3 * WIDTH if kind == "qwen3_vl" else WIDTH
    return [make_image(f"k{n}", positions=kept, width=width, seed=n) for n, kept in enumerate(KEPT)]


def request_of(kind: str) -> dict[str, Any]:
    token = IMAGE if kind == "internvl_chat" else None
    return generate_inputs(CONFIGS[kind], PROMPT, images_of(kind), image_token_id=token)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_processor_takes_the_request_as_it_is(source, kind):
    inputs = request_of(kind)

    output = process(source, kind, inputs)

    assert output.input_ids == inputs["input_ids"]
    items = output.mm_items
    assert [offset for item in items for offset in item.offsets] == [(2, 5), (10, 12)]
    features = torch.cat([item.precomputed_embeddings for item in items])
    assert torch.equal(features, torch.cat([i.features for i in images_of(kind)]))
    assert all(item.feature is None for item in items)  # nothing for the tower
    assert [item.hash for item in items] == [inputs["image_data"][0]["hash"]]
    if kind in sglang.PLACED:
        (item,) = inputs["image_data"]
        assert torch.equal(output.mrope_positions, item["mrope_positions"])
        assert torch.equal(output.mrope_position_delta, item["mrope_position_delta"])
        assert output.mrope_positions.shape == (3, len(output.input_ids))


def padded(source: dict[str, ModuleType], output: Any) -> list[int]:
    """Return the ids as the scheduler holds them: an image's are numbers made of its hash."""
    if output.padded_input_ids is not None:
        return output.padded_input_ids
    ids = source[f"{SRT}.managers.mm_utils"].pad_mm_token_pairs(
        array("q", output.input_ids), output, data_token_pairs=[(START, END)]
    )
    return ids.tolist()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("cut", [14, 4, 6, 11], ids=lambda c: f"prefill in chunks of {c}")
def test_features_meet_their_places_in_the_prompt(source, kind, cut):
    output = process(source, kind, request_of(kind))
    utils = source[f"{SRT}.managers.mm_utils"]
    image = source[f"{SRT}.multimodal.modality"].Modality.IMAGE
    ids = padded(source, output)
    embedding = torch.nn.Embedding(32, WIDTH)
    model = SimpleNamespace(
        num_deepstack_embeddings=2,
        deepstack_visual_indexes=[1, 2],
        config=SimpleNamespace(hidden_size=WIDTH),
    )
    split = source[f"{SRT}.models.qwen3_vl"].Qwen3VLForConditionalGeneration
    model.separate_deepstack_embeds = lambda rows: split.separate_deepstack_embeds(model, rows)

    pieces, planes = [], []
    for start in range(0, len(ids), cut):
        chunk = ids[start : start + cut]
        embeds, other = utils.embed_mm_inputs(
            mm_inputs_list=[output],
            extend_prefix_lens=[start],
            extend_seq_lens=[len(chunk)],
            input_ids=torch.tensor(chunk),
            input_embedding=embedding,
            multimodal_model=model,
            data_embedding_func_mapping={image: _no_tower},
            use_deepstack={image: True} if kind == "qwen3_vl" else {},
        )
        pieces.append(embeds)
        planes.append(other.get("input_deepstack_embeds", torch.zeros(len(chunk), 0)))

    found = torch.cat([torch.cat(pieces), torch.cat(planes)], dim=1).detach()
    features = torch.cat([i.features for i in images_of(kind)])
    at_images = [*range(2, 6), *range(10, 13)]
    at_text = [n for n in range(len(ids)) if n not in at_images]
    text = embedding(torch.tensor(output.input_ids)[at_text]).detach()
    assert torch.equal(found[at_images], features)
    assert torch.equal(found[at_text][:, :WIDTH], text)
    assert not found[at_text][:, WIDTH:].any()


def _no_tower(items: Any) -> Any:
    raise AssertionError("the tower runs")


@pytest.mark.parametrize("kind", ["qwen3_vl"])
def test_whole_images_stand_where_sglang_would_put_them(source, kind):
    images = [
        make_image("a", grid=(1, 2, 7), width=3 * WIDTH),
        make_image("b", grid=(1, 6, 3), width=3 * WIDTH),
    ]
    inputs = generate_inputs(CONFIGS[kind], PROMPT, images)
    (item,) = inputs["image_data"]
    batch = source[f"{SRT}.managers.schedule_batch"]
    items = [
        batch.MultimodalDataItem(
            modality=batch.Modality.IMAGE,
            offsets=[offset],
            model_specific_data={"image_grid_thw": torch.tensor([[1, 2 * h, 2 * w]])},
        )
        for offset, (_, h, w) in zip(item["offsets"], (i.grid for i in images), strict=True)
    ]
    qwen = source[f"{PROCESSORS}.qwen_vl"].QwenVLImageProcessor
    owner = SimpleNamespace(
        model_type=kind, _spatial_merge_size=2, _as_grid_batch=qwen._as_grid_batch
    )

    positions, delta = qwen._compute_image_only_mrope_positions_from_offsets(
        owner, len(inputs["input_ids"]), items, torch.long, torch.device("cpu")
    )

    assert torch.equal(item["mrope_positions"], positions.squeeze(1))
    assert torch.equal(item["mrope_position_delta"], delta)


def test_a_request_brings_all_its_images_in_one_item(source):
    base = source[f"{PROCESSORS}.base_processor"].BaseMultimodalProcessor
    (item,) = request_of("qwen2_5_vl")["image_data"]

    base.validate_mm_data([item])
    with pytest.raises(ValueError, match="you must pass exactly one item"):
        base.validate_mm_data([item, item])


def test_a_llava_runs_its_tower_whatever_it_is_given(source):
    """So it is refused: as `processor_output` it fails, as `feature` the tower gets the tokens."""
    (item,) = request_of("qwen2_5_vl")["image_data"]
    processor = object.__new__(source[f"{PROCESSORS}.llava"].LlavaImageProcessor)
    model = SimpleNamespace(vision_feature_layer=-1, vision_tower=_Tower())
    llava = source[f"{SRT}.models.llava"].LlavaForConditionalGeneration

    with pytest.raises(KeyError, match="feature"):
        processor._process_precomputed_image_data([dict(item)])
    output = processor._process_precomputed_image_data(
        [{"format": "precomputed_embedding", "feature": item["precomputed_embeddings"]}]
    )
    with pytest.raises(AssertionError, match="the tower runs"):
        llava.get_image_feature(model, output.mm_items)
    assert {"llava", "llava_next", "llava_onevision"} <= sglang.REFUSED.keys()


class _Tower:
    def __call__(self, *_: Any, **__: Any) -> Any:
        _no_tower(None)


@pytest.mark.parametrize("kind", ["paligemma", "idefics3", "smolvlm"])
def test_models_that_sglang_does_not_have(kind):
    files: Sequence[str] = [p.stem for p in (ROOT / "sglang" / "srt" / "models").glob("*.py")]

    assert len(files) > 50
    assert not [name for name in files if name.startswith(kind)]
    assert kind in sglang.REFUSED
