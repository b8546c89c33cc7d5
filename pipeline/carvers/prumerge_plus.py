"""Keep the outliers of attention and evenly spaced tokens; add to each the tokens most like it.

Tokens far above the quartiles of the attention stay, and of all others every s-th, with s from the
number of outliers. Each takes in the 32 tokens of most similar keys, weighted by attention; one
more token is the sum of all that did not stay, weighted likewise.

Source: Shang et al., LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal
Models (PruMerge+), arXiv 2403.15388; github.com/42Shawn/LLaVA-PruMerge @ 097c041, Apache-2.0.
Differs: quartiles are of each image, there of the whole batch. Guards: where no token is an
outlier the one of highest attention is; s is at least 1 (the original fails without outliers and
where over a third of the tokens are some). As there the last position is never an evenly spaced
one. With a budget, which the original has in training only, it keeps about as many of both kinds
and may name a token twice; here there are exactly K, a missing one taken by attention. The class
token does not count, so quartiles and weights are those of visual tokens, as there. Added: ranks,
positions, sizes; of equal tokens the lower position. Views of an image are one sequence.
Needs: class attention (or received attention, an adaptation) and keys of the tower's last layer.
Cost: O(N^2 D) per image.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.carvers import _anchors, _ops, _similarity
from pipeline.carvers._base import BudgetCarver
from pipeline.types import CarvedTokens, VisualTokens

NEIGHBOURS = 32


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(BudgetCarver):
    """Choose as many tokens as attention has outliers, about four for each, unless told a budget.

    Tokens that stay count as themselves, although others were added to them; the last token counts
    as all that did not stay and stands at their lower median position. Ranks: outliers, evenly
    spaced tokens, each by falling attention, then the last token, which is all a budget of 1 keeps.

    Args:
        keep_tokens: tokens per image; without it and `keep_ratio` an image decides its own count.
        attention: in which outliers are found, and by which neighbours are weighted.
    """

    nested: ClassVar[bool] = False  # what the last token stands for depends on the budget

    conserves: ClassVar[bool] = True

    averages: ClassVar[bool] = False  # neighbours are added to a token

    attention: Literal["last_cls_attention", "received_attention"] = "last_cls_attention"

    def __post_init__(self) -> None:
        """Check the budget, if there is one."""
        if self.keep_tokens is not None or self.keep_ratio is not None:
            super().__post_init__()

    @property
    def needs(self) -> frozenset[str]:
        """The attention and the keys."""
        return frozenset([self.attention, "last_keys"])

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        attention_BN = _ops.signal(tokens, self.attention)
        num_tokens = attention_BN.shape[1]
        if self.keep_tokens is None and self.keep_ratio is None:
            order_BN, counts_B = _adaptive(attention_BN)
        elif self.budget(num_tokens) == num_tokens:
            return _ops.keep(tokens.features, _ops.best_first(attention_BN))
        else:
            order_BN, counts_B = _budgeted(attention_BN, self.budget(num_tokens) - 1)

        return _merge(tokens, attention_BN, order_BN, counts_B[:, None])


def _adaptive(attention_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, N) positions, those that stay first, and (B,) how many stay, by the outliers."""
    num_tokens = attention_BN.shape[1]
    values_BN = attention_BN.double()
    lower_B, upper_B = values_BN.quantile(values_BN.new_tensor([0.25, 0.75]), dim=1)
    limit_B = upper_B + 1.5 * (upper_B - lower_B)
    outliers_B1 = (values_BN > limit_B[:, None]).sum(dim=1, keepdim=True).clamp_min(1)
    # The same two roundings as of the original's ratio, and of 1 over it.
    steps_B1 = (1 / (outliers_B1.double() / num_tokens)).long() // 3
    return _order(attention_BN, outliers_B1, torch.zeros_like(steps_B1), steps_B1.clamp_min(1))


