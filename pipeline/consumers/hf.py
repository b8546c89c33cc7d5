"""Hand cached tokens to transformers, in place of pixels.

Works with the `mm_encoder_outputs` input of transformers 5.23 and later, for models whose image
tokens stand in the text like words, one position each: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision.
Nothing of the vision tower is used, so it need not be on the accelerator.

T text and image tokens of the longest prompt; P prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pipeline.consumers.placement import HasFeatures, check_placement, place_tokens, widen_bias
from pipeline.errors import ConfigError
from pipeline.types import Placement

MODEL_TYPES = frozenset({"llava", "llava_next", "llava_onevision"})
"""`config.model_type` of the models served. Others place image tokens on a grid (Qwen-VL) or take
their features in another form (InternVL, Gemma)."""

PROJECTED_HERE = frozenset({"llava"})
"""Those whose `pre_projector` features can be used: the others cut and pad after projecting."""

STAGES = ("projected", "pre_projector")
"""Stages of stored features: as the language model takes them, or as the tower gives them."""


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

    Every image token in a prompt (`<image>` for LLaVA) is repeated once per kept token of its
    image, so images of one batch may differ in how many they kept. Prompts are padded on the
    left, as `generate` needs. What generate returns starts with these `input_ids`. Call again for
    the next `generate`: transformers may change the result where it searches with beams.

    Args:
        model: a `...ForConditionalGeneration` of one of `MODEL_TYPES`.
        processor: the model's processor, or its tokenizer alone.
        prompts: P texts, each with one image token per image of its own; it may have none.
        carved: the images of all prompts in order of appearance, each (K, D) features or an
            object that holds them as `features`; any float dtype, any device.
        stage: where the features were stored. `pre_projector` ones go through the model's own
            projector here, with gradients where they are enabled, so that it can be trained.
        placement: of the kept tokens. All but `packed` need images that say where their tokens
            come from (`HasPlaces`).

    Returns:
        `input_ids` (P, T) int64, `attention_mask` (P, T) int64, and, where there are images,
        `mm_encoder_outputs`; on the model's device. Besides, with `original` and `weighted`,
        `position_ids` (P, T) int64, and with `weighted` `position_bias` (P, 1, 1, T), which
        `forward` takes and `generate` does not: see `weighted_generate`.

    Raises:
        ConfigError: the model, the tokenizer, the stage or the placement cannot be used this way,
            or the features are of another width than the model's.
        ValueError: no prompts, an image without tokens, or not as many images as image tokens.
        TypeError: an image without places where they are needed.
    """
    _check_model(model, stage)
    check_placement(model, placement)
    rows = [_rows(image, index) for index, image in enumerate(carved)]
    tokenizer = getattr(processor, "tokenizer", processor)
    written = _tokenize(tokenizer, prompts)
    ids = _expand(written, model.config.image_token_id, rows)
    pad_id = _pad_id(tokenizer, model.config.image_token_id)
    inputs: dict[str, Any] = {
        "input_ids": _pad_left(ids, pad_id).to(model.device),
        "attention_mask": _pad_left([torch.ones_like(i) for i in ids], 0).to(model.device),
    }
    if placement != "packed":
        places, biases = place_tokens(written, int(model.config.image_token_id), carved)
        inputs["position_ids"] = _pad_left(places, 0).to(model.device)
        if placement == "weighted":
            bias_PT = _pad_left(biases, 0.0).to(model.device, model.dtype)
            inputs["position_bias"] = bias_PT[:, None, None]
    if rows:
        features = _features(model, rows, stage)
        outputs = BaseModelOutputWithPooling(pooler_output=features)
        inputs["mm_encoder_outputs"] = {"image": outputs}
    return inputs


