"""Merge each token of every other place into its most similar token of the places between.

One step halves the tokens at most; steps follow until K are left, the last one merging only its
most similar pairs.

Source: Bolya et al., Token Merging: Your ViT But Faster, arXiv 2210.09461;
github.com/facebookresearch/ToMe @ af95e4b, CC-BY-NC-4.0 (the step is written here from its
description, and gives the numbers of stored runs of that code).
Differs: the paper merges a few tokens inside every block of the tower, by the keys of that block,
and the next attention is told the sizes. Here all steps come after the tower, by the keys of one
layer, which merged tokens carry on as means. Where a budget halves N evenly the merged-into tokens
are the same for every image (576 at 72: columns 7, 15 and 23), and only what joins them adapts.
Added: exactly K tokens, positions, batches; no class token, as a cache holds visual tokens only.
Needs: the head-mean keys of the selected layer; nothing with `metric="features"`.
Cost: O(N^2 D) per image with the width D of the metric.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.carvers import _merge, _ops, _similarity
from pipeline.carvers._base import BudgetCarver
from pipeline.carvers._image_pool import product
from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Tome(BudgetCarver):
    """Merge by bipartite soft matching until K tokens are left, each the mean of its members.

    A token stands at the lower median of its members' positions. Ranks fall with the size; equal
    sizes rank the lower position first.

    Args:
        metric: what similarity is measured on.
    """

    nested: ClassVar[bool] = False  # a smaller budget merges on

    conserves: ClassVar[bool] = True

    metric: Literal["mean_keys", "features"] = "mean_keys"

    @property
    def needs(self) -> frozenset[str]:
        """The keys, unless the features are compared."""
        return frozenset() if self.metric == "features" else frozenset({self.metric})

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        num_tokens = tokens.features.shape[1]
        num_kept = self.budget(num_tokens)
        metric_BNX = (
            tokens.features.float()
            if self.metric == "features"
            else _ops.signal(tokens, self.metric)
        )
        owners_BN = _cascade(metric_BNX, num_kept)
        means_BKD, sizes_BK, positions_BK = _merge.group_means(tokens.features, owners_BN, num_kept)
        # The largest first, then the lowest position: positions are below N.
        rows_BK = (positions_BK - sizes_BK.long() * num_tokens).argsort(dim=1)
        return _ops.collect(
            means_BKD, rows_BK, positions_BK.gather(1, rows_BK), sizes_BK.gather(1, rows_BK)
        )


def _cascade(metric_BNX: Tensor, num_kept: int) -> Tensor:
    """Return (B, N) which of the K merged tokens each token ends in."""
    num_images, num_left, _ = metric_BNX.shape
    owners_BN = torch.arange(num_left, device=metric_BNX.device).expand(num_images, -1)
    while num_left > num_kept:
        # The mean over all members is the size-weighted mean over the tokens they came by.
        means_BTX, _ = _ops.group_mean(metric_BNX, owners_BN, num_left)
        num_merged = min(num_left // 2, num_left - num_kept)
        owners_BN = match(means_BTX, num_merged).gather(1, owners_BN)
        num_left -= num_merged
    return owners_BN


def match(metric_BTX: Tensor, num_merged: int) -> Tensor:
    """Match even places with odd ones, and merge the pairs of the highest cosine similarity.

    Args:
        metric_BTX: what is compared; a zero vector is similar to nothing.
        num_merged: pairs to merge, at most T // 2.

    Returns:
        (B, T) the row of each token in the next list: first the even tokens that were not merged,
        by falling similarity, then all odd tokens in order. Ties go to the lower place.
    """
    unit_BTX = _similarity.unit(metric_BTX)
    cosines_BEO = product(unit_BTX[:, ::2].contiguous(), unit_BTX[:, 1::2].contiguous().mT)
    partners_BE = cosines_BEO.argmax(dim=2)
    best_BE = cosines_BEO.gather(2, partners_BE[:, :, None]).squeeze(2)
    rows_BE = _ops.inverse(_ops.best_first(best_BE)) - num_merged
    num_alone = rows_BE.shape[1] - num_merged
    rows_BT = torch.arange(metric_BTX.shape[1], device=metric_BTX.device) // 2 + num_alone
    rows_BT = rows_BT.repeat(len(rows_BE), 1)
    rows_BT[:, ::2] = torch.where(rows_BE < 0, num_alone + partners_BE, rows_BE)
    return rows_BT
