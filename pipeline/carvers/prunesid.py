"""Group tokens by the image's principal directions, and keep the best unlike tokens of each group.

Source: Fang et al., Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via
Synergistic Importance-Diversity (PruneSID), arXiv 2603.09480; github.com/ZhengyaoFang/PruneSID @
4ef17d9, no licence file.
Differs: the released code takes directions from a randomised PCA, under which kept sets overlap by
half to three quarters; these are exact eigenvectors, of no matter which sign, and those of rounding
level are no group (equal eigenvalues, of orthonormal tokens say, stay ambiguous). The code keeps
the class token and K - 1 patches; a cache holds patches only, so K of them are kept and shared out.
Scores are the attention, as in the code for LLaVA, or the weight in the group's direction, as in
the paper and the code for Qwen2-VL, whose other constants are not used. Per-image budgets (-Dyn)
are not part of the code. Ranks take the best token of each group first, then the second ones.
Needs: with `score="attention"` one attention of the vision tower.
Cost: 2 N^2 D and N^3 in float64 (on a CPU one core per image); the suppression is some passes over
N^2, up to N / 2 where each token would suppress the next.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.carvers import _ops, _similarity, _suppression
from pipeline.carvers._base import SelectionCarver
from pipeline.carvers._principal import token_weights
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class PruneSID(SelectionCarver):
    """Cluster into K / 4 groups, suppress within each, and share K among the groups.

    Args:
        score: what tokens of a group are ranked by.
        attention: read where that is the attention.
    """

    nested: ClassVar[bool] = False  # groups, threshold and shares change with the budget

    score: Literal["attention", "projection"] = "attention"
    attention: Literal["cls_attention", "received_attention"] = "cls_attention"

    @property
    def needs(self) -> frozenset[str]:
        """The attention, if it is the score."""
        return frozenset({self.attention} if self.score == "attention" else ())

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return the best token of each group, the second ones, and so on."""
        num_groups = max(1, num_kept // 4)
        weights_BNG = token_weights(tokens.features.float().sigmoid(), num_groups)
        groups_BN = weights_BNG.argmax(dim=2)
        if self.score == "attention":
            scores_BN = _ops.signal(tokens, self.attention)
        else:
            scores_BN = weights_BNG.amax(dim=2)
        order_BN = _ops.best_first(scores_BN)
        stays_BN = _suppress(tokens.features, groups_BN, order_BN, num_kept)
        sizes_BG = _count(groups_BN, torch.ones_like(groups_BN), num_groups)
        shares_BG = _shares(sizes_BG, _count(groups_BN, stays_BN.long(), num_groups), num_kept)

        order_BN = order_BN.gather(1, _ops.best_first(stays_BN.gather(1, order_BN).float()))
        places_BN = _places(groups_BN, order_BN, sizes_BG)
        over_BN = places_BN >= shares_BG.gather(1, groups_BN)
        turns_BN = places_BN.masked_fill(over_BN, groups_BN.shape[1])
        by_turn_BN = turns_BN.gather(1, order_BN).argsort(dim=1, stable=True)
        return order_BN.gather(1, by_turn_BN)[:, :num_kept]


def _suppress(features_BND: Tensor, groups_BN: Tensor, order_BN: Tensor, num_kept: int) -> Tensor:
    """Return (B, N) whether each token is unlike all better survivors of its group."""
    num_tokens = groups_BN.shape[1]
    units_BND = _similarity.unit(features_BND)
    cosines_BNN = _similarity.gram(units_BND)
    # The mean over pairs is in the length of the sum; a token with itself counts 1, a zero one 0.
    selves_B = units_BND.abs().amax(dim=2).count_nonzero(dim=1)
    total_B = units_BND.sum(dim=1).square().sum(dim=1) - selves_B
    mean_B = total_B / max(1, num_tokens * (num_tokens - 1))
    alike_BNN = cosines_BNN > (num_kept / 32 * mean_B)[:, None, None]
    same_BNN = groups_BN[:, :, None] == groups_BN[:, None, :]
    return _suppression.survivors(alike_BNN.logical_and_(same_BNN), order_BN)


def _count(groups_BN: Tensor, values_BN: Tensor, num_groups: int) -> Tensor:
    """Return (B, G) sums of whole numbers by group."""
    return values_BN.new_zeros(len(groups_BN), num_groups).scatter_add_(1, groups_BN, values_BN)


def _places(groups_BN: Tensor, order_BN: Tensor, sizes_BG: Tensor) -> Tensor:
    """Return (B, N) how many tokens of a token's group come before it in an order."""
    by_group_BN = order_BN.gather(1, groups_BN.gather(1, order_BN).argsort(dim=1, stable=True))
    starts_BG = sizes_BG.cumsum(dim=1) - sizes_BG
    return _ops.inverse(by_group_BN) - starts_BG.gather(1, groups_BN)


def _shares(sizes_BG: Tensor, survivors_BG: Tensor, num_kept: int) -> Tensor:
    """Return (B, G) tokens that each group keeps, K in all.

    One each, the rest in proportion to survivors; up to a bound, which rises where it leaves too
    few. What bounds withhold goes to the groups of most survivors, up to their bounds.
    """
    least_BG = sizes_BG.clamp_max(1)
    most_BG = survivors_BG.clamp_max(5 * -(-num_kept // 64))
    most_BG = torch.minimum(most_BG + _rise(most_BG, sizes_BG, num_kept), sizes_BG)
    others_B1 = num_kept - least_BG.sum(dim=1, keepdim=True)
    parts_BG = survivors_BG.cumsum(dim=1).double() * others_B1
    ends_BG = (parts_BG / survivors_BG.sum(dim=1, keepdim=True)).round().long()
    shares_BG = ends_BG.diff(dim=1, prepend=torch.zeros_like(others_B1)) + least_BG
    shares_BG = torch.minimum(shares_BG, most_BG)

    order_BG = _ops.best_first(survivors_BG)
    room_BG = (most_BG - shares_BG).gather(1, order_BG)
    missing_B1 = num_kept - shares_BG.sum(dim=1, keepdim=True)
    before_BG = room_BG.cumsum(dim=1) - room_BG
    extra_BG = torch.minimum((missing_B1 - before_BG).clamp_min(0), room_BG)
    return shares_BG.scatter_add(1, order_BG, extra_BG)


def _rise(most_BG: Tensor, sizes_BG: Tensor, num_kept: int) -> Tensor:
    """Return (B, 1) the least number that, added to the bounds, leaves room for K tokens."""
    low_B1 = torch.zeros_like(most_BG[:, :1])
    high_B1 = sizes_BG.sum(dim=1, keepdim=True)
    for _ in range(int(high_B1[0]).bit_length() + 1):
        middle_B1 = (low_B1 + high_B1) // 2
        room_B1 = torch.minimum(most_BG + middle_B1, sizes_BG).sum(dim=1, keepdim=True)
        high_B1 = torch.where(room_B1 >= num_kept, middle_B1, high_B1)
        low_B1 = torch.where(room_B1 >= num_kept, low_B1, middle_B1 + 1).minimum(high_B1)
    return high_B1
