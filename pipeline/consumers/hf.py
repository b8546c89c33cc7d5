"""Hand cached tokens to transformers, in place of pixels.

Works with the `mm_encoder_outputs` input of transformers 5.23 and later. Nothing of the vision
tower is used, so it need not be on the accelerator.

T text and image tokens of the longest prompt; P prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from pipeline.consumers.arrangement import in_slots
from pipeline.consumers.placement import HasFeatures, check_placement, widen_bias, with_places
from pipeline.consumers.prompt_layout import FedImage, grid_positions, lay_out
from pipeline.errors import ConfigError
from pipeline.types import Placement

MODEL_TYPES = frozenset(
    {
        "gemma3",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "paligemma",
        "qwen2_5_vl",
        "qwen3_vl",
        "smolvlm",
    }
)
"""`config.model_type` of the models served."""

PROJECTED_HERE = frozenset({"llava", "llava_next", "paligemma"})
"""Those whose `pre_projector` features can be used: the others make one token of several before
they project, or resample tokens after it."""

STAGES = ("projected", "pre_projector")
"""Stages of stored features: as the language model takes them, or as the tower gives them."""

_AS_ONE_TENSOR = frozenset({"gemma3", "internvl", "paligemma"})
_ON_A_GRID = frozenset({"qwen2_5_vl", "qwen3_vl"})
_WITH_ROW_ENDS = frozenset({"llava_next", "llava_onevision"})


def prepare(
    model: Any,  # noqa: ANN401  (transformers is untyped)
    processor: Any,  # noqa: ANN401
    prompts: Sequence[str],
    carved: Sequence[Tensor | HasFeatures],
    *,
    stage: str = "projected",
    placement: Placement = "packed",
) -> dict[str, Any]:
    """Return the inputs of `generate` and `forward` for prompts with cached images.

    Prompts are written as for the model's own processor, with one image token per image: what its
    chat template gives. The token is replaced by as many as the image kept, and by what the family
    puts around and between them, so images of one batch may differ in how many they kept. Prompts
    are padded on the left, as `generate` needs. What generate returns starts with these
    `input_ids`. Call again for the next `generate`: transformers may change the result where it
    searches with beams.

    A model with M-RoPE (Qwen-VL) is told the place of each kept token on the image's grid, and text
    goes on behind the whole grid (`original`), or one place for each token (`packed`). Sliding
    windows (Gemma 3) count the tokens that are there, not their positions.

    Args:
        model: a `...ForConditionalGeneration` of one of `MODEL_TYPES`.
        processor: the model's processor, or its tokenizer alone.
        prompts: P texts, each with one image token per image of its own; it may have none.
        carved: the images of all prompts in order of appearance, each (K, D) features or an
            object that holds them as `features`; any float dtype, any device. Rows of a cache say
            besides where their tokens come from (`HasPlaces`). Bare features are taken in the
            order in which the model is fed them, with whatever it puts at the ends of rows.
        stage: where the features were stored. `pre_projector` ones go through the model's own
            projector here, with gradients where they are enabled, so that it can be trained.
        placement: of the kept tokens. All but `packed` need rows of a cache.

    Returns:
        `input_ids` (P, T) int64, `attention_mask` (P, T) int64, and, where there are images,
        `mm_encoder_outputs`; on the model's device. Besides, with `original` and `weighted`,
        `position_ids` (P, T) int64, of models with M-RoPE always (3, P, T); with `weighted`
        `position_bias` (P, 1, 1, T), which `forward` takes and `generate` does not: see
        `weighted_generate`; and `token_type_ids` (P, T) where the model attends to all of an image
        (Gemma 3) or of the prompt (PaliGemma) at once.

    Raises:
        ConfigError: the model, the tokenizer, the stage or the placement cannot be used this way,
            or the features are of another width than the model's.
        ValueError: no prompts, an image without tokens, or not as many images as image tokens.
        TypeError: an image without places where they are needed.
    """
    kind = _check_model(model, stage)
    check_placement(model, placement)
    tokenizer = getattr(processor, "tokenizer", processor)
    images = [FedImage.of(kind, image, index) for index, image in enumerate(carved)]
    if placement != "packed":
        with_places(carved)
    written = lay_out(kind, tokenizer, prompts, images, int(model.config.image_token_id))
    pad_id = _pad_id(tokenizer, model.config.image_token_id)
    ids = [prompt.ids for prompt in written]
    inputs: dict[str, Any] = {
        "input_ids": _pad_left(ids, pad_id).to(model.device),
        "attention_mask": _pad_left([torch.ones_like(i) for i in ids], 0).to(model.device),
    }
    if kind in _ON_A_GRID:
        places = [grid_positions(prompt, is_packed=placement == "packed") for prompt in written]
        inputs["position_ids"] = torch.stack(
            [_pad_left([axes[axis] for axes in places], 0) for axis in range(3)]
        ).to(model.device)
    elif placement != "packed":
        places = [prompt.slots for prompt in written]
        inputs["position_ids"] = _pad_left(places, 0).to(model.device)
    if placement == "weighted":
        bias_PT = _pad_left([prompt.bias for prompt in written], 0.0)
        inputs["position_bias"] = bias_PT.to(model.device, language_dtype(model))[:, None, None]
    if kind in ("gemma3", "paligemma"):
        is_image = inputs["input_ids"] == model.config.image_token_id
        inputs["token_type_ids"] = is_image.long() * (kind == "gemma3")
    if images:
        inputs["mm_encoder_outputs"] = {"image": _outputs(model, kind, images, stage)}
    return inputs


def language_dtype(model: Any) -> torch.dtype:  # noqa: ANN401
    """Return the dtype in which a model's language model works.

    `model.dtype` is that of whichever weight comes first: without its tower, a LLaVA-1.5 model's
    projector, which is trained in float32 beside a language model in half precision. Attention on
    CUDA refuses a bias of another dtype than its queries'.
    """
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


def weighted_generate(model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:  # noqa: ANN401
    """Call `generate` with inputs that hold a `position_bias`, which it would refuse.

    Args:
        model: the model that they were prepared for.
        inputs: of `prepare`; those of any placement can be given.
        options: of `generate`. Searches with beams and with an assistant are not served: they
            reorder prompts.

    Returns:
        What `generate` does.

    Raises:
        ConfigError: a search with beams is asked for.
    """
    inputs = dict(inputs)
    bias_P11T = inputs.pop("position_bias", None)
    if bias_P11T is None:
        return model.generate(**inputs, **options)
    asked = options.get("generation_config") or model.generation_config
    if options.get("num_beams", asked.num_beams or 1) != 1:
        raise ConfigError("placement 'weighted' cannot search with beams; set num_beams=1")

    def add_bias(_: nn.Module, args: tuple[Any, ...], values: dict[str, Any]) -> Any:  # noqa: ANN401
        known = values.get("past_key_values")
        num_known = 0 if known is None else known.get_seq_length()
        num_rows, num_new, _ = values["inputs_embeds"].shape
        # `num_return_sequences` repeats each prompt, one copy behind the other.
        bias_R11T = bias_P11T.repeat_interleave(num_rows // len(bias_P11T), dim=0)
        return args, {**values, "position_bias": widen_bias(bias_R11T, num_known + num_new)}

    language_model = getattr(model.base_model, "language_model", None)
    if language_model is None:
        language_model = model.base_model.text_model
    hook = language_model.register_forward_pre_hook(add_bias, with_kwargs=True)
    try:
        return model.generate(**inputs, **options)
    finally:
        hook.remove()


def _check_model(model: Any, stage: str) -> str:  # noqa: ANN401
    if stage not in STAGES:
        raise ConfigError(f"no stage {stage!r}; known: {', '.join(STAGES)}")
    kind = model.config.model_type
    if kind not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ConfigError(f"models of type {kind!r} cannot take cached tokens yet; known: {known}")
    tower = model.config.vision_config.model_type
    if tower == "pixtral":
        raise ConfigError(
            "models with a tower of type 'pixtral' cannot take cached tokens yet: their prompts "
            "hold a token at the end of every row of the image"
        )
    if stage == "pre_projector" and kind not in PROJECTED_HERE:
        raise ConfigError(
            f"models of type {kind!r} do more to tokens than project them, so features of stage "
            "'pre_projector' cannot be used; store them with stage 'projected'"
        )
    return str(kind)


def _pad_id(tokenizer: Any, image_token_id: int) -> int:  # noqa: ANN401
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        # A pad that is an image token would be counted as a place for features.
        if candidate is not None and candidate != image_token_id:
            return int(candidate)
    raise ConfigError(
        "the tokenizer has neither a pad token nor an end token that is not the image token; "
        "set tokenizer.pad_token"
    )


def _pad_left(rows: Sequence[Tensor], value: float) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")


def _outputs(
    model: Any,  # noqa: ANN401
    kind: str,
    images: Sequence[FedImage],
    stage: str,
) -> BaseModelOutputWithPooling:
    """Return what the model's own `get_image_features` would."""
    features = _features(model, images, stage)
    rows = [_with_ends(model, kind, *pair) for pair in zip(features, images, strict=True)]
    if kind in _AS_ONE_TENSOR:
        return BaseModelOutputWithPooling(pooler_output=torch.cat(rows))
    if kind != "qwen3_vl":
        return BaseModelOutputWithPooling(pooler_output=rows)
    width = model.config.get_text_config().hidden_size
    planes = [list(torch.split(image, width, dim=1)) for image in rows]
    first, *deeper = ([own[plane] for own in planes] for plane in range(len(planes[0])))
    return BaseModelOutputWithDeepstackFeatures(pooler_output=first, deepstack_features=deeper)


