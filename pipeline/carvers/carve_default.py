"""Keep what stands out of an image, spread over it; merge what is like it, and average the rest.

A token's weight is its distance from the image's mean direction: what is everywhere in an image,
its background, weighs little. Tokens are picked by the determinant of the kernel

    K_ij = (w_i w_j)^sharpness * cos(r_i, r_j) * exp(-d_ij^2 / (2 radius^2))

where r is a token's direction less the mean one and d the distance in the grid: next to a kept
token that it resembles a token gains little, so an object costs few tokens, and its like elsewhere
counts again. A pick that weighs little is given back: what it would cost goes to the background.
A token that was not picked is averaged into the pick near it that is most like it, if that is more
like it than the mean of the rest. The rest becomes means of runs of tokens. Sizes are kept: to a
model that is told places and sizes (placement `weighted` of `consumers.hf`) the image is nearly
what it was.

Source: this project, measured in `benchmarks/fidelity.md`. The weight is that of Cen-Prune, the
picks are the greedy ones of a determinantal point process (Kulesza and Taskar, arXiv 1207.6083),
merging and sizes follow ToMe (arXiv 2210.09461) and RESTORE (arXiv 2606.01711); the distance in the
grid, the sharpness, and how the budget is shared with the background are added.
Needs: no signal, so it works with every encoder.
Cost: O(N^2 D) for the kernel, then O(N K) per kept token.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _distance, _greedy, _merge, _ops, _similarity
from pipeline.carvers._base import BudgetCarver
from pipeline.carvers._image_pool import product
from pipeline.types import CarvedTokens, VisualTokens

_ROUNDS = 2  # of deciding what is background: by its mean, then by the mean of what stayed

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class CarveDefault(BudgetCarver):
    """Keep K tokens: picks, and means of the background, at least one.

    Means come first in the ranks, then picks in their order. A pick stands where it was, a mean at
    the lower median of its positions.

    Args:
        sharpness: how much more a token's weight counts than what is near it.
        radius: of the grid's cells; how far a kept token makes its like less wanted.
        reach: of the grid's cells; how far from a pick a token may be that is merged into it.
        means_share: of the budget for means, at least.
        least_weight: of a pick, as a share of the heaviest token's. As long as half of the budget
            is left for picks, those that weigh less make room for more means.
    """

    nested: ClassVar[bool] = False  # what is not picked depends on the budget
    conserves: ClassVar[bool] = True

    sharpness: _Positive = 2.0
    radius: _Positive = 1.5
    reach: _Positive = 2.0
    means_share: Annotated[float, Field(ge=0, le=0.5)] = 1 / 16
    least_weight: Annotated[float, Field(ge=0, le=1)] = 0.4

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        num_tokens = tokens.features.shape[1]
        num_kept = self.budget(num_tokens)
        squares_NN = _distance.grid_squares(tokens).to(tokens.features.device)
        if num_kept == num_tokens:
            picks_BK, _ = self._picks(tokens, squares_NN, num_kept)
            return _ops.keep(tokens.features, picks_BK)
        num_picks = num_kept - max(1, round(num_kept * self.means_share))
        picks_Bk, counts_B1 = self._picks(tokens, squares_NN, num_picks)
        is_pick_Bk = torch.arange(num_picks, device=picks_Bk.device) < counts_B1
        groups_Bk = torch.arange(num_picks, device=picks_Bk.device) + num_kept - counts_B1
        owners_BN = self._owners(tokens, squares_NN, picks_Bk, is_pick_Bk, groups_Bk)
        means_BKD, sizes_BK, positions_BK = _merge.group_means(tokens.features, owners_BN, num_kept)
        positions_BK = _merge.put(positions_BK, groups_Bk, picks_Bk, is_pick_Bk)
        rows_BK = torch.arange(num_kept, device=owners_BN.device).expand_as(positions_BK)
        return _ops.collect(means_BKD, rows_BK, positions_BK, sizes_BK)

    def _picks(
        self, tokens: VisualTokens, squares_NN: Tensor, num_picks: int
    ) -> tuple[Tensor, Tensor]:
        """Return (B, num_picks) positions, those that weigh enough first; (B, 1) how many stay."""
        num_images, device = len(tokens.features), tokens.features.device
        if num_picks == 0:
            empty_B0 = torch.empty(num_images, 0, dtype=torch.int64, device=device)
            return empty_B0, empty_B0.sum(dim=1, keepdim=True)
        apart_BND = _similarity.centred(_similarity.unit(tokens.features))
        weights_BN = torch.linalg.vector_norm(apart_BND, dim=2)
        largest_B1 = weights_BN.amax(dim=1, keepdim=True)
        weights_BN = weights_BN / torch.where(largest_B1 > 0, largest_B1, 1)
        powers_BN = weights_BN**self.sharpness
        kernel_BNN = _similarity.cosines(apart_BND)
        kernel_BNN *= torch.exp(squares_NN / (-2 * self.radius**2))
        kernel_BNN *= powers_BN[:, :, None]
        kernel_BNN *= powers_BN[:, None, :]
        picks_Bk = _greedy.log_determinant(kernel_BNN, num_picks)
        is_light_Bk = weights_BN.gather(1, picks_Bk) < self.least_weight
        heavy_first_Bk = is_light_Bk.long().argsort(dim=1, stable=True)
        least = -(-self.budget(tokens.features.shape[1]) // 2)
        counts_B1 = (~is_light_Bk).sum(dim=1, keepdim=True).clamp_min(min(least, num_picks))
        return picks_Bk.gather(1, heavy_first_Bk), counts_B1

    def _owners(
        self,
        tokens: VisualTokens,
        squares_NN: Tensor,
        picks_Bk: Tensor,
        is_pick_Bk: Tensor,
        groups_Bk: Tensor,
    ) -> Tensor:
        """Return (B, N) the group of each token: that of a pick, or a mean's."""
        num_images, num_tokens, _ = tokens.features.shape
        own_BN = torch.full((num_images, num_tokens), -1, device=picks_Bk.device)
        own_BN = _merge.put(own_BN, picks_Bk, groups_Bk, is_pick_Bk)
        rest_BN = is_left_BN = own_BN < 0
        num_means_B1 = self.budget(num_tokens) - is_pick_Bk.sum(dim=1, keepdim=True)
        if picks_Bk.shape[1]:
            units_BND = _similarity.unit(tokens.features)
            alike_BNk = product(units_BND, _ops.take_rows(units_BND, picks_Bk).mT)
            is_out_BNk = (squares_NN > self.reach**2)[picks_Bk].mT | ~is_pick_Bk[:, None]
            alike_BN, nearest_BN = alike_BNk.masked_fill_(is_out_BNk, -torch.inf).max(dim=2)
            for _ in range(_ROUNDS):
                mean_B1D = (units_BND * is_left_BN[..., None]).sum(dim=1, keepdim=True)
                to_mean_BN = (units_BND * _similarity.unit(mean_B1D)).sum(dim=2)
                stays_BN = (alike_BN <= to_mean_BN) & rest_BN
                # Where there would be fewer tokens than means, nothing is merged into picks.
                is_enough_B1 = stays_BN.sum(dim=1, keepdim=True) >= num_means_B1
                is_left_BN = torch.where(is_enough_B1, stays_BN, rest_BN)
            own_BN = torch.where(rest_BN, groups_Bk.gather(1, nearest_BN), own_BN)
        num_left_B1 = is_left_BN.sum(dim=1, keepdim=True)
        runs_BN = (is_left_BN.cumsum(dim=1) - 1) * num_means_B1 // num_left_B1
        return torch.where(is_left_BN, runs_BN, own_BN)
