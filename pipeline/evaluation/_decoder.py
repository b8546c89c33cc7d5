"""A Llama decoder, some layers and some columns at a time.

`generate` takes a batch through all layers with the same columns in each. Where tokens are dropped
between two layers, layers are run one by one here, with transformers' own modules.

B rows, C columns, Q of them queries (the last ones), D width, V vocabulary, h key heads of width d
with g queries each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """What stands in the columns of a padded batch."""

    is_token: Tensor  # (B, C) bool, False where padded
    positions: Tensor  # (B, C) int64 rotary positions

    def take(self, columns_BC: Tensor) -> "Columns":
        """Return some columns of each row."""
        return Columns(
            is_token=self.is_token.gather(1, columns_BC),
            positions=self.positions.gather(1, columns_BC),
        )

    def grown(self) -> "Columns":
        """Return the columns with one more token in each row, behind the last position."""
        return Columns(
            is_token=torch.cat([self.is_token, torch.ones_like(self.is_token[:, :1])], dim=1),
            positions=torch.cat([self.positions, self.positions[:, -1:] + 1], dim=1),
        )

    def mask(self, num_queries: int, dtype: torch.dtype) -> Tensor:
        """Return (B, 1, Q, C), added to the attention logits of the last Q columns.

        A token sees the tokens up to itself. Padding sees all up to itself: a row that sees nothing
        would turn into NaN in half precision, and from there into its neighbours.
        """
        order_C = torch.arange(self.is_token.shape[1], device=self.is_token.device)
        is_behind_QC = order_C > order_C[-num_queries:, None]
        is_query_BQ1 = self.is_token[:, -num_queries:, None]
        hidden_BQC = is_behind_QC | (is_query_BQ1 & ~self.is_token[:, None, :])
        mask_BQC = torch.zeros(hidden_BQC.shape, dtype=dtype, device=hidden_BQC.device)
        return mask_BQC.masked_fill_(hidden_BQC, torch.finfo(dtype).min)[:, None]


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows of equal length, and (B, C) bool which columns are no padding."""
    ones = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
    padded, is_token = (
        pad_sequence(list(parts), batch_first=True, padding_side="left") for parts in (rows, ones)
    )
    return padded, is_token


def columns_of(is_token_BC: Tensor) -> Columns:
    """Return columns whose tokens are at the positions 0, 1, ..., whatever padding is between."""
    positions_BC = (is_token_BC.long().cumsum(dim=1) - 1).clamp_min(0)
    return Columns(is_token=is_token_BC, positions=positions_BC)


def run_layers(
    model: Any,  # noqa: ANN401
    cache: DynamicCache,
    columns: Columns,
    hidden_BQD: Tensor,
    layers: slice,
) -> Tensor:
    """Take the last Q columns through some decoder layers; the cache holds the others."""
    decoder, num_queries = model.model.language_model, hidden_BQD.shape[1]
    positions_BQ = columns.positions[:, -num_queries:]
    rotary = decoder.rotary_emb(hidden_BQD, position_ids=positions_BQ)
    mask = columns.mask(num_queries, hidden_BQD.dtype)
    for layer in decoder.layers[layers]:
        hidden_BQD = layer(
            hidden_BQD,
            attention_mask=mask,
            position_ids=positions_BQ,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=rotary,
        )
    return hidden_BQD


def last_attention(
    model: Any,  # noqa: ANN401
    last_B1D: Tensor,
    keys_BhCd: Tensor,
    columns: Columns,
    *,
    layer_index: int,
) -> Tensor:
    """Return (B, C) float32 what the last token pays each column in a layer, mean over heads.

    Args:
        model: a `LlavaForConditionalGeneration` with a Llama decoder.
        last_B1D: the token before that layer.
        keys_BhCd: the layer's keys, rotated.
        columns: of the batch.
        layer_index: counts from 0.
    """
    decoder = model.model.language_model
    layer = decoder.layers[layer_index]
    batch, heads, _, width = keys_BhCd.shape
    query = layer.self_attn.q_proj(layer.input_layernorm(last_B1D))
    query_BH1d = query.view(batch, 1, -1, width).transpose(1, 2)
    cos, sin = decoder.rotary_emb(last_B1D, position_ids=columns.positions[:, -1:])
    query_BH1d, _ = apply_rotary_pos_emb(query_BH1d, query_BH1d, cos, sin)
    query_Bhgd = query_BH1d.reshape(batch, heads, -1, width).float()
    logits_BhgC = query_Bhgd @ keys_BhCd.float().mT * layer.self_attn.scaling
    logits_BhgC = logits_BhgC.masked_fill(~columns.is_token[:, None, None], -torch.inf)
    return logits_BhgC.softmax(dim=3).mean(dim=(1, 2))


def continue_greedily(
    model: Any,  # noqa: ANN401
    cache: DynamicCache,
    columns: Columns,
    logits_BV: Tensor,
    max_new_tokens: int,
) -> list[list[int]]:
    """Return the most likely next tokens, one after the other, up to an end token."""
    decoder, embed = model.model.language_model, model.get_input_embeddings()
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    answers: list[list[int]] = [[] for _ in logits_BV]
    while True:
        token_B = logits_BV.argmax(dim=1)
        is_open = False
        for answer, token in zip(answers, token_B.tolist(), strict=True):
            if not answer or (answer[-1] not in ends and len(answer) < max_new_tokens):
                answer.append(token)
                is_open |= token not in ends and len(answer) < max_new_tokens
        if not is_open:
            return answers
        columns = columns.grown()
        hidden_B1D = run_layers(model, cache, columns, embed(token_B[:, None]), slice(None))
        logits_BV = model.lm_head(decoder.norm(hidden_B1D[:, -1]))
