"""The two stages of TokenCarve, for the carvers that share them. See `tokencarve.py`.

B images, N tokens, R of them ranked, K kept, A targets, O others, M merged, D width.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _ops
from pipeline.carvers._base import BudgetCarver
from pipeline.carvers._image_pool import product
from pipeline.carvers._information import contributions
from pipeline.carvers._subspace import contributions_from_subspace
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class RankedByInformation(BudgetCarver):
    """Ranks tokens by information and attention.

    Args:
        information: the (N, D') matrix whose singular directions are scored.
        attention: the (N,) attention that is ranked beside it.
        attention_weight: 0 ranks by information only, 1 by attention only.
        solver: `exact` decomposes the whole matrix; `subspace` computes the leading
            `subspace_rank` directions and estimates what the others add.
        subspace_rank: of `solver="subspace"`; where min(N, D') is not above it, exact is used.
    """

    information: Literal["attention_output", "llm_hidden", "features"] = "attention_output"
    attention: Literal["cls_attention", "llm_attention", "received_attention"] = "cls_attention"
    attention_weight: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    solver: Literal["exact", "subspace"] = "exact"
    subspace_rank: Annotated[int, Field(ge=1)] = 64

    @property
    def needs(self) -> frozenset[str]:
        """The two signals, less one that has no weight or is the features themselves."""
        names: set[str] = set()
        if self.attention_weight > 0:
            names.add(self.attention)
        if self.attention_weight < 1 and self.information != "features":
            names.add(self.information)
        return frozenset(names)

    def order(self, tokens: VisualTokens) -> Tensor:
        """Return (B, N) positions, the token that carries most first."""
        points_BN = tokens.features.new_zeros(tokens.features.shape[:2], dtype=torch.float64)
        if self.attention_weight > 0:
            points_BN += self.attention_weight * _points(_ops.signal(tokens, self.attention))
        if self.attention_weight < 1:
            points_BN += (1 - self.attention_weight) * _points(self._contributions(tokens))
        # In float32, sums that are equal but for float64 rounding are ties again.
        return _ops.best_first(points_BN.float())

    def _contributions(self, tokens: VisualTokens) -> Tensor:
        from_features = self.information == "features"
        matrix_BND = tokens.features if from_features else _ops.signal(tokens, self.information)
        if self.solver == "subspace" and self.subspace_rank < min(matrix_BND.shape[1:]):
            return contributions_from_subspace(matrix_BND, self.subspace_rank)
        return contributions(matrix_BND)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What is left of a batch, the best token of each image first."""

    features: Tensor  # (B, M, D) what `rows` points into
    rows: Tensor  # (B, K)
    positions: Tensor  # (B, K)
    sizes: Tensor  # (B, K)


def prune_and_merge(features_BND: Tensor, order_BR: Tensor, num_kept: int) -> Kept:
    """Prune to 1.5 K tokens, then average K / 2 of their lower half into the upper half.

    Args:
        features_BND: all tokens.
        order_BR: positions of those that take part, best first.
        num_kept: K, in [1, R].
    """
    pruned = min(order_BR.shape[1], num_kept + num_kept // 2)
    # In position order, so that equal similarities prefer the lower position.
    targets_BA = order_BR[:, : pruned // 2].sort(dim=1).values
    others_BO = order_BR[:, pruned // 2 : pruned].sort(dim=1).values
    merged_BM, owners_BM, rest_BO = _match(features_BND, targets_BA, others_BO, pruned - num_kept)

    kept_BK = torch.cat([targets_BA, others_BO.gather(1, rest_BO)], dim=1)
    rows_BR = torch.cat([kept_BK, others_BO.gather(1, merged_BM)], dim=1)
    self_BK = torch.arange(num_kept, device=kept_BK.device).expand_as(kept_BK)
    means_BKD, sizes_BK = _ops.group_mean(
        _ops.take_rows(features_BND, rows_BR), torch.cat([self_BK, owners_BM], dim=1), num_kept
    )

    by_rank_BK = _places(order_BR, features_BND.shape[1]).gather(1, kept_BK).argsort(dim=1)
    return Kept(
        features=means_BKD,
        rows=by_rank_BK,
        positions=kept_BK.gather(1, by_rank_BK),
        sizes=sizes_BK.gather(1, by_rank_BK),
    )


def _points(scores_BN: Tensor) -> Tensor:
    """Return N points for the best score of an image, down to 1 for the worst (Borda count)."""
    num_tokens = scores_BN.shape[1]
    return (num_tokens - _ops.inverse(_ops.best_first(scores_BN))).double()


def _places(order_BR: Tensor, num_tokens: int) -> Tensor:
    """Return (B, N) the place of each position in its order; any number where it has none."""
    places_BR = torch.arange(order_BR.shape[1], device=order_BR.device).expand_as(order_BR)
    return order_BR.new_zeros(len(order_BR), num_tokens).scatter_(1, order_BR, places_BR)


def _match(
    features_BND: Tensor, targets_BA: Tensor, others_BO: Tensor, num_merged: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose what is merged into what, by cosine similarity.

    Returns:
        Indices into `others_BO` of the `num_merged` tokens to merge; for each the index into
        `targets_BA` of its most similar token; indices into `others_BO` of those that stay.
    """
    if num_merged == 0:
        every_BO = torch.arange(others_BO.shape[1], device=others_BO.device).expand_as(others_BO)
        return every_BO[:, :0], every_BO[:, :0], every_BO
    targets_BAD = _ops.take_rows(features_BND, targets_BA).double()
    others_BOD = _ops.take_rows(features_BND, others_BO).double()
    cosines_BOA = product(others_BOD, targets_BAD.mT)
    cosines_BOA /= _length(others_BOD)[:, :, None] * _length(targets_BAD)[:, None, :]
    # Rounded to float32, duplicates tie again whatever order the product was summed in.
    best_BO, owners_BO = cosines_BOA.float().max(dim=2)
    order_BO = _ops.best_first(best_BO)
    merged_BM = order_BO[:, :num_merged]
    return merged_BM, owners_BO.gather(1, merged_BM), order_BO[:, num_merged:]


def _length(vectors_BNX: Tensor) -> Tensor:
    """Return the norms, but never 0: a zero vector is similar to nothing."""
    # Below any norm that float32 can express, and its square above what float64 cannot.
    return torch.linalg.vector_norm(vectors_BNX, dim=2).clamp_min(1e-100)
