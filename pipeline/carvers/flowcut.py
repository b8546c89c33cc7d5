"""Follow the flow of information through the tower, layer by layer, and drop where it thins out.

A token's score in a layer is its share of the class token's attention plus its share of what is
like the class token's value, times the length of its own value; scores are averaged over layers,
each counting as much as all before it. In every other layer some of the worst tokens drop out, the
more the less evenly attention is spread, and in the last but one all beyond the budget.

Source: Tong et al., FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-
Language Models, arXiv 2505.19536; github.com/TungChintao/FlowCut @ a2ecd24, Apache-2.0.
Differs: the original drops tokens inside the tower while it runs, so that later layers never see
them. Here the tower has run in full, and the same scores and schedule are applied to what its
layers recorded: attention and similarity are shared out among the tokens that are left, but were
made with all of them, and the features that stay are those of the full tower. Kept tokens can
therefore differ from the original's, and no time is saved in the tower. How many tokens drop out
is decided for each image, there by the largest number of the batch. Its path for towers without a
class token and its pruning inside the language model, which needs the question, are left out. Views
of an image have equal shares of the budget, as there.
Needs: the attention flow of all layers up to the selected one; towers with a class token only.
Cost: O(L N log N) per image.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.carvers import _ops, _views
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FlowCut(SelectionCarver):
    """Drop tokens by their score over layers until K are left; ranks follow the last score."""

    nested: ClassVar[bool] = False  # how many drop out in a layer depends on the budget

    @property
    def needs(self) -> frozenset[str]:
        """The attention flow."""
        return frozenset(["attention_flow"])

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return the tokens that are left, the highest score first."""
        return _views.select_in_each(tokens, num_kept, _select)


def _select(tokens: VisualTokens, num_kept: int) -> Tensor:
    flow_LBN3 = _ops.signal(tokens, "attention_flow").movedim(2, 0)
    # The selected layer itself runs after the last cut; with one layer there is no other.
    last = max(0, len(flow_LBN3) - 2)
    scores_BN = flow_LBN3.new_zeros(flow_LBN3.shape[1:3])
    left_BN = torch.ones_like(scores_BN, dtype=torch.bool)
    for layer in range(last + 1):
        attention_BN, similarity_BN, lengths_BN = flow_LBN3[layer].unbind(dim=2)
        attention_BN = _shares(attention_BN, left_BN)
        flow_BN = (attention_BN + _shares(similarity_BN, left_BN)) * lengths_BN
        scores_BN = flow_BN if layer == 0 else (scores_BN + flow_BN) / 2
        if (last - layer) % 2 == 0:
            left_BN = _best(
                scores_BN, left_BN, _room(attention_BN, left_BN, last - layer, num_kept)
            )
    return _ops.best_first(scores_BN.masked_fill(~left_BN, -torch.inf))[:, :num_kept]


def _shares(values_BN: Tensor, left_BN: Tensor) -> Tensor:
    """Return non-negative values as shares of their sum over the tokens left; 0 for the others."""
    left_values_BN = values_BN * left_BN
    total_B1 = left_values_BN.sum(dim=1, keepdim=True)
    return left_values_BN / torch.where(total_B1 > 0, total_B1, 1)


def _room(attention_BN: Tensor, left_BN: Tensor, layers_to_go: int, num_kept: int) -> Tensor:
    """Return (B, 1) how many tokens of each image stay in a layer that drops some.

    Args:
        attention_BN: shares of the class token's attention.
        left_BN: True for the tokens that are left.
        layers_to_go: 0 leaves `num_kept`.
        num_kept: K, the least that stays.
    """
    num_left_B1 = left_BN.sum(dim=1, keepdim=True)
    if layers_to_go == 0:
        return num_left_B1.clamp_max(num_kept)
    entropy_B1 = torch.special.entr(attention_BN).sum(dim=1, keepdim=True)
    evenness_B1 = entropy_B1 / num_left_B1.clamp_min(2).log()
    surplus_B1 = num_left_B1 - num_kept
    dropped_B1 = (surplus_B1 / math.sqrt(layers_to_go) * (1 - evenness_B1.square())).round()
    return num_left_B1 - dropped_B1.long().clamp_min(0).minimum(surplus_B1)


def _best(scores_BN: Tensor, left_BN: Tensor, room_B1: Tensor) -> Tensor:
    """Return (B, N) True for those of the tokens left that have room, the best-scored ones."""
    order_BN = _ops.best_first(scores_BN.masked_fill(~left_BN, -torch.inf))
    return _ops.inverse(order_BN) < room_B1
