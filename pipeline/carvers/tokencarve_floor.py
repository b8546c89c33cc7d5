"""TokenCarve with a floor: a share of the budget is spread over the grid whatever the ranking says.

Attention rankings can be attacked: a perturbed image, or an odd one, may draw all attention and
information to one region and so erase the others. Here `floor_ratio` of the K tokens are the first
of the coarse-to-fine order of the grid (`uniform_grid`). They stay as they are: neither pruned nor
merged, and nothing is merged into them. The rest of the budget goes to TokenCarve over the tokens
that are left.

Source: none for the floor, a mitigation built here against ranking attacks as in Less Is More -
Until It Breaks (arXiv 2601.12042), not tested by its authors; the ranked part is Tan et al.,
TokenCarve, arXiv 2503.10501; see `tokencarve`.
Differs: from TokenCarve by the floor; `floor_ratio=0` is TokenCarve. No pixel can remove the floor,
since it does not look at them. A square of the grid without any of F floor tokens has a side below
2 sqrt(N / F) cells: at most 7 / 5 / 4 on 24 x 24 tokens with floors of 16 / 32 / 64 (found by trial
on many grids, not proven). Floor and ranked tokens take turns in the ranks, so that the best k
tokens hold k * floor_ratio floor tokens, rounded, coarse to fine, for every k: a reader of a prefix
keeps the protection. Duplicates may stay that TokenCarve would have merged.
Needs: as `tokencarve`.
Cost: as `tokencarve`.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _ops
from pipeline.carvers._tokencarve import RankedByInformation, prune_and_merge
from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class TokenCarveFloor(RankedByInformation):
    """Keep an even floor of tokens unchanged, and carve the rest of the budget by rank.

    Args:
        floor_ratio: share of the budget that is spread over the grid; 1 keeps nothing else.
    """

    nested: ClassVar[bool] = False  # which tokens are merged depends on the budget

    floor_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.25

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        features_BND = tokens.features
        num_kept = self.budget(features_BND.shape[1])
        is_floor_K = self._floor_places(num_kept).to(features_BND.device)
        num_floor = int(is_floor_K.sum())
        floor_BF = _ops.spread_order(tokens.grid, features_BND, tokens.num_views)[:, :num_floor]
        if num_floor == num_kept:
            return _ops.keep(features_BND, floor_BF)
        ranked_BR = _without(self.order(tokens), floor_BF)
        kept = prune_and_merge(features_BND, ranked_BR, num_kept - num_floor)
        # Turns: sorting the places by kind gives, for each row below, the place it goes to.
        place_K = is_floor_K.argsort(stable=True)
        turn_K = place_K.argsort()
        rows_BK = torch.cat([kept.rows, floor_BF + kept.features.shape[1]], dim=1)
        positions_BK = torch.cat([kept.positions, floor_BF], dim=1)
        sizes_BK = torch.cat([kept.sizes, torch.ones_like(floor_BF, dtype=torch.float32)], dim=1)
        return _ops.collect(
            torch.cat([kept.features, features_BND], dim=1),
            rows_BK[:, turn_K],
            positions_BK[:, turn_K],
            sizes_BK[:, turn_K],
        )

    def _floor_places(self, num_kept: int) -> Tensor:
        """Return (K,) bool, by rank: whether a floor token has it; any k first hold their share."""
        shares_K = torch.arange(num_kept + 1, dtype=torch.float64) * self.floor_ratio
        return (shares_K + 0.5).floor().diff() > 0


def _without(order_BN: Tensor, left_out_BF: Tensor) -> Tensor:
    """Return (B, N - F) positions of an order less some of them."""
    is_out_BN = torch.zeros_like(order_BN, dtype=torch.bool).scatter_(1, left_out_BF, True)
    places_BN = is_out_BN.gather(1, order_BN).byte().argsort(dim=1, stable=True)
    return order_BN.gather(1, places_BN[:, : order_BN.shape[1] - left_out_BF.shape[1]])
