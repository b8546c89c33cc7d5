"""Make each kept token a weighted mean of all tokens, by how similar their keys are.

Source: Token Transforming: A Unified and Training-Free Token Compression Framework for Vision
Transformer Acceleration, arXiv 2506.05709; its repository (MIT) holds no code.
Differs: this is a reconstruction, not the published method. The paper fixes the form, Y = W X with
dense rows of W from the similarity of M informative tokens to all N, normalised; the temperature,
the score of informativeness and the layers are not published. Here the attention is the score, the
cosine of the head-mean keys the similarity, and it happens once, after the tower; tokens are not
restored for dense prediction. Rows are normalised, so each result stands for N / K tokens; the
features of a smaller budget are among those of a larger one, but their sizes are not. A budget
of all tokens leaves them unchanged, where the formula would still blend them.
Needs: attention (class token's, or received where a tower has none) and head-mean keys.
Cost: O(K N D) per image.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _ops, _similarity
from pipeline.carvers._base import BudgetCarver
from pipeline.carvers._image_pool import product
from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class TokenTransforming(BudgetCarver):
    """Blend all tokens into the places of the K that draw most attention; ranks follow it.

    Args:
        attention: what makes a token informative.
        temperature: of the softmax over cosines. Towards 0 a kept token is itself only, or the
            mean of those with equal keys; towards infinity it is the mean of the image.
    """

    nested: ClassVar[bool] = False  # sizes are N / K

    conserves: ClassVar[bool] = True

    attention: Literal["cls_attention", "received_attention"] = "cls_attention"
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1

    @property
    def needs(self) -> frozenset[str]:
        """The attention and the keys."""
        return frozenset({self.attention, "mean_keys"})

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        num_tokens = tokens.features.shape[1]
        num_kept = self.budget(num_tokens)
        kept_BK = _ops.best_first(_ops.signal(tokens, self.attention))[:, :num_kept]
        if num_kept == num_tokens:
            return _ops.keep(tokens.features, kept_BK)
        blended_BKD = product(self._weights(tokens, kept_BK), tokens.features.float())
        rows_BK = torch.arange(num_kept, device=kept_BK.device).expand_as(kept_BK)
        sizes_BK = torch.full(kept_BK.shape, num_tokens / num_kept, device=kept_BK.device)
        return _ops.collect(blended_BKD.to(tokens.features.dtype), rows_BK, kept_BK, sizes_BK)

    def _weights(self, tokens: VisualTokens, kept_BK: Tensor) -> Tensor:
        """Return the (B, K, N) share of every token in each kept one; rows sum to 1."""
        keys_BNX = _similarity.unit(_ops.signal(tokens, "mean_keys"))
        cosines_BKN = product(_ops.take_rows(keys_BNX, kept_BK), keys_BNX.mT)
        return (cosines_BKN / self.temperature).softmax(dim=2)
