"""Keep tokens that add information and draw attention; merge the weaker ones into their like.

A token's information is its contribution to the singular directions of the information matrix;
tokens are ranked by it and by attention, and the two rankings are blended. The best 1.5 K tokens
stay; their lower half then loses K / 2 tokens, each averaged into the most similar token of the
upper half.

Source: Tan et al., TokenCarve: Information-Preserving Visual Token Compression in Multimodal Large
Language Models, arXiv 2503.10501; github.com/ShawnTan86/TokenCarve @ a57bd59, Apache-2.0.
Differs: the published code ranks and merges the hidden states after the second decoder layer, with
the attention of the last prompt token, and so needs the question. Here information and attention
are signals that need no question, while similarity and merging use the features that are stored;
`information="features", attention="llm_attention"` is the published selection, equal on stored
outputs of that code. Added: any N and K (1.5 K is cut to N), N > D, zero vectors (similarity 0),
ties towards the lower position, sizes, batches. Scores come from an eigen-decomposition of the
smaller Gram matrix in float64, not from a full SVD (`benchmarks/tokencarve_svd.md`).
Where singular values repeat (an orthonormal information matrix, say) the published score depends on
which basis the solver picks for them, and so does this one; constant and duplicate tokens do not
cause that. Singular values below sqrt(N * 2.2e-16) of the largest count as 0: they are below the
precision of the float32 SVD of the published code as well.
Needs: by default the class token's attention and the attention output of the vision tower: what
the paper names, and the cheapest pair that an encoder can give. `llm_hidden` and `llm_attention`
are nearer to the published code and cost two decoder layers. No signal for a part of weight 0.
Cost: O(N^2 D + N^3) per image in float64, on a CPU one core per image.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _ops
from pipeline.carvers._base import BudgetCarver
from pipeline.carvers._information import contributions
from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class TokenCarve(BudgetCarver):
    """Rank by information and attention, then prune and merge to exactly K tokens.

    Args:
        information: the (N, D') matrix whose singular directions are scored.
        attention: the (N,) attention that is ranked beside it.
        attention_weight: 0 ranks by information only, 1 by attention only.
    """

    nested: ClassVar[bool] = False  # which tokens are merged depends on the budget

    information: Literal["attention_output", "llm_hidden", "features"] = "attention_output"
    attention: Literal["cls_attention", "llm_attention", "received_attention"] = "cls_attention"
    attention_weight: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5

    @property
    def needs(self) -> frozenset[str]:
        """The two signals, less one that has no weight or is the features themselves."""
        names: set[str] = set()
        if self.attention_weight > 0:
            names.add(self.attention)
        if self.attention_weight < 1 and self.information != "features":
            names.add(self.information)
        return frozenset(names)

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        order_BN = self._order(tokens)
        return _prune_and_merge(tokens.features, order_BN, self.budget(order_BN.shape[1]))

    def _order(self, tokens: VisualTokens) -> Tensor:
        points_BN = tokens.features.new_zeros(tokens.features.shape[:2], dtype=torch.float64)
        if self.attention_weight > 0:
            points_BN += self.attention_weight * _points(_ops.signal(tokens, self.attention))
        if self.attention_weight < 1:
            scores_BN = contributions(self._information(tokens))
            points_BN += (1 - self.attention_weight) * _points(scores_BN)
        # In float32, sums that are equal but for float64 rounding are ties again.
        return _ops.best_first(points_BN.float())

    def _information(self, tokens: VisualTokens) -> Tensor:
        if self.information == "features":
            return tokens.features
        return _ops.signal(tokens, self.information)


def _points(scores_BN: Tensor) -> Tensor:
    """Return N points for the best score of an image, down to 1 for the worst (Borda count)."""
    num_tokens = scores_BN.shape[1]
    return (num_tokens - _ops.inverse(_ops.best_first(scores_BN))).double()


def _prune_and_merge(features_BND: Tensor, order_BN: Tensor, num_kept: int) -> list[CarvedTokens]:
    """Prune to 1.5 K tokens, then average K / 2 of their lower half into the upper half."""
    pruned = min(order_BN.shape[1], num_kept + num_kept // 2)
    # In position order, so that equal similarities prefer the lower position.
    targets_BA = order_BN[:, : pruned // 2].sort(dim=1).values
    others_BO = order_BN[:, pruned // 2 : pruned].sort(dim=1).values
    merged_BM, owners_BM, rest_BO = _match(features_BND, targets_BA, others_BO, pruned - num_kept)

    kept_BK = torch.cat([targets_BA, others_BO.gather(1, rest_BO)], dim=1)
    rows_BR = torch.cat([kept_BK, others_BO.gather(1, merged_BM)], dim=1)
    self_BK = torch.arange(num_kept, device=kept_BK.device).expand_as(kept_BK)
    means_BKD, sizes_BK = _ops.group_mean(
        _ops.take_rows(features_BND, rows_BR), torch.cat([self_BK, owners_BM], dim=1), num_kept
    )

    by_rank_BK = _ops.inverse(order_BN).gather(1, kept_BK).argsort(dim=1)
    return _ops.collect(
        means_BKD, by_rank_BK, kept_BK.gather(1, by_rank_BK), sizes_BK.gather(1, by_rank_BK)
    )


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
    cosines_BOA = others_BOD @ targets_BAD.mT
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
