"""Keep tokens that are salient and together resemble every other token: attention times coverage.

Each next token is the one whose attention, times how much it raises the similarity of all tokens
to their nearest kept one, is largest.

Source: Deng et al., SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs,
arXiv 2510.24214; github.com/kinredon/SCOPE @ 6bf7306, no licence file. The port whose outputs the
tests hold: github.com/Tencent/AngelSlim @ 67394ce, Apache-2.0.
Differs: the original scores tower features by the class token's attention among all N + 1 keys;
the port scores projected features, with attention renormalised over the patches of each head, and
keeps other tokens. The rule is the same, so the encoder's `stage` decides: `pre_projector` is the
original, `projected` has the port's features under the original's attention. Similarities are
float32, sums exact. The original splits the budget among the views of a tiled image; here all
views of an image are one set.
Needs: one attention of the vision tower; `received_attention` for towers without a class token.
Cost: N^2 D for the similarities, then K steps over the tokens newly covered, some 20 of 576.
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
class Scope(SelectionCarver):
    """Pick tokens greedily by attention ** alpha times their gain in coverage.

    Args:
        attention: what makes a token salient.
        alpha: exponent of the attention, at least 0; 0 is coverage alone.
    """

    attention: Literal["cls_attention", "received_attention"] = "cls_attention"
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0

    @property
    def needs(self) -> frozenset[str]:
        """The attention, unless its exponent is 0."""
        return frozenset({self.attention} if self.alpha > 0 else ())

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return the picks in order."""
        similarities_BNN = _similarity.cosines(tokens.features)
        if self.alpha == 0:
            return _greedy.coverage(similarities_BNN, num_kept)
        attention_BN = _ops.signal(tokens, self.attention)
        # Relative to the largest, so that no exponent leaves float32; the picks stay the same.
        largest_B1 = attention_BN.amax(dim=1, keepdim=True)
        weights_BN = (attention_BN / torch.where(largest_B1 > 0, largest_B1, 1)) ** self.alpha
        return _greedy.coverage(similarities_BNN, num_kept, weights_BN)
