"""Small models of every family with random weights, with the image processor each is used with.

Published settings in small: the same kinds of layers, several tiles, more than one size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tests.encoders.tiny_models import TEXT, VISION, randomize, save_processor, save_tokenizer

IMAGE_ID = 60
QWEN_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
}
QWEN_IDS = {
    "image_token_id": IMAGE_ID,
    "video_token_id": 61,
    "vision_start_token_id": 58,
    "vision_end_token_id": 59,
}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's small model is made, and what it makes of an image."""

    encoder: str
    model: Callable[[], transformers.PreTrainedModel]
    processor: Mapping[str, Any]
    asks: Mapping[str, Any] | None = None  # what its own processor asks of the image processor


def llava_next() -> transformers.PreTrainedModel:
    return transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            vision_config={"model_type": "clip_vision_model", **VISION},
            text_config=TEXT,
            image_token_index=IMAGE_ID,
            image_grid_pinpoints=PINPOINTS,
        )
    )


def llava_onevision() -> transformers.PreTrainedModel:
    return transformers.LlavaOnevisionForConditionalGeneration(
        transformers.LlavaOnevisionConfig(
            vision_config=SIGLIP,
            text_config={**TEXT, "model_type": "qwen2"},
            image_token_index=IMAGE_ID,
            image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56], [84, 84]],
            vision_aspect_ratio="anyres_max_2",
        )
    )


def paligemma() -> transformers.PreTrainedModel:
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config={**SIGLIP, "vision_use_head": False, "projection_dim": 24},
            text_config={**TEXT, "model_type": "gemma", "head_dim": 6},
            image_token_index=IMAGE_ID,
            projection_dim=24,
        )
    )


def gemma3() -> transformers.PreTrainedModel:
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            vision_config={**SIGLIP, "vision_use_head": False},
            text_config={
                **TEXT,
                "model_type": "gemma3_text",
                "head_dim": 6,
                "query_pre_attn_scalar": 6,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            },
            mm_tokens_per_image=4,
            image_token_index=IMAGE_ID,
            boi_token_index=58,
            eoi_token_index=59,
        )
    )


def internvl(**vision: Any) -> transformers.PreTrainedModel:
    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            vision_config={
                **VISION,
                "image_size": [EDGE, EDGE],
                "patch_size": [7, 7],
                "attention_bias": True,
                **vision,
            },
            text_config={**TEXT, "model_type": "qwen2"},
            image_token_id=IMAGE_ID,
        )
    )


def internvl_normed() -> transformers.PreTrainedModel:
    return internvl(use_qk_norm=True, norm_type="rms_norm", use_mean_pooling=False)


def _idefics(kind: str) -> transformers.PreTrainedModel:
    vision = {"model_type": f"{kind}_vision" if kind == "smolvlm" else kind, **VISION}
    del vision["model_type"]
    config = {"idefics3": "Idefics3Config", "smolvlm": "SmolVLMConfig"}[kind]
    model = config.replace("Config", "ForConditionalGeneration")
    return getattr(transformers, model)(
        getattr(transformers, config)(
            vision_config=vision,
            text_config={**TEXT, "pad_token_id": 0},
            image_token_id=IMAGE_ID,
            scale_factor=2,
            pad_token_id=0,
        )
    )


def idefics3() -> transformers.PreTrainedModel:
    return _idefics("idefics3")


def smolvlm() -> transformers.PreTrainedModel:
    return _idefics("smolvlm")


def qwen2_5_vl() -> transformers.PreTrainedModel:
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            vision_config={
                "depth": 3,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "patch_size": 7,
                "spatial_merge_size": 2,
                "window_size": 28,
                "fullatt_block_indexes": [2],
                "out_hidden_size": 32,
            },
            text_config=QWEN_TEXT,
            **QWEN_IDS,
        )
    )


def qwen3_vl() -> transformers.PreTrainedModel:
    text = {**QWEN_TEXT, "rope_parameters": {**QWEN_TEXT["rope_parameters"]}}
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(
            vision_config={
                "depth": 4,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "patch_size": 7,
                "spatial_merge_size": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 2],
            },
            text_config=text,
            **QWEN_IDS,
        )
    )


def vipllava() -> transformers.PreTrainedModel:
    return transformers.VipLlavaForConditionalGeneration(
        transformers.VipLlavaConfig(
            vision_config={"model_type": "clip_vision_model", **VISION},
            text_config=TEXT,
            image_token_index=IMAGE_ID,
            vision_feature_layers=[-2, -1, 1],
        )
    )


def aya_vision() -> transformers.PreTrainedModel:
    return transformers.AyaVisionForConditionalGeneration(
        transformers.AyaVisionConfig(
            vision_config=SIGLIP,
            text_config={**TEXT, "model_type": "cohere2", "head_dim": 6},
            image_token_index=IMAGE_ID,
            adapter_intermediate_size=40,
        )
    )


def siglip2() -> transformers.PreTrainedModel:
    vision = {k: v for k, v in VISION.items() if k != "image_size"}
    return transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**vision, num_patches=16)
    )


