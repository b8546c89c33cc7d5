"""Greedy answers of a language model to all questions on a batch of images, from given tokens.

What the prompts on an image share, and that is the image, goes through the model once. All of its
prompts then go on in one row, side by side: each sees the shared part and itself and none of the
others, at the positions it would have alone. So keys and values of an image are never copied, and
a step makes the next token of every answer at once. The numbers are those of `model.generate` on
`consumers.hf.prepare`, but for rounding.

B rows (one an image), P prefix columns of the longest row, Q questions, J answers of one row that
go on, S columns of a row's prompts side by side, C columns in all, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.utils import logging

from pipeline.consumers import hf
from pipeline.consumers.placement import HasFeatures, widen_bias, with_places
from pipeline.errors import ConfigError
from pipeline.evaluation.questions import PLAIN_TEMPLATE, fill_template
from pipeline.types import Placement

_MODEL_TYPES = ("llava",)  # questions of one image are asked together behind its tokens
_SHARED, _PADDING = -1, -2  # owners of columns that belong to no prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a model said to Q questions, image after image."""

    tokens: Tensor  # (Q, max_new_tokens) int64; -1 from the end token on
    logits: Tensor  # (Q, V) float32, of the first token of the answer
    hidden: Tensor  # (Q, D) float32, last hidden state at the last token of the prompt


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """The prompts on a batch of images, tokenized and laid out; takes the place of a tokenizer.

    Made by `LanguageModel.lay_out`, used with any tokens of the images.
    """

    prefixes: Sequence[Sequence[int]]  # of each row: what its prompts share, the image included
    images: Sequence[int]  # image of each row
    ids: Tensor  # (B, S) int64, the rest of each row's prompts, one after the other
    owners: Tensor  # (B, S) int64, which of the row's prompts a column belongs to, or padding
    places: Tensor  # (B, S) int64, place of the column in its prompt behind the prefix, from 0
    rows: Tensor  # (Q,) int64, the row of each question
    prompts: Tensor  # (Q,) int64, which prompt of its row it is
    last: Tensor  # (Q,) int64, the column of the last token of its prompt
    pad_token_id: int | None
    eos_token_id: int | None

    def __call__(self, texts: Sequence[str], **_: object) -> dict[str, list[list[int]]]:
        """Return the prefixes as a tokenizer would; `texts` are their row numbers."""
        return {"input_ids": [list(self.prefixes[int(text)]) for text in texts]}


