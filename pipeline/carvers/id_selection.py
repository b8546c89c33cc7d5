"""Keep the most attended tokens, each pick lowering the scores of tokens similar to it.

Scores start as attention stretched to [0, 1]. The best-scored token i is picked, and the score of
every other token j becomes max(0, s_j - exp(-gamma (1 - cos_ij)^2) s_i); then the next.

Source: ID-Selection: Importance-Diversity Based Visual Token Selection for Efficient LVLM
Inference, arXiv 2604.05601; written from a description of the method.
Differs: this is the question-free variant `id-cls`. The importance of the original may be text
attention, class attention or both; which one gave its published numbers is not known, so none of
them holds for this variant. Its cosines are between the stored features, whatever their stage.
Equal attention everywhere gives scores of 1. Added: ties to the lower position, and `spent`.
Needs: cls_attention or received_attention.
Cost: O(N^2 D) for the cosines, then O(N) per kept token.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _greedy, _ops, _similarity
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class IDSelection(SelectionCarver):
    """Keep K important, mutually different tokens; ranks follow the picks.

    Args:
        gamma: how fast a pick's effect falls with distance. 20 is the paper's; with 0 the first
            pick takes its whole score from every token.
        attention: of the class token, or for towers without one the mean attention received.
        spent: who comes next once every score is 0, as soon happens where tokens are much alike:
            the token of the most `attention`, or that of the lowest `position`, which the rule as
            it is written comes down to.
    """

    gamma: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 20.0
    attention: Literal["cls_attention", "received_attention"] = "cls_attention"
    spent: Literal["attention", "position"] = "attention"

    @property
    def needs(self) -> frozenset[str]:
        """The attention that scores start from."""
        return frozenset({self.attention})

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return positions in the order of picking."""
        importance_BN = _similarity.minmax(_ops.signal(tokens, self.attention))
        reserve_BN = importance_BN - 1 if self.spent == "attention" else importance_BN * 0
        distances_BNN = 1 - _similarity.cosines(tokens.features)

        def update(scores_BN: Tensor, chosen_B: Tensor) -> Tensor:
            kernel_BN = (_similarity.row(distances_BNN, chosen_B).square() * -self.gamma).exp()
            lost_BN = kernel_BN * scores_BN.gather(1, chosen_B[:, None])
            return (scores_BN - lost_BN).clamp_min(0)

        return _greedy.pick(
            num_kept,
            importance_BN,
            # At most 0, so below every score that is left.
            lambda scores_BN: torch.where(scores_BN > 0, scores_BN, reserve_BN),
            update,
        )
