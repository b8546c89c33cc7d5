"""Cluster the tokens by cosine and keep the mean of each cluster: a codebook per image or clip.

Source: Zhang et al., VQToken: Neural Discrete Token Representation Learning for Extreme Token
Reduction in Video Large Language Models, arXiv 2503.16980; the repository's head as described in
`form="elbow"`, without its unused attention module.
Differs: `form="fixed"`, the default, is a training-free variant: as many clusters as the budget
says, starts that lie far from one another instead of drawn ones, and means of the tokens as they
are. `form="elbow"` does what the released code runs: 12 to `max_clusters` clusters, as many as the
elbow of the distortion says, drawn starts, and means of the tokens scaled to length 1, which only a
model trained with them copes with. Every image draws the same numbers from its own generator, so
it does not depend on its batch-mates; the draws follow the published order. The elbow obeys the
budget as an upper bound; the published code knows none, and fails below 14. Added: zero tokens,
positions, sizes. Clusters that end empty are dropped, where the code outputs zeros.
Needs: no signal.
Cost: O(K N D) per image and step of k-means, some 10 to 20 steps; the elbow runs k-means up to 22
times, image by image, as each draw depends on those before it.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _kmeans, _merge, _ops, _similarity
from pipeline.carvers._base import BudgetCarver
from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Vqtoken(BudgetCarver):
    """Replace each cluster by its mean, placed at the lower median of its members' positions.

    At most K tokens: fewer where tokens are alike. Ranks fall with the size; equal sizes rank the
    lower position first.

    Args:
        form: how many clusters, where they start, and what is averaged.
        max_clusters: most clusters of the elbow form, within the budget; 32 as published.
        seed: of the draws of the elbow form, in [0, 2**32).
    """

    nested: ClassVar[bool] = False  # another number of clusters is another clustering

    conserves: ClassVar[bool] = True

    averages: ClassVar[bool] = False  # the elbow form averages unit vectors

    form: Literal["fixed", "elbow"] = "fixed"
    max_clusters: Annotated[int, Field(ge=1)] = 32
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        num_tokens = tokens.features.shape[1]
        num_kept = self.budget(num_tokens)
        if num_kept == num_tokens:
            order_BN = _ops.spread_order(tokens.grid, tokens.features, tokens.num_views)
            return _ops.keep(tokens.features, order_BN)
        unit_BND = _similarity.unit(tokens.features)
        if self.form == "fixed":
            return _codebook(tokens.features, _kmeans.spread_clusters(unit_BND, num_kept))
        labels_BN = torch.stack([self._elbow(unit_ND, num_kept) for unit_ND in unit_BND])
        return _codebook(unit_BND.to(tokens.features.dtype), labels_BN)

    def _elbow(self, unit_ND: Tensor, num_kept: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return _kmeans.elbow_clusters(unit_ND, min(self.max_clusters, num_kept), generator)


def _codebook(rows_BND: Tensor, labels_BN: Tensor) -> list[CarvedTokens]:
    """Return the mean of the rows of each cluster that is not empty."""
    num_tokens = labels_BN.shape[1]
    num_clusters = int(labels_BN.max()) + 1
    means_BKD, sizes_BK, positions_BK = _merge.group_means(rows_BND, labels_BN, num_clusters)
    # The largest first, then the lowest position; an empty cluster after all others.
    order_BK = (positions_BK - sizes_BK.long() * num_tokens).argsort(dim=1)
    return _ops.collect(
        means_BKD,
        order_BK,
        positions_BK.gather(1, order_BK),
        sizes_BK.gather(1, order_BK),
        counts_B=(sizes_BK > 0).sum(dim=1),
    )
