"""Keep the tokens of high attention, and of the rest those left when near-duplicates are removed.

The rest is thinned in rounds: a list of it is split into two halves, and the up to 8 tokens of one
half that are most like a token of the other half go.

Source: Zhang et al., Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token
Pruning in VLMs (VisPruner), arXiv 2412.01818; github.com/Theia-4869/VisPruner @ aefa01a,
Apache-2.0. `version="port"`: github.com/Tencent/AngelSlim @ 67394ce, Apache-2.0 by its headers; it
keeps a different set of tokens, so results of the two are not comparable.
Differs: the original fails where a list is odd; here its last token sits such a round out. Both
compare the features that are stored: the original does before the projector, the port behind it.
Of equally similar tokens the first of the list goes. Zero vectors are similar to nothing. Views of
an image are pruned each by itself, with equal shares of the budget.
Needs: the class token's attention, or the received one (the original takes it
for SigLIP, of the last layer; the signal is of the selected one).
Cost: O(N^2 D) per image, and N / 8 rounds over what is left.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _anchors, _ops, _similarity, _views
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens

DROPPED_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class VisPruner(SelectionCarver):
    """Split the budget between important and diverse tokens; ranks take both in turns.

    Args:
        version: `original` lists the rest by falling attention, at first, and leaves it in the
            order of the rounds; `port` lists it by position in every round.
        important_share: share of the budget that goes by attention, rounded down by the original,
            half to even by the port, which leaves at least one token of two or more to the rest.
        attention: whose attention is meant.
    """

    nested: ClassVar[bool] = False  # which tokens are removed depends on how many must go

    version: Literal["original", "port"] = "original"
    important_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    attention: Literal["cls_attention", "received_attention"] = "cls_attention"

    @property
    def needs(self) -> frozenset[str]:
        """The attention."""
        return frozenset([self.attention])

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return important and diverse tokens in turns, each by falling attention."""
        return _views.select_in_each(tokens, num_kept, self._select)

    def _select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        by_attention_BN = _ops.best_first(_ops.signal(tokens, self.attention))
        num_important = self._num_important(num_kept)
        rest_BR = by_attention_BN[:, num_important:]
        if num_important < num_kept < by_attention_BN.shape[1]:
            cosines_BNN = _similarity.cosines(tokens.features)
            rest_BR = self._thin(cosines_BNN, rest_BR, num_kept - num_important)
        diverse_BV = rest_BR[:, : num_kept - num_important]
        places_BV = _ops.inverse(by_attention_BN).gather(1, diverse_BV)
        diverse_BV = diverse_BV.gather(1, places_BV.argsort(dim=1))
        kept_BK = torch.cat([by_attention_BN[:, :num_important], diverse_BV], dim=1)
        is_diverse_K = torch.arange(num_kept, device=kept_BK.device) >= num_important
        return _anchors.in_turns(kept_BK, is_diverse_K.long().expand_as(kept_BK))

    def _num_important(self, num_kept: int) -> int:
        if self.version == "original":
            return int(num_kept * self.important_share)
        limit = num_kept - 1 if num_kept > 1 else num_kept
        return min(limit, round(num_kept * self.important_share))

    def _thin(self, cosines_BNN: Tensor, rest_BR: Tensor, num_left: int) -> Tensor:
        """Remove tokens from the list, round by round, until `num_left` >= 1 are left."""
        original = self.version == "original"
        rest_BR = rest_BR if original else rest_BR.sort(dim=1).values
        while rest_BR.shape[1] > num_left:
            listed = rest_BR.shape[1]
            paired = listed // 2 * 2 if original else listed
            halves = rest_BR[:, 0:paired:2], rest_BR[:, 1:paired:2]
            num_dropped = min(DROPPED_AT_ONCE, listed // 2, listed - num_left)
            similar_BA = _closest(cosines_BNN, *halves)
            survivors_BS = halves[0].gather(1, _ops.best_first(similar_BA)[:, num_dropped:])
            rest_BR = torch.cat([survivors_BS, halves[1], rest_BR[:, paired:]], dim=1)
            if not original:
                rest_BR = rest_BR.sort(dim=1).values
        return rest_BR


def _closest(cosines_BNN: Tensor, left_BA: Tensor, right_BC: Tensor) -> Tensor:
    """Return (B, A) the highest similarity of each token on the left to one on the right."""
    num_images, num_tokens, _ = cosines_BNN.shape
    matrices_B11 = torch.arange(num_images, device=left_BA.device)[:, None, None]
    rows_BA1 = matrices_B11 * num_tokens + left_BA[:, :, None]
    pairs_BAC = cosines_BNN.flatten()[rows_BA1 * num_tokens + right_BC[:, None, :]]
    return pairs_BAC.amax(dim=2)
