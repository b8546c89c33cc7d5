"""Keep exactly K tokens spread evenly over the grid: the baseline that looks at no feature.

Source: none; uniform sampling, which VTC-Bench (arXiv 2510.07143) finds hard to beat.
Differs: from "every n-th token" it works for every K and is nested. Tokens are chosen one by one,
each the one that most reduces the mean squared distance of all cells to their nearest kept cell.
On a 24 x 24 grid the mean distance at 64 / 128 / 192 tokens is 1.17 / 0.82 / 0.67 cells; the
best regular (not nested) sub-grid of at most as many tokens has 1.07 / 0.91 / 0.74.
Needs: no signal.
Cost: once per grid and process, about N log N small window sums (0.1 s at N = 576).
"""

from dataclasses import dataclass

from torch import Tensor

from pipeline.carvers import _ops
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class UniformGrid(SelectionCarver):
    """Keep the first K tokens of a coarse-to-fine order of the grid."""

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return the same positions for every image; ranks run coarse to fine."""
        order_BN = _ops.spread_order(tokens.grid, tokens.features, tokens.num_views)
        return order_BN[:, :num_kept]
