"""TokenCarve as published: with the question known, tokens go after the second decoder layer.

This is the reference that question-free forms are compared with at equal tokens, not a carver:
what it keeps depends on the question, so nothing of it can be stored. All image tokens pass the
first two decoder layers with the question. Then each is ranked by its contribution to the singular
directions of the image's hidden states and by the attention that the last prompt token pays it in
the second layer; the carver `tokencarve` prunes and merges. What is left goes on through the other
layers at its original rotary positions, in its original order; keys and values of the first two
layers are cut to the kept tokens, unmerged; the answer goes on behind the prompt's last original
position.

Source: Tan et al., TokenCarve: Information-Preserving Visual Token Compression in Multimodal Large
Language Models, arXiv 2503.10501; github.com/ShawnTan86/TokenCarve @ a57bd59, Apache-2.0.
Differs: the image is where the prompt's image tokens are, not at fixed columns; any number of image
tokens and any budget (all of them kept is the plain model); batches with padding; attention and
scores in float32 whatever the model computes in; mode `norm`. The hidden states of the text before
the image and of the image depend on nothing behind them, so prompts on one image share them and its
information scores; the numbers are the same but for rounding.
Cost: of an image its prefix through two layers and one `tokencarve` information score; of a prompt
its own text through two layers; of a budget and mode K instead of N image tokens through the rest.

B prompts, U different prefixes (text before an image, and that image), P columns of the longest
prefix, C columns in all, Q of them left after carving, N image tokens, K of them kept, D width,
V vocabulary, h key heads of width d.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline import carvers
from pipeline.carvers import _ops
from pipeline.carvers._information import contributions
from pipeline.errors import ConfigError
from pipeline.evaluation._decoder import (
    Columns,
    columns_of,
    continue_greedily,
    last_attention,
    pad_left,
    run_layers,
)
from pipeline.types import VisualTokens

Mode = Literal["both", "information", "attention", "norm"]
"""What ranks the tokens: both scores of the published code, one of them alone, or, as a control,
both with the L2 norm of a token's hidden state in place of its information score."""

ATTENTION_WEIGHTS: Mapping[Mode, float] = {
    "both": 0.5,
    "information": 0.0,
    "attention": 1.0,
    "norm": 0.5,
}
"""Weight of the attention ranking against the other, by mode; 0.5 is the published default."""

_NUM_FULL_LAYERS = 2  # decoder layers that see all image tokens, as the published code fixes it
_ATTENTIONS = ("eager", "sdpa")  # that add a mask of any shape


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineAnswers:
    """Greedy answers to B prompts."""

    tokens: list[list[int]]  # new ids of each prompt, up to and with its end token, if it came
    first_logits: Tensor  # (B, V) float32, of the first new token
    last_hidden: Tensor  # (B, D) last hidden state at the last prompt token, normed
    positions: Tensor  # (B, K) int64, ascending: which of its N image tokens each prompt kept