def weighted_generate(model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:  # noqa: ANN401
    """Call `generate` with inputs that hold a `position_bias`, which it would refuse.

    Args:
        model: the model that they were prepared for.
        inputs: of `prepare`; those of any placement can be given.
        options: of `generate`. Searches with beams and with an assistant are not served: they
            reorder or repeat prompts.

    Returns:
        What `generate` does.
    """
    inputs = dict(inputs)
    bias_P11T = inputs.pop("position_bias", None)
    if bias_P11T is None:
        return model.generate(**inputs, **options)
    if options.get("num_beams", model.generation_config.num_beams or 1) != 1:
        raise ConfigError("placement 'weighted' cannot search with beams; set num_beams=1")

    def add_bias(_: nn.Module, args: tuple[Any, ...], values: dict[str, Any]) -> Any:  # noqa: ANN401
        known = values.get("past_key_values")
        num_known = 0 if known is None else known.get_seq_length()
        num_columns = num_known + values["inputs_embeds"].shape[1]
        return args, {**values, "position_bias": widen_bias(bias_P11T, num_columns)}

    hook = model.base_model.language_model.register_forward_pre_hook(add_bias, with_kwargs=True)
    try:
        return model.generate(**inputs, **options)
    finally:
        hook.remove()


def _check_model(model: Any, stage: str) -> None:  # noqa: ANN401
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
            f"models of type {kind!r} arrange their tokens after projecting them, so features of "
            "stage 'pre_projector' cannot be used; store them with stage 'projected'"
        )


def _rows(image: Tensor | HasFeatures, index: int) -> Tensor:
    rows_KD = image if isinstance(image, Tensor) else image.features
    if rows_KD.ndim != 2 or len(rows_KD) == 0:
        raise ValueError(
            f"features of image {index} have the shape {tuple(rows_KD.shape)}, expected (K, D) "
            "with K at least 1"
        )
    if not rows_KD.is_floating_point():
        raise ValueError(
            f"features of image {index} are {rows_KD.dtype}, expected floating point numbers: "
            "unpack them first"
        )
    return rows_KD


def _tokenize(tokenizer: Any, prompts: Sequence[str]) -> list[Tensor]:  # noqa: ANN401
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts are {prompts!r}, expected a list of at least one text")
    encoded = tokenizer(list(prompts), padding=False, return_attention_mask=False)
    return [torch.tensor(ids, dtype=torch.long) for ids in encoded["input_ids"]]


def _expand(ids: Sequence[Tensor], image_token_id: int, rows: Sequence[Tensor]) -> list[Tensor]:
    """Repeat each image token once per kept token of its image."""
    images_per_prompt = [int((prompt == image_token_id).sum()) for prompt in ids]
    if sum(images_per_prompt) != len(rows):
        raise ValueError(
            f"{len(rows)} images for {sum(images_per_prompt)} image tokens (id {image_token_id}) "
            f"in the prompts, which hold {images_per_prompt}; write one image token per image"
        )
    kept = torch.tensor([len(image) for image in rows], dtype=torch.long)
    expanded = []
    for prompt, counts in zip(ids, torch.split(kept, images_per_prompt), strict=True):
        repeats = torch.ones_like(prompt)
        repeats[prompt == image_token_id] = counts
        expanded.append(prompt.repeat_interleave(repeats))
    return expanded


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


def _features(model: Any, rows: Sequence[Tensor], stage: str) -> list[Tensor]:  # noqa: ANN401
    """Return the features of each image as the language model takes them."""
    if stage == "projected":
        width = model.config.get_text_config().hidden_size
        remedy = "stored before the projector? then pass stage='pre_projector'"
        _check_width(rows, width, remedy)
        return [image.to(model.device) for image in rows]
    projector: nn.Module = model.base_model.multi_modal_projector
    _check_width(rows, _tower_width(model), "stored after the projector? then stage='projected'")
    # Not the weights' own dtype: those of a quantised model are integers.
    joined = torch.cat([image.to(model.device, model.dtype) for image in rows])
    return list(torch.split(projector(joined), [len(image) for image in rows]))


def _tower_width(model: Any) -> int:  # noqa: ANN401
    """Return how wide the tower's features are: it may give those of several layers."""
    layers = model.config.vision_feature_layer
    num_layers = 1 if isinstance(layers, int) else len(layers)
    return int(model.config.vision_config.hidden_size * num_layers)


def _check_width(rows: Sequence[Tensor], width: int, remedy: str) -> None:
    for index, image in enumerate(rows):
        if image.shape[1] != width:
            raise ConfigError(
                f"features of image {index} are {image.shape[1]} wide and the model takes {width} "
                f"at this stage; {remedy}"
            )