def dinov3() -> transformers.PreTrainedModel:
    vision = {k: v for k, v in VISION.items() if k != "intermediate_size"}
    return transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**vision, intermediate_size=48, num_register_tokens=3)
    )


EDGE = VISION["image_size"]
_SQUARE = {"height": EDGE, "width": EDGE}
QWEN_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "patch_size": 7,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 28 * 28, "longest_edge": 84 * 70},
}


def _splitting(kind: str) -> Mapping[str, Any]:
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "size": {"longest_edge": 3 * EDGE},
        "max_image_size": {"longest_edge": EDGE},
        "do_image_splitting": True,
    }


FAMILIES: Mapping[str, Family] = {
    "llava_next": Family(
        encoder="llava_next",
        model=llava_next,
        processor={
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": EDGE},
            "crop_size": _SQUARE,
            "image_grid_pinpoints": PINPOINTS,
        },
    ),
    "llava_onevision": Family(
        encoder="llava_onevision",
        model=llava_onevision,
        processor={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": _SQUARE,
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56], [84, 84]],
        },
    ),
    "paligemma": Family(
        encoder="paligemma",
        model=paligemma,
        processor={"image_processor_type": "SiglipImageProcessor", "size": _SQUARE},
    ),
    "gemma3": Family(
        encoder="gemma3",
        model=gemma3,
        processor={"image_processor_type": "Gemma3ImageProcessor", "size": _SQUARE},
    ),
    "internvl": Family(
        encoder="internvl",
        model=internvl,
        processor={
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": _SQUARE,
            "max_patches": 6,
        },
        asks={"crop_to_patches": True},
    ),
    "internvl_normed": Family(
        encoder="internvl",
        model=internvl_normed,
        processor={
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": _SQUARE,
            "max_patches": 6,
        },
        asks={"crop_to_patches": True},
    ),
    "idefics3": Family(encoder="idefics3", model=idefics3, processor=_splitting("Idefics3")),
    "smolvlm": Family(encoder="idefics3", model=smolvlm, processor=_splitting("SmolVLM")),
    "vipllava": Family(
        encoder="image_features",
        model=vipllava,
        processor={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": EDGE},
            "crop_size": _SQUARE,
        },
    ),
    "aya_vision": Family(
        encoder="image_features",
        model=aya_vision,
        processor={"image_processor_type": "SiglipImageProcessor", "size": _SQUARE},
    ),
    "siglip2": Family(
        encoder="siglip2",
        model=siglip2,
        processor={
            "image_processor_type": "Siglip2ImageProcessor",
            "patch_size": 7,
            "max_num_patches": 20,
        },
    ),
    "dinov3": Family(
        encoder="dinov3",
        model=dinov3,
        processor={"image_processor_type": "DINOv3ViTImageProcessorFast", "size": _SQUARE},
    ),
    "qwen2_5_vl": Family(encoder="qwen_vl", model=qwen2_5_vl, processor=QWEN_PROCESSOR),
    "qwen3_vl": Family(encoder="qwen_vl", model=qwen3_vl, processor=QWEN_PROCESSOR),
}


def save_family(path: Path, name: str) -> transformers.PreTrainedModel:
    """Write a family's small model with its processor and tokenizer, and return it."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.model()
    randomize(model)
    model.save_pretrained(path)
    save_processor(path, dict(family.processor))
    save_tokenizer(path)
    return model


def upstream_inputs(path: Path, name: str, image: NDArray[np.uint8]) -> Mapping[str, torch.Tensor]:
    """Return what the family's own image processor makes of one image."""
    processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
    asked = FAMILIES[name].asks or {}
    outputs = processor(image, return_tensors="pt", **asked)
    known = (
        "pixel_values",
        "image_sizes",
        "image_grid_thw",
        "pixel_attention_mask",
        "spatial_shapes",
    )
    return {key: outputs[key] for key in known if key in outputs}


def upstream_features(
    model: transformers.PreTrainedModel, path: Path, name: str, image: NDArray[np.uint8]
) -> torch.Tensor:
    """Return (N, D): the tokens of one image by the model's own way from pixels."""
    if name == "dinov3":  # its image processor needs torchvision: rescaled, then resized
        floats = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        resized = torch.nn.functional.interpolate(
            floats, (EDGE, EDGE), mode="bilinear", antialias=True
        )
        means, deviations = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        scaled = [(resized[0, i] - means[i]) / deviations[i] for i in range(3)]
        with torch.inference_mode():
            return model(torch.stack(scaled)[None]).last_hidden_state[0, 4:]
    inputs = upstream_inputs(path, name, image)
    if name == "siglip2":
        with torch.inference_mode():
            state = model(**inputs).last_hidden_state[0]
        return state[inputs["pixel_attention_mask"][0].bool()]
    with torch.inference_mode():
        found = model.model.get_image_features(**inputs)
    rows = found.pooler_output
    rows = torch.cat(list(rows)) if isinstance(rows, (list, tuple)) else rows.flatten(0, -2)
    planes = [torch.cat(list(plane)) for plane in getattr(found, "deepstack_features", None) or []]
    return torch.cat([rows, *planes], dim=-1)