def _with_ends(model: Any, kind: str, features_KD: Tensor, image: FedImage) -> Tensor:  # noqa: ANN401
    """Return (T, D): an image's tokens in the order of its slots, and the ends of its rows."""
    has_ends = kind in _WITH_ROW_ENDS
    return in_slots(features_KD, image.rows, model.base_model.image_newline if has_ends else None)


def _features(model: Any, images: Sequence[FedImage], stage: str) -> list[Tensor]:  # noqa: ANN401
    """Return the features of each image as the language model takes them."""
    rows = [image.features for image in images]
    if stage == "projected":
        _check_width(
            rows, _fed_width(model), "stored before the projector? then pass stage='pre_projector'"
        )
        return [image.to(model.device) for image in rows]
    projector: nn.Module = model.base_model.multi_modal_projector
    _check_width(rows, _tower_width(model), "stored after the projector? then stage='projected'")
    # Not the weights' own dtype: those of a quantised model are integers.
    joined = torch.cat([image.to(model.device, model.dtype) for image in rows])
    return list(torch.split(projector(joined), [len(image) for image in rows]))


def _fed_width(model: Any) -> int:  # noqa: ANN401
    """Return how wide features are that the language model is fed, in deeper layers too."""
    planes = getattr(model.config.vision_config, "deepstack_visual_indexes", None) or []
    return int(model.config.get_text_config().hidden_size) * (1 + len(planes))


def _tower_width(model: Any) -> int:  # noqa: ANN401
    """Return how wide the tower's features are: it may give those of several layers."""
    layers = getattr(model.config, "vision_feature_layer", -1)
    num_layers = 1 if isinstance(layers, int) else len(layers)
    return int(model.config.vision_config.hidden_size * num_layers)


def _check_width(rows: Sequence[Tensor], width: int, remedy: str) -> None:
    for index, image in enumerate(rows):
        if image.shape[1] != width:
            raise ConfigError(
                f"features of image {index} are {image.shape[1]} wide and the model takes {width} "
                f"at this stage; {remedy}"
            )