def _budgeted(attention_BN: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Return (B, N) positions, those that stay first, and (B,) `num_kept`, half of them spaced."""
    num_images, num_tokens = attention_BN.shape
    best_B1 = torch.full((num_images, 1), max(1, num_kept // 2), device=attention_BN.device)
    steps_B1 = num_tokens // best_B1
    order_BN, counts_B = _order(attention_BN, best_B1, steps_B1 // 2, steps_B1)
    return order_BN, torch.full_like(counts_B, num_kept)


def _order(
    attention_BN: Tensor, best_B1: Tensor, starts_B1: Tensor, steps_B1: Tensor
) -> tuple[Tensor, Tensor]:
    """Order positions: the best, the evenly spaced, all others; count the first two kinds."""
    num_tokens = attention_BN.shape[1]
    places_BN = _ops.inverse(_ops.best_first(attention_BN))
    cells_N = torch.arange(num_tokens, device=attention_BN.device)
    best_BN = places_BN < best_B1
    spaced_BN = (cells_N >= starts_B1) & ((cells_N - starts_B1) % steps_B1 == 0)
    spaced_BN &= cells_N < num_tokens - 1
    kinds_BN = torch.where(best_BN, 0, torch.where(spaced_BN, 1, 2))
    return (kinds_BN * num_tokens + places_BN).argsort(dim=1), (kinds_BN < 2).sum(dim=1)


def _merge(
    tokens: VisualTokens, attention_BN: Tensor, order_BN: Tensor, counts_B1: Tensor
) -> list[CarvedTokens]:
    """Return the first `counts_B1` tokens of each order with their neighbours, and the rest."""
    num_tokens = order_BN.shape[1]
    most = int(counts_B1.max())
    merged_BKD = _with_neighbours(tokens, attention_BN, order_BN[:, :most])
    gone_BN = _ops.inverse(order_BN) >= counts_B1
    cells_B1N = torch.arange(num_tokens, device=order_BN.device).expand_as(order_BN)[:, None]
    weights_B1N = (attention_BN * gone_BN)[:, None]
    rest_B1D = _anchors.weighted_sums(tokens.features.float(), cells_B1N, weights_B1N)
    num_gone_B1 = num_tokens - counts_B1
    first_gone_BN = gone_BN.long().argsort(dim=1, descending=True, stable=True)
    middle_B1 = first_gone_BN.gather(1, (num_gone_B1 - 1).clamp_min(0) // 2)

    # Row `most` is the rest. It follows the tokens of its image, which may be fewer.
    rows_M = torch.arange(most + 1, device=order_BN.device)
    is_rest_BM = rows_M >= counts_B1
    positions_BM = torch.cat([order_BN[:, :most], middle_B1], dim=1)
    return _ops.collect(
        torch.cat([merged_BKD, rest_B1D], dim=1).to(tokens.features.dtype),
        torch.where(is_rest_BM, most, rows_M),
        torch.where(is_rest_BM, middle_B1, positions_BM),
        torch.where(is_rest_BM, num_gone_B1, 1).float(),
        (counts_B1 + (num_gone_B1 > 0)).squeeze(1),
    )


def _with_neighbours(tokens: VisualTokens, attention_BN: Tensor, kept_BK: Tensor) -> Tensor:
    """Return (B, K, D) float32: the tokens kept, each with its weighted neighbours added."""
    cosines_BNN = _similarity.cosines(_ops.signal(tokens, "last_keys"))
    cosines_BNN.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    nearby = min(NEIGHBOURS, attention_BN.shape[1] - 1)
    nearest_BKN = _ops.take_rows(cosines_BNN, kept_BK).argsort(dim=2, descending=True, stable=True)
    nearest_BKn = nearest_BKN[:, :, :nearby]
    weights_BKn = attention_BN.gather(1, nearest_BKn.flatten(1)).view(nearest_BKn.shape)
    features_BND = tokens.features.float()
    sums_BKD = _anchors.weighted_sums(features_BND, nearest_BKn, weights_BKn)
    return _ops.take_rows(features_BND, kept_BK) + sums_BKD