@dataclass(frozen=True, kw_only=True)
class OnlinePrompts:
    """B prompts behind the second decoder layer, from where every budget and mode starts.

    In the columns stand the text before the image, the image, the text behind it. Both texts are
    padded on the left, so that all images lie in the same columns.
    """

    model: Any
    columns: Columns
    hidden: Tensor  # (B, C, D) output of the second layer
    keys_values: Sequence[tuple[Tensor, Tensor]]  # of the first two layers, (B, h, C, d) each
    attention: Tensor  # (B, N) float32: what the last token pays in the second layer
    image_start: int  # column of the first image token
    image_hidden: Tensor  # (U, N, D) the image's rows of the second layer's output
    owners: Tensor  # (B,) int64, which of the U each prompt has

    @torch.no_grad()
    def answer(self, *, keep_tokens: int, mode: Mode, max_new_tokens: int) -> OnlineAnswers:
        """Carve the image of each prompt for its question, and answer greedily.

        Args:
            keep_tokens: K, at least 1; all image tokens where there are no more.
            mode: what ranks the tokens.
            max_new_tokens: at least 1; an answer also ends at an end token of the model's
                generation config, of which nothing else is used.

        Raises:
            ConfigError: `keep_tokens` is below 1.
            NonFiniteError: the second layer's attention is NaN or infinite.
            ValueError: `max_new_tokens` is below 1, or the mode is unknown.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        if mode not in ATTENTION_WEIGHTS:
            raise ValueError(f"no mode {mode!r}; known: {', '.join(ATTENTION_WEIGHTS)}")
        merged_BKD, kept_BK = carve_hidden(
            self.image_hidden[self.owners],
            self._norms() if mode == "norm" else self._contributions,
            self.attention,
            keep_tokens=keep_tokens,
            attention_weight=ATTENTION_WEIGHTS[mode],
        )
        columns, cache, hidden_BQD = self._cut(merged_BKD, kept_BK)
        rest = slice(_NUM_FULL_LAYERS, None)
        hidden_BQD = run_layers(self.model, cache, columns, hidden_BQD, rest)
        last_BD = self.model.model.language_model.norm(hidden_BQD[:, -1])
        first_BV = self.model.lm_head(last_BD).float()
        return OnlineAnswers(
            tokens=continue_greedily(self.model, cache, columns, first_BV, max_new_tokens),
            first_logits=first_BV,
            last_hidden=last_BD,
            positions=kept_BK,
        )

    @cached_property
    def _contributions(self) -> Tensor:
        return contributions(self.image_hidden)[self.owners]

    def _norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.image_hidden.float(), dim=2)[self.owners]

    def _cut(self, merged_BKD: Tensor, kept_BK: Tensor) -> tuple[Columns, DynamicCache, Tensor]:
        """Return columns, cache and hidden states without the image tokens that are not kept."""
        start, num_image = self.image_start, self.attention.shape[1]
        hidden_BQD = torch.cat(
            [self.hidden[:, :start], merged_BKD, self.hidden[:, start + num_image :]], dim=1
        )
        every_BC = torch.arange(self.hidden.shape[1], device=kept_BK.device).repeat(len(kept_BK), 1)
        columns_BQ = torch.cat(
            [every_BC[:, :start], kept_BK + start, every_BC[:, start + num_image :]], dim=1
        )
        cache = DynamicCache()
        for layer, parts in enumerate(self.keys_values):
            keys, values = (p.take_along_dim(columns_BQ[:, None, :, None], dim=2) for p in parts)
            cache.update(keys, values, layer)
        return self.columns.take(columns_BQ), cache, hidden_BQD


@torch.no_grad()
def read_prompts(
    model: Any,  # noqa: ANN401  (transformers is untyped)
    input_ids: Tensor,
    attention_mask: Tensor,
    image_features: Sequence[Tensor],
) -> OnlinePrompts:
    """Take prompts, each with one image, through the first two decoder layers.

    Args:
        model: a `LlavaForConditionalGeneration` with a Llama decoder, in eval mode.
        input_ids: (B, T) int64, with one image token per token of the image.
        attention_mask: (B, T), 0 where padded.
        image_features: B times (N, D), as the language model takes them. Prompts whose features
            are the same memory and that start with the same text share that work.

    Raises:
        ConfigError: the model is of another kind.
        NonFiniteError: the second layer gives NaN or infinity.
        ValueError: not one image per prompt, in one run with text behind it, of as many tokens as
            features; or images of different numbers of tokens.
    """
    _check_model(model)
    prompts = _split_prompts(model, input_ids, attention_mask, image_features)
    prefixes, owners_B = _read_prefixes(model, prompts)
    cache = DynamicCache()
    for index, layer in enumerate(prefixes.cache.layers):
        cache.update(layer.keys[owners_B], layer.values[owners_B], index)
    behind_ids, is_behind = pad_left([prompt.behind for prompt in prompts])
    columns = columns_of(torch.cat([prefixes.columns.is_token[owners_B], is_behind], dim=1))

    embedded = model.get_input_embeddings()(behind_ids)
    between = run_layers(model, cache, columns, embedded, slice(0, 1))
    behind = run_layers(model, cache, columns, between, slice(1, _NUM_FULL_LAYERS))
    seen_BC = last_attention(
        model, between[:, -1:], cache.layers[-1].keys, columns, layer_index=_NUM_FULL_LAYERS - 1
    )
    end = prefixes.hidden.shape[1]
    image = slice(end - len(prompts[0].features), end)
    _ops.require_finite(prefixes.hidden[:, image], f"output of decoder layer {_NUM_FULL_LAYERS}")
    return OnlinePrompts(
        model=model,
        columns=columns,
        hidden=torch.cat([prefixes.hidden[owners_B], behind], dim=1),
        keys_values=[(layer.keys, layer.values) for layer in cache.layers],
        attention=seen_BC[:, image],
        image_start=image.start,
        image_hidden=prefixes.hidden[:, image],
        owners=owners_B,
    )


def carve_hidden(
    hidden_BND: Tensor,
    information_BN: Tensor,
    attention_BN: Tensor,
    *,
    keep_tokens: int,
    attention_weight: float,
) -> tuple[Tensor, Tensor]:
    """Rank image tokens by two scores, prune and merge: the published selection.

    Args:
        hidden_BND: what is merged, any float dtype.
        information_BN: scores >= 0.
        attention_BN: scores.
        keep_tokens: K.
        attention_weight: of the attention ranking, in [0, 1].

    Returns:
        (B, K, D) features and (B, K) positions, ascending.

    Raises:
        ConfigError: a number is out of range.
        NonFiniteError: a value is NaN or infinite.
    """
    carver = carvers.build(
        "tokencarve",
        {
            "keep_tokens": keep_tokens,
            "attention_weight": attention_weight,
            "information": "llm_hidden",
            "attention": "llm_attention",
        },
    )
    # The contributions to a matrix of one column are its absolute values: the carver then ranks by
    # the scores as they are given.
    signals = {"llm_hidden": information_BN[:, :, None], "llm_attention": attention_BN}
    grid = (1, hidden_BND.shape[1])
    carved = carver.carve(VisualTokens(features=hidden_BND, grid=grid, signals=signals))
    features_BKD = torch.stack([image.features for image in carved])
    return features_BKD, torch.stack([image.positions for image in carved])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prompt:
    before: Tensor  # ids
    features: Tensor  # (N, D)
    behind: Tensor  # ids

    def prefix(self) -> object:
        """Return what is equal for prompts of one prefix."""
        memory = (self.features.data_ptr(), self.features.shape, self.features.stride())
        return *memory, self.features.dtype, *self.before.tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prefixes:
    cache: DynamicCache
    columns: Columns
    hidden: Tensor  # (U, P, D)


def _check_model(model: Any) -> None:  # noqa: ANN401
    kind = model.config.model_type
    text = model.config.get_text_config()
    if (kind, text.model_type) != ("llava", "llama"):
        raise ConfigError(
            f"online tokencarve knows llava with a llama decoder, the model is {kind!r} with "
            f"{text.model_type!r}"
        )
    if text.num_hidden_layers < _NUM_FULL_LAYERS:
        raise ConfigError(
            f"online tokencarve carves after layer {_NUM_FULL_LAYERS}, the decoder has "
            f"{text.num_hidden_layers}"
        )
    if text._attn_implementation not in _ATTENTIONS:
        raise ConfigError(
            f"attention {text._attn_implementation!r} takes no mask of any shape; load the model "
            f"with attn_implementation set to one of: {', '.join(_ATTENTIONS)}"
        )


def _split_prompts(
    model: Any,  # noqa: ANN401
    input_ids: Tensor,
    attention_mask: Tensor,
    image_features: Sequence[Tensor],
) -> list[_Prompt]:
    if len(input_ids) != len(image_features) or len(input_ids) == 0:
        raise ValueError(
            f"{len(input_ids)} prompts and {len(image_features)} images; give one per prompt"
        )
    shapes = sorted({tuple(features.shape) for features in image_features})
    width = model.config.get_text_config().hidden_size
    if len(shapes) > 1 or len(shapes[0]) != 2 or shapes[0][1] != width:
        raise ValueError(
            f"image features have the shapes {shapes}, expected one (N, {width}) for all; batch "
            "images of equal size"
        )
    image_id, prompts = model.config.image_token_id, []
    for index, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
        ids = ids[mask.bool()].to(model.device)
        places = (ids == image_id).nonzero().flatten().tolist()
        num_image = len(image_features[index])
        if not places or places != list(range(places[0], places[0] + num_image)):
            raise ValueError(
                f"prompt {index} has {len(places)} image tokens (id {image_id}), expected one run "
                f"of {num_image}"
            )
        if places[-1] == len(ids) - 1:
            raise ValueError(f"prompt {index} ends with its image; put the question behind it")
        before, behind = ids[: places[0]], ids[places[-1] + 1 :]
        prompts.append(_Prompt(before=before, features=image_features[index], behind=behind))
    return prompts


def _read_prefixes(
    model: Any,  # noqa: ANN401
    prompts: Sequence[_Prompt],
) -> tuple[_Prefixes, Tensor]:
    """Run the different prefixes once, and say (B,) which each prompt has."""
    unique: dict[object, int] = {}
    owners = [unique.setdefault(prompt.prefix(), len(unique)) for prompt in prompts]
    embed, rows = model.get_input_embeddings(), []
    for owner in range(len(unique)):
        prompt = prompts[owners.index(owner)]
        before = embed(prompt.before)
        rows.append(torch.cat([before, prompt.features.to(before)]))
    embedded_UPD, is_token = pad_left(rows)
    cache, columns = DynamicCache(), columns_of(is_token)
    hidden_UPD = run_layers(model, cache, columns, embedded_UPD, slice(0, _NUM_FULL_LAYERS))
    prefixes = _Prefixes(cache=cache, columns=columns, hidden=hidden_UPD)
    return prefixes, torch.tensor(owners, device=hidden_UPD.device)