@dataclass(kw_only=True)
class LanguageModel:
    """A model that takes visual tokens, with its tokenizer. Made by `load_model`."""

    model: Any
    processor: Any
    stage: str  # of the features it is given
    template: str  # with `{prompt}`
    max_new_tokens: int

    def __post_init__(self) -> None:
        """Read which tokens end an answer, and which are never said."""
        self._tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self._image_id = int(self.model.config.image_token_id)
        # By pieces and not by name: a tokenizer of any make knows its own image token.
        self._image_token = str(self._tokenizer.convert_ids_to_tokens(self._image_id))
        if not self.template:
            self.template = own_template(self.processor, self._tokenizer, self._image_token)
        fill_template(self.template, [""], self._image_token)
        said = self.model.generation_config
        ends = said.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        device = self.model.device
        self._ends = torch.tensor(ends, dtype=torch.long, device=device)
        self._never = torch.tensor(said.suppress_tokens or [], dtype=torch.long, device=device)
        self._texts: dict[tuple[int, ...], str] = {}

    def lay_out(self, prompts: Sequence[Sequence[str]]) -> PromptBatch:
        """Tokenize the prompts on each image of a batch, and lay them out side by side.

        Args:
            prompts: of each image at least one, without the template.

        Raises:
            ConfigError: a prompt does not hold the image token exactly once.
        """
        rows: list[tuple[int, list[list[int]], int]] = []  # image, prompts, length of the prefix
        for image, own in enumerate(prompts):
            texts = fill_template(self.template, own, self._image_token)
            ids = self._tokenizer(texts, padding=False, return_attention_mask=False)["input_ids"]
            for prompt, text in zip(ids, texts, strict=True):
                if prompt.count(self._image_id) != 1 or prompt[-1] == self._image_id:
                    raise ConfigError(
                        f"prompt {text!r} must hold the image token once, and text behind it"
                    )
            shared = _shared_length(ids)
            if self._image_id in ids[0][:shared]:
                rows.append((image, ids, shared))
            else:  # prompts that differ before the image share nothing of it
                rows += [(image, [prompt], len(prompt) - 1) for prompt in ids]
        return self._lay_out_rows(rows)

    def _lay_out_rows(self, rows: Sequence[tuple[int, list[list[int]], int]]) -> PromptBatch:
        ids, owners, places, of_question = [], [], [], []
        for row, (_, prompts, shared) in enumerate(rows):
            rests = [prompt[shared:] for prompt in prompts]
            ids.append(torch.tensor([i for rest in rests for i in rest]))
            owners.append(torch.tensor([j for j, rest in enumerate(rests) for _ in rest]))
            places.append(torch.tensor([k for rest in rests for k in range(len(rest))]))
            end = 0
            for j, rest in enumerate(rests):
                end += len(rest)
                of_question.append((row, j, end - 1))
        device = self.model.device
        columns = [torch.tensor(column).to(device) for column in zip(*of_question, strict=True)]
        return PromptBatch(
            prefixes=[prompts[0][:shared] for _, prompts, shared in rows],
            images=[image for image, _, _ in rows],
            ids=pad_sequence(ids, batch_first=True).to(device),
            owners=pad_sequence(owners, batch_first=True, padding_value=_PADDING).to(device),
            places=pad_sequence(places, batch_first=True).to(device),
            rows=columns[0],
            prompts=columns[1],
            last=columns[2],
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
        )

    @torch.inference_mode()
    def ask(
        self,
        prompts: PromptBatch,
        images: Sequence[Tensor | HasFeatures],
        *,
        placement: Placement = "packed",
    ) -> Answers:
        """Answer all questions of a batch greedily.

        Args:
            prompts: laid out for these images.
            images: of each its K tokens in position order, of the model's stage: (K, D) features
                or what holds them, with their places where the placement needs those.
            placement: of the tokens.
        """
        names = [str(row) for row in range(len(prompts.images))]
        carved = [images[image] for image in prompts.images]
        inputs = hf.prepare(
            self.model, prompts, names, carved, stage=self.stage, placement=placement
        )
        known_B1 = inputs["attention_mask"].sum(dim=1, keepdim=True)
        if placement != "packed":  # the text goes on behind all tokens that there were
            lengths = [
                len(prefix) - 1 + prod(image.grid)
                for prefix, image in zip(prompts.prefixes, with_places(carved), strict=True)
            ]
            known_B1 = torch.tensor(lengths, device=known_B1.device)[:, None]
        row = _Rows(self.model)
        row.prefill(inputs)
        hidden_BSD = row.step(prompts.ids, prompts.owners, known_B1 + prompts.places)
        hidden_QD = hidden_BSD[prompts.rows, prompts.last]
        logits_QV = self._logits(hidden_QD)
        next_Q = known_B1[prompts.rows, 0] + prompts.places[prompts.rows, prompts.last] + 1
        tokens = self._continue(row, prompts, logits_QV, next_Q)
        return Answers(tokens=tokens, logits=logits_QV.float(), hidden=hidden_QD.float())

    def text(self, tokens: Sequence[int]) -> str:
        """Return one answer of `Answers.tokens` in words."""
        key = tuple(token for token in tokens if token >= 0)
        if key not in self._texts:
            self._texts[key] = str(self._tokenizer.decode(key, skip_special_tokens=True)).strip()
        return self._texts[key]

    def _logits(self, hidden_QD: Tensor) -> Tensor:
        logits_QV: Tensor = self.model.get_output_embeddings()(hidden_QD)
        return logits_QV

    def _continue(
        self, row: "_Rows", prompts: PromptBatch, logits_AV: Tensor, next_Q: Tensor
    ) -> Tensor:
        """Return (Q, max_new_tokens) answers; `next_Q` is where the first token of each stands.

        A is the number of answers that go on; a step costs what the longest row of them does.
        """
        tokens_QT = next_Q.new_full((len(next_Q), self.max_new_tokens), -1)
        going_A = torch.arange(len(next_Q), device=next_Q.device)
        for step in range(self.max_new_tokens):
            chosen_A = logits_AV.index_fill(1, self._never, -torch.inf).argmax(dim=1)
            goes_on_A = ~torch.isin(chosen_A, self._ends)
            going_A, chosen_A = going_A[goes_on_A], chosen_A[goes_on_A]
            tokens_QT[going_A, step] = chosen_A
            if step + 1 == self.max_new_tokens or len(going_A) == 0:
                break
            rows_A, places_A = prompts.rows[going_A], next_Q[going_A] + step
            # Questions go by row, so the first of each row is where its number would be put.
            slots_A = torch.arange(len(rows_A), device=rows_A.device)
            slots_A -= torch.searchsorted(rows_A, rows_A)
            shape = (len(prompts.images), int(slots_A.max()) + 1)
            cells = (rows_A, slots_A)
            hidden_BJD = row.step(
                chosen_A.new_zeros(shape).index_put(cells, chosen_A),
                chosen_A.new_full(shape, _PADDING).index_put(cells, prompts.prompts[going_A]),
                chosen_A.new_zeros(shape).index_put(cells, places_A),
            )
            logits_AV = self._logits(hidden_BJD[cells])
        return tokens_QT


