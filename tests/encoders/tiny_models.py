"""Small models with random weights, written as transformers writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

ASSETS = Path(__file__).parent.parent / "assets"
IMAGE_ID = 60
EDGE = 28  # pixels; 4 x 4 patches of 7
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": EDGE,
    "patch_size": 7,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": EDGE},
    "crop_size": {"height": EDGE, "width": EDGE},
}
SIGLIP_PROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": EDGE, "width": EDGE},
}
DINO_PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 40},
    "crop_size": {"height": 35, "width": 35},
}
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_VITS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "clip": ("CLIPVisionModel", {}, CLIP_PROCESSOR),
    "siglip": ("SiglipVisionModel", {}, SIGLIP_PROCESSOR),
    "dinov2": ("Dinov2Model", {"mlp_ratio": 2}, DINO_PROCESSOR),
    "dinov2_swiglu": ("Dinov2Model", {"use_swiglu_ffn": True}, DINO_PROCESSOR),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {"mlp_ratio": 2}, DINO_PROCESSOR),
}
VITS = tuple(_VITS)


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Spread the weights so far that attention is not flat and every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.2 if parameter.ndim > 1 else 0.1))
            if parameter.ndim == 1:
                parameter.add_(0.5)
    model.eval()


def save_processor(path: Path, settings: dict[str, Any]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "preprocessor_config.json").write_text(json.dumps(settings))


def save_tokenizer(path: Path) -> None:
    words = ["<unk>", "<s>", "</s>", "USER:", "Describe", "the", "image", "in", "detail."]
    vocabulary = {word: number for number, word in enumerate([*words, "ASSISTANT:"])}
    vocabulary["<image>"] = IMAGE_ID
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", additional_special_tokens=["<image>"]
    )
    fast.save_pretrained(path)


def save_llava(
    path: Path,
    *,
    tower: str = "clip",
    layer: int | list[int] = -2,
    strategy: str = "default",
    text: dict[str, Any] | None = None,
    **saving: Any,
) -> transformers.LlavaForConditionalGeneration:
    """Write a LLaVA model with its processor and tokenizer, and return it."""
    config = transformers.LlavaConfig(
        vision_config={"model_type": _TOWERS[tower], **VISION},
        text_config={**TEXT, **(text or {})},
        image_token_index=IMAGE_ID,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    randomize(model)
    model.save_pretrained(path, **saving)
    save_processor(path, CLIP_PROCESSOR if tower == "clip" else SIGLIP_PROCESSOR)
    save_tokenizer(path)
    return model


def save_vit(path: Path, kind: str) -> transformers.PreTrainedModel:
    """Write a bare tower with its processor, and return it."""
    name, options, processor = _VITS[kind]
    config_class = getattr(transformers, name).config_class
    settings = {**VISION, **options}
    if kind.startswith("dinov2"):
        del settings["intermediate_size"]
    model = getattr(transformers, name)(config_class(**settings))
    randomize(model)
    model.save_pretrained(path)
    save_processor(path, processor)
    return model


def photo(name: str = "coffee") -> NDArray[np.uint8]:
    """Return a photograph as an encoder takes it."""
    with Image.open(ASSETS / f"{name}.jpg") as image:
        return np.array(image.convert("RGB"))


def upstream_processor(path: Path) -> Any:
    """Return the processor of transformers that works without torchvision."""
    return transformers.AutoImageProcessor.from_pretrained(path, backend="pil")


def upstream_pixels(path: Path, images: list[NDArray[np.uint8]]) -> torch.Tensor:
    """Return what that processor makes of some images."""
    processor = upstream_processor(path)
    return torch.as_tensor(np.stack(processor(images)["pixel_values"]))
