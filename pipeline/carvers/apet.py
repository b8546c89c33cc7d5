"""Keep the tokens that a few basis tokens reconstruct worst, and those; merge the rest into them.

Source: Ma et al., ApET: Approximation-Error Guided Token Compression for Efficient VLMs, arXiv
2602.19870; github.com/MaQianKun0/ApET @ 70cc01b, MIT; its stage after the tower, which sees no
text.
Differs: the basis starts at the token nearest the mean instead of a random one. The published code
puts basis tokens in the places of the kept tokens of least error, so that those are lost, the
position of each basis token is another token's, and the basis counts twice, since it is merged as
well: `placement="faithful"`. By default basis tokens stand where they come from, and each token
counts once. Added: a budget that the basis would fill is half basis, so that there is always
something to merge into; a budget of all tokens leaves them unchanged; sizes. Coefficients are
solved in float64, in which the published ridge of 1e-5 is not lost beside large features.
Needs: no signal.
Cost: O(K N D) per image.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _anchors, _greedy, _ops
from pipeline.carvers._base import BudgetCarver
from pipeline.carvers._image_pool import product
from pipeline.types import CarvedTokens, VisualTokens

_RIDGE = 1e-5  # added to the diagonal of the products of the basis


@dataclass(frozen=True, kw_only=True)
class Apet(BudgetCarver):
    """Rank tokens by what a linear combination of the basis leaves of them; keep the largest rests.

    A dropped token is averaged into the kept one of highest cosine, which keeps its place; basis
    tokens stay as they are. Ranks take both kinds in turns, by their shares: the basis in the order
    in which it was found, the others by falling error.

    Args:
        num_basis: tokens to reconstruct from, far from one another; 10 as published.
        placement: where basis tokens stand. `faithful`: the first found takes the place of the
            largest error among those overwritten.
    """

    nested: ClassVar[bool] = False  # what is merged depends on the budget

    conserves: ClassVar[bool] = True  # but for an instance with the faithful placement

    num_basis: Annotated[int, Field(ge=1)] = 10
    placement: Literal["corrected", "faithful"] = "corrected"

    def __post_init__(self) -> None:
        """Check the budget; say that the faithful placement loses tokens."""
        super().__post_init__()
        object.__setattr__(self, "conserves", self.placement == "corrected")

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        features_BND = tokens.features
        num_tokens = features_BND.shape[1]
        num_kept = self.budget(num_tokens)
        num_basis = self.num_basis if self.num_basis < num_kept else num_kept // 2
        basis_BM = _basis(features_BND.float(), num_basis)
        num_others = num_kept - num_basis
        errors_BN = _errors(features_BND.double(), basis_BM)
        if self.placement == "faithful" and num_kept < num_tokens:
            order_BN = _ops.best_first(errors_BN)
            places_BM = order_BN[:, num_others:num_kept]
            rest_BR = order_BN[:, num_kept:]
        else:
            order_BN = _ops.best_first(errors_BN.scatter(1, basis_BM, -1.0))
            places_BM = basis_BM
            rest_BR = order_BN[:, num_others : num_tokens - num_basis]
        others_BO = order_BN[:, :num_others]
        means_BOD, sizes_BO = _absorb(features_BND, others_BO, rest_BR)

        rows_BKD = torch.cat([_ops.take_rows(features_BND, basis_BM), means_BOD], dim=1)
        sizes_BK = torch.cat([torch.ones_like(basis_BM, dtype=torch.float32), sizes_BO], dim=1)
        positions_BK = torch.cat([places_BM, others_BO], dim=1)
        every_BK = torch.arange(num_kept, device=basis_BM.device).expand_as(positions_BK)
        order_BK = _anchors.in_turns(every_BK, (every_BK >= num_basis).long())
        return _ops.collect(
            rows_BKD, order_BK, positions_BK.gather(1, order_BK), sizes_BK.gather(1, order_BK)
        )


def _basis(features_BND: Tensor, num_basis: int) -> Tensor:
    """Return (B, num_basis) tokens, each the farthest from those before; the most usual first."""
    to_mean_BN = torch.linalg.vector_norm(
        features_BND - features_BND.mean(dim=1, keepdim=True), dim=2
    )
    first_B = to_mean_BN.argmin(dim=1)
    if num_basis == 0:
        return first_B[:, None][:, :0]

    def nearest(distances_BN: Tensor, chosen_B: Tensor) -> Tensor:
        chosen_B1D = _ops.take_rows(features_BND, chosen_B[:, None])
        return torch.minimum(
            distances_BN, torch.linalg.vector_norm(features_BND - chosen_B1D, dim=2)
        )

    far_BN = torch.full_like(to_mean_BN, torch.finfo(torch.float32).max)
    return _greedy.pick(num_basis, far_BN, lambda distances: distances, nearest, first_B)


def _errors(features_BND: Tensor, basis_BM: Tensor) -> Tensor:
    """Return (B, N) float32 lengths of what the least-squares reconstruction leaves over."""
    basis_BMD = _ops.take_rows(features_BND, basis_BM)
    values_BM, vectors_BMM = torch.linalg.eigh(product(basis_BMD, basis_BMD.mT))
    # Equal basis tokens make the products singular; rounding may put eigenvalues below 0.
    inverse_BM1 = 1 / (values_BM.clamp_min(0) + _RIDGE)[:, :, None]
    rotated_BMN = product(vectors_BMM.mT, product(basis_BMD, features_BND.mT))
    weights_BMN = product(vectors_BMM, inverse_BM1 * rotated_BMN)
    rest_BND = features_BND - product(weights_BMN.mT, basis_BMD)
    # In float32, lengths that are equal but for float64 rounding are ties again.
    return torch.linalg.vector_norm(rest_BND, dim=2).float()


def _absorb(features_BND: Tensor, others_BO: Tensor, rest_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, O, D) means of the others with the rest that is nearest them, and their sizes."""
    members_BM = torch.cat([others_BO, rest_BR], dim=1)
    owners_BM = _anchors.nearest(features_BND, others_BO).gather(1, members_BM)
    rows_BMD = _ops.take_rows(features_BND, members_BM)
    return _ops.group_mean(rows_BMD, owners_BM, others_BO.shape[1])