class _Rows:
    """Rows on their way through the model: their keys and values, and who may see them."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401  (transformers is untyped)
        self.model = model.base_model
        self.cache = DynamicCache(config=model.config.get_text_config())
        self.owners_BC: Tensor
        self.bias_B11P: Tensor | None = None  # of the attention scores

    def prefill(self, inputs: dict[str, Any]) -> None:
        """Put what all prompts of a row share through the model; padded on the left."""
        mask_BP = inputs["attention_mask"]
        packed_BP = (mask_BP.cumsum(dim=1) - 1).clamp_min(0)
        self.bias_B11P = inputs.get("position_bias")
        self.model(
            **{"position_ids": packed_BP, **inputs}, past_key_values=self.cache, use_cache=True
        )
        self.owners_BC = torch.where(mask_BP > 0, _SHARED, _PADDING)

    def step(self, ids_BS: Tensor, owners_BS: Tensor, places_BS: Tensor) -> Tensor:
        """Put more columns through the model and return their (B, S, D) last hidden states.

        A column sees the shared ones and, of those of its own prompt, itself and the ones before.
        Padding sees itself: a softmax over nothing would be NaN, and spread.
        """
        num_known, num_new = self.owners_BC.shape[1], owners_BS.shape[1]
        self.owners_BC = torch.cat([self.owners_BC, owners_BS], dim=1)
        columns_C = torch.arange(num_known + num_new, device=ids_BS.device)
        new_S1 = columns_C[num_known:, None]
        is_own_BSC = self.owners_BC[:, None] == owners_BS[:, :, None]
        is_shared_B1C = (self.owners_BC == _SHARED)[:, None]
        sees_BSC = ((is_own_BSC & (owners_BS != _PADDING)[:, :, None]) | is_shared_B1C) & (
            columns_C <= new_S1
        ) | (columns_C == new_S1)
        bias = {}
        if self.bias_B11P is not None:
            bias = {"position_bias": widen_bias(self.bias_B11P, num_known + num_new)}
        return self.model(
            input_ids=ids_BS,
            attention_mask=sees_BSC[:, None],
            position_ids=places_BS,
            past_key_values=self.cache,
            use_cache=True,
            **bias,
        ).last_hidden_state


def load_model(
    place: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Load a model that takes images, from safetensors and without remote code; and its processor.

    Raises:
        ConfigError: it cannot be loaded, or cannot be given visual tokens in place of pixels.
    """
    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(place, revision=revision)
        if config.model_type not in _MODEL_TYPES:
            raise ConfigError(
                f"model {place!r} is a {config.model_type!r}, which cannot be evaluated; known: "
                f"{', '.join(_MODEL_TYPES)}"
            )
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            place,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="sdpa",  # takes a mask of any shape
        )
        processor = transformers.AutoProcessor.from_pretrained(place, revision=revision)
    except (OSError, ValueError) as err:
        if isinstance(err, ConfigError):
            raise
        reason = " ".join(str(err).split())
        raise ConfigError(f"model {place!r} cannot be loaded: {reason}") from err
    finally:
        if had_bar:
            logging.enable_progress_bar()
    return model.to(device).eval(), processor


def own_template(processor: Any, tokenizer: Any, image_token: str) -> str:  # noqa: ANN401
    """Return what the checkpoint's chat template makes of a question on one image.

    Returns:
        The text, with `{prompt}` where the question goes; `PLAIN_TEMPLATE` where the processor has
        no chat template.
    """
    if not getattr(processor, "chat_template", None):
        return PLAIN_TEMPLATE
    content = [{"type": "image"}, {"type": "text", "text": "{prompt}"}]
    chat = [{"role": "user", "content": content}]
    text = str(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    begins = tokenizer(text)["input_ids"][:2]
    if begins == [tokenizer.bos_token_id] * 2:  # once by the template, once by tokenizing
        text = text.removeprefix(tokenizer.bos_token)
    fill_template(text, [""], image_token)
    return text


def _shared_length(ids: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all prompts share, leaving each at least one of its own."""
    longest = min(len(prompt) for prompt in ids) - 1
    return next(
        (place for place in range(longest) if len({prompt[place] for prompt in ids}) > 1), longest
    )
