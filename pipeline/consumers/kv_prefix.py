"""Keys and values of an image under a fixed prompt, in place of its tokens.

All that stands before the question (fixed text, the image, fixed text behind it) is the same for
every question, and a decoder's attention is causal: keys and values of these places depend on
nothing behind them. So the language model runs over them once, and every question starts from what
it left. That is exact where rotary frequencies do not depend on the length and no layer has a
window; models for which it is not are refused. For the models that `consumers.hf` serves.

L layers, h key heads of width d, T tokens of a prefix, K of them the image's; P prompts, S tokens
of the longest rest of a prompt, C columns in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, DynamicLayer

from pipeline.consumers import hf
from pipeline.consumers.arrangement import ROW_END
from pipeline.consumers.placement import HasFeatures
from pipeline.consumers.prompt_layout import FedImage
from pipeline.errors import ConfigError
from pipeline.types import Placement

MODEL_TYPES = frozenset({"llava", "llava_next", "llava_onevision"})
"""`config.model_type` of the models served: their attention is causal in the image too, and a token
has one position. Of `hf.MODEL_TYPES` others see all of an image at once, or place it on a grid."""

_CHANGING_ROPES = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose frequencies depend on how long the whole prompt is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedPrompt:
    """What stands before every question."""

    text: str
    before: tuple[int, ...]  # ids of the text before the image: the same for all images
    image_id: int
    after: tuple[int, ...]  # ids of the fixed text behind it

    @property
    def ids(self) -> list[int]:
        """All of them, with the image as one."""
        return [*self.before, self.image_id, *self.after]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyValues:
    """What a decoder remembers of some tokens, keys after their rotary embedding."""

    keys: Tensor  # (L, h, T, d)
    values: Tensor  # (L, h, T, d)


@dataclass(frozen=True, kw_only=True, slots=True)
class KVPrefix:
    """What a decoder remembers of a fixed prompt with one image in it."""

    prompt: FixedPrompt
    placement: Placement
    states: KeyValues  # of T tokens
    positions: Tensor  # (T,) int64, ascending
    sizes: Tensor  # (T,) float32: how many tokens the model is told that each stands for
    ranks: Tensor  # (K,) int64: 0 is the image's most important token
    end: int  # position of what stands behind


def fixed_prompt(model: Any, processor: Any, text: str) -> FixedPrompt:  # noqa: ANN401
    """Tokenize what stands before every question.

    Args:
        model: a `...ForConditionalGeneration` of one of `MODEL_TYPES`.
        processor: the model's processor, or its tokenizer alone.
        text: with the image token once.

    Raises:
        ConfigError: it does not hold the image token exactly once.
    """
    image_id = int(model.config.image_token_id)
    ids = _tokenize(processor, [text])[0]
    if ids.count(image_id) != 1:
        raise ConfigError(
            f"prompt {text!r} holds the image token (id {image_id}) {ids.count(image_id)} times, "
            "expected once"
        )
    place = ids.index(image_id)
    return FixedPrompt(
        text=text, before=tuple(ids[:place]), image_id=image_id, after=tuple(ids[place + 1 :])
    )


@torch.no_grad()
def make_prefixes(
    model: Any,  # noqa: ANN401  (transformers is untyped)
    processor: Any,  # noqa: ANN401
    prompt: str,
    images: Sequence[Tensor | HasFeatures],
    *,
    stage: str = "projected",
    placement: Placement = "packed",
) -> list[KVPrefix]:
    r"""Run the language model over a fixed prompt with each of some images, as one batch.

    Args:
        model: a `...ForConditionalGeneration` of one of `MODEL_TYPES`.
        processor: the model's processor, or its tokenizer alone.
        prompt: what stands before every question, with one image token; `USER: <image>\n`, say.
        images: their kept tokens, as for `hf.prepare`; at least one.
        stage: of the features.
        placement: of the kept tokens.

    Returns:
        A prefix for each image, on the model's device and in its type.

    Raises:
        ConfigError, ValueError, TypeError: as `hf.prepare` says; also if the prompt does not hold
            the image token once, or the model's prefixes would depend on what follows.
    """
    _check_model(model)
    fixed = fixed_prompt(model, processor, prompt)
    inputs = hf.prepare(
        model, processor, [prompt] * len(images), images, stage=stage, placement=placement
    )
    is_token_PT = inputs["attention_mask"].bool()
    packed_PT = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    inputs = {"position_ids": packed_PT, **inputs}
    cache = DynamicCache(config=model.config.get_text_config())
    model.base_model(**inputs, past_key_values=cache, use_cache=True)
    bias_PT = inputs["position_bias"][:, 0, 0] if placement == "weighted" else torch.zeros(())
    sizes_PT = bias_PT.float().exp().expand(packed_PT.shape)
    num_text = len(fixed.before) + len(fixed.after)
    prefixes = []
    for number, (image, own_T) in enumerate(zip(images, is_token_PT, strict=True)):
        fed = FedImage.of(model.config.model_type, image, number)
        image_slots = fed.slots if placement == "packed" else fed.arrangement.sources
        prefixes.append(
            KVPrefix(
                prompt=fixed,
                placement=placement,
                states=_states(cache, number, own_T),
                positions=inputs["position_ids"][number][own_T].cpu(),
                sizes=sizes_PT[number].to(own_T.device)[own_T].cpu(),
                ranks=_ranks(image, fed.rows),
                end=num_text + len(image_slots),
            )
        )
    return prefixes


def make_prefix(
    model: Any,  # noqa: ANN401
    processor: Any,  # noqa: ANN401
    prompt: str,
    image: Tensor | HasFeatures,
    *,
    stage: str = "projected",
    placement: Placement = "packed",
) -> KVPrefix:
    """Run the language model over a fixed prompt with one image; see `make_prefixes`."""
    return make_prefixes(model, processor, prompt, [image], stage=stage, placement=placement)[0]


@torch.no_grad()
def text_states(model: Any, prompt: FixedPrompt) -> KeyValues:  # noqa: ANN401
    """Return keys and values of the text before the image, which no image changes."""
    config = model.config.get_text_config()
    if not prompt.before:
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        shape = (config.num_hidden_layers, config.num_key_value_heads, 0, width)
        nothing = torch.empty(shape, device=model.device, dtype=hf.language_dtype(model))
        return KeyValues(keys=nothing, values=nothing)
    cache = DynamicCache(config=config)
    ids_1T = torch.tensor([prompt.before], device=model.device)
    model.base_model(input_ids=ids_1T, past_key_values=cache, use_cache=True)
    return _states(cache, 0, torch.ones_like(ids_1T[0], dtype=torch.bool))


def as_cache(model: Any, prefixes: Sequence[KVPrefix]) -> DynamicCache:  # noqa: ANN401
    """Return what transformers takes as `past_key_values`, a row for each prefix.

    Shorter prefixes are padded on the left with zeros, which must be masked; `prepare_prefixed`
    gives the mask. A cache grows while it is used: make one for every call.

    Args:
        model: the model they were made with.
        prefixes: at least one.

    Raises:
        ValueError: no prefixes.
    """
    if not prefixes:
        raise ValueError("no prefixes to make a cache of, expected at least one")
    longest = max(len(prefix.positions) for prefix in prefixes)

    def joined(states: Sequence[Tensor]) -> Tensor:
        padded = [functional.pad(s, (0, 0, longest - s.shape[2], 0)) for s in states]
        joined_LPhTd = torch.stack(padded, dim=1)
        return joined_LPhTd.to(model.device, hf.language_dtype(model))

    keys = joined([prefix.states.keys for prefix in prefixes])
    values = joined([prefix.states.values for prefix in prefixes])
    layers = list(zip(keys, values, strict=True))
    return DynamicCache(ddp_cache_data=layers, config=model.config.get_text_config())


def prepare_prefixed(
    model: Any,  # noqa: ANN401
    processor: Any,  # noqa: ANN401
    prefixes: Sequence[KVPrefix],
    questions: Sequence[str],
) -> dict[str, Any]:
    """Return the inputs of `generate` and `forward` for questions that follow prefixes.

    The prompt of a question is the prefix's text with the question's behind it, tokenized as one.
    Pass them to `hf.weighted_generate`, or, where the placement is not `weighted`, to
    `model.generate`; not to a search with beams, which would have to copy the cache. Call again for
    the next: the cache grows while it is used.

    Args:
        model: the model the prefixes were made with.
        processor: its processor, or its tokenizer alone.
        prefixes: of one placement, one for each question; the same may stand several times.
        questions: P texts, with all that comes before the answer: `What is this? ASSISTANT:`, say.

    Returns:
        `input_ids` (P, S) int64, what stands behind the prefixes; `attention_mask` (P, C) int64,
        of the prefixes too; `position_ids` (P, S) int64; `past_key_values`; and, if weighted,
        `position_bias` (P, 1, 1, C). On the model's device, padded on the left, the prefixes and
        the questions each for themselves.

    Raises:
        ConfigError: a question's first token would be joined with the prefix's last one.
        ValueError: not one prefix for each question, prefixes of different placements, or none.
    """
    if len(prefixes) != len(questions):
        raise ValueError(f"{len(prefixes)} prefixes for {len(questions)} questions, expected equal")
    placements = {prefix.placement for prefix in prefixes}
    if len(placements) > 1:
        raise ValueError(f"prefixes have the placements {sorted(placements)}, expected one")
    cache = as_cache(model, prefixes)
    rests = _rests(processor, prefixes, questions)
    tokenizer = getattr(processor, "tokenizer", processor)
    pad = tokenizer.pad_token_id
    # What is padded is masked: any token will do.
    ids_PS = _pad_left(rests, int(rests[0][0]) if pad is None else pad)
    is_prefix_PT = _pad_left([torch.ones_like(prefix.positions) for prefix in prefixes])
    is_rest_PS = _pad_left([torch.ones_like(rest) for rest in rests])
    ends_P1 = torch.tensor([[prefix.end] for prefix in prefixes])
    inputs = {
        "input_ids": ids_PS.to(model.device),
        "attention_mask": torch.cat([is_prefix_PT, is_rest_PS], dim=1).to(model.device),
        "position_ids": (ends_P1 + (is_rest_PS.cumsum(dim=1) - 1).clamp_min(0)).to(model.device),
        "past_key_values": cache,
    }
    if placements == {"weighted"}:
        bias_PT = _pad_left([prefix.sizes.log() for prefix in prefixes])
        bias_PC = functional.pad(bias_PT, (0, ids_PS.shape[1]))
        inputs["position_bias"] = bias_PC.to(model.device, hf.language_dtype(model))[:, None, None]
    return inputs


def _check_model(model: Any) -> None:  # noqa: ANN401
    kind, config = model.config.model_type, model.config.get_text_config()
    if kind not in MODEL_TYPES:
        raise ConfigError(
            f"models of type {kind!r} cannot start from stored keys and values; known: "
            f"{', '.join(sorted(MODEL_TYPES))}"
        )
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
        raise ConfigError(
            f"the decoder {config.model_type!r} has layers that do not attend to all tokens before "
            "them, so what it remembers of a prefix depends on what follows"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _CHANGING_ROPES:
        raise ConfigError(
            f"the decoder {config.model_type!r} has rotary embeddings of type {rope!r}, which "
            "depend on the length of the whole prompt, and with them the keys of a prefix"
        )


def _rests(
    processor: Any,  # noqa: ANN401
    prefixes: Sequence[KVPrefix],
    questions: Sequence[str],
) -> list[Tensor]:
    """Return the ids of each prompt behind its prefix."""
    texts = [p.prompt.text + question for p, question in zip(prefixes, questions, strict=True)]
    rests = []
    for prefix, text, ids in zip(prefixes, texts, _tokenize(processor, texts), strict=True):
        known = prefix.prompt.ids
        if ids[: len(known)] != known:
            raise ConfigError(
                f"prompt {text!r} does not begin with the tokens of {prefix.prompt.text!r}: the "
                "tokenizer joins the two; end the prefix elsewhere, at its image token say"
            )
        if len(ids) == len(known):
            raise ConfigError(f"prompt {text!r} has nothing behind its prefix; give a question")
        rests.append(torch.tensor(ids[len(known) :]))
    return rests


def _tokenize(processor: Any, texts: Sequence[str]) -> list[list[int]]:  # noqa: ANN401
    tokenizer = getattr(processor, "tokenizer", processor)
    encoded = tokenizer(list(texts), padding=False, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _pad_left(rows: Sequence[Tensor], value: float = 0) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")


def _states(cache: DynamicCache, number: int, is_token_T: Tensor) -> KeyValues:
    """Return what a cache holds of one row, without its padding."""
    return KeyValues(
        keys=torch.stack([layer.keys[number][:, is_token_T] for layer in cache.layers]),
        values=torch.stack([layer.values[number][:, is_token_T] for layer in cache.layers]),
    )


def _ranks(image: Tensor | HasFeatures, rows_K: Tensor) -> Tensor:
    """Return the (K,) ranks of what stands for an image; ends of rows come last.

    Args:
        image: whose ranks, where they are not known, are the order its tokens have.
        rows_K: which of its tokens stands there, or `ROW_END`.
    """
    known: Tensor | None = None if isinstance(image, Tensor) else getattr(image, "ranks", None)
    if known is None:
        known = torch.arange(len(image if isinstance(image, Tensor) else image.features))
    own_K = torch.where(rows_K == ROW_END, len(known), known.cpu()[rows_K.clamp_min(0)])
    return own_K.argsort(stable=True).argsort()
