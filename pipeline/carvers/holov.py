"""Share the budget among strips of the image by their attention, and keep the best of each strip.

Source: Zou et al., Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic
Context Retention (HoloV), arXiv 2510.02912; repository @ 1d2e65e, Apache-2.0.
Differs: this is the released rule without its similarity matrix. The code rescales a strip's
diversity to the mean attention of the run, where it cancels: shares computed from attention alone
were the same in all tests. "Crops" are runs of the raster order there too, 1.5 rows at 16 crops of
576 tokens, over all views of an image. Where a strip's share is more than it holds, the released
code fills up with zero vectors; here the best tokens of the other strips take those places.
`received_attention` is for towers without a class token. Ranks take turns among the strips, so
that a prefix of them keeps the shares roughly.
Needs: one attention of the vision tower.
Cost: a few sorts of N numbers per image.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _ops
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class HoloV(SelectionCarver):
    """Keep the most attended tokens of each strip, as many as the strip's share of attention.

    Args:
        attention: what tokens are scored by.
        crops: strips of nearly equal length, at most N; by default 1024 / K at 576 tokens, as
            published (16, 8 and 32 strips at 64, 128 and 32 tokens), and in proportion to N.
    """

    nested: ClassVar[bool] = False  # shares change with the budget

    attention: Literal["cls_attention", "received_attention"] = "cls_attention"
    crops: Annotated[int, Field(ge=1)] | None = None

    @property
    def needs(self) -> frozenset[str]:
        """The attention."""
        return frozenset({self.attention})

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return the best of each strip in turns, in proportion to the strips' shares."""
        attention_BN = _ops.signal(tokens, self.attention)
        num_tokens = attention_BN.shape[1]
        crops = self.crops or max(1, 1024 * num_tokens // (576 * num_kept))
        strips_N, lengths_P = _strips(num_tokens, min(crops, num_tokens), attention_BN.device)
        shares_BP = _shares(attention_BN, strips_N, lengths_P, num_kept)

        order_BN = _ops.best_first(attention_BN)
        by_strip_BN = strips_N[order_BN].argsort(dim=1, stable=True)
        grouped_BN = order_BN.gather(1, by_strip_BN)
        starts_P = lengths_P.cumsum(dim=0) - lengths_P
        places_N = torch.arange(num_tokens, device=strips_N.device) - starts_P[strips_N]
        # In (0, 1] for a token within its strip's share; the others follow by attention.
        turns_BN = (places_N + 1) / shares_BP[:, strips_N]
        turns_BN = torch.where(turns_BN > 1, 2, turns_BN)
        turns_BN = torch.empty_like(turns_BN).scatter_(1, grouped_BN, turns_BN)
        by_turn_BN = turns_BN.gather(1, order_BN).argsort(dim=1, stable=True)
        return order_BN.gather(1, by_turn_BN)[:, :num_kept]


def _strips(num_tokens: int, crops: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the strip of each position and the length of each strip; the first are longer."""
    lengths_P = torch.full((crops,), num_tokens // crops, device=device)
    lengths_P[: num_tokens % crops] += 1
    strips_N = torch.arange(crops, device=device).repeat_interleave(lengths_P)
    return strips_N, lengths_P


def _shares(attention_BN: Tensor, strips_N: Tensor, lengths_P: Tensor, num_kept: int) -> Tensor:
    """Return (B, P) tokens due to each strip, K in all: in proportion to its mean attention.

    What rounding down leaves goes to the strips of the highest mean, one each.
    """
    weights_BP = attention_BN.new_zeros((len(attention_BN), len(lengths_P)), dtype=torch.float64)
    # Float64: equal strips have equal means, and whole shares stay whole.
    weights_BP.index_add_(1, strips_N, attention_BN.double())
    weights_BP /= lengths_P
    total_B1 = weights_BP.sum(dim=1, keepdim=True)
    weights_BP = torch.where(total_B1 > 0, weights_BP, 1)
    shares_BP = (num_kept * weights_BP / weights_BP.sum(dim=1, keepdim=True)).floor().long()
    rest_B1 = num_kept - shares_BP.sum(dim=1, keepdim=True)
    return shares_BP + (_ops.inverse(_ops.best_first(weights_BP)) < rest_B1)
