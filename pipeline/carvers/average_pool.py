"""Average the tokens of each cell of a coarser grid: plain down-sampling.

Source: none; average pooling of visual tokens, as in LLaVolta (github.com/Beckschen/LLaVolta).
Differs: cells never overlap and every token counts once, also where the grid does not divide
evenly (`adaptive_avg_pool2d` would count border tokens twice). The pooled grid has at most K
cells: the one whose cells are smallest in squared height plus squared width, so 24 x 24 at 128
tokens becomes 11 x 11 = 121, not 8 x 16.
Needs: no signal.
Cost: O(N D) per image.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.carvers import _ops
from pipeline.carvers._base import BudgetCarver
from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class AveragePool(BudgetCarver):
    """Replace each cell by the mean of its tokens, placed at the cell's central token.

    Ranks run coarse to fine over the pooled grid; `sizes` are the tokens per cell and sum to N.
    """

    nested: ClassVar[bool] = False  # another budget cuts other cells

    conserves: ClassVar[bool] = True

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        rows, columns = tokens.grid
        num_kept = self.budget(tokens.features.shape[1])
        views = min(tokens.num_views, num_kept)
        pooled = pooled_grid(rows, columns, num_kept // views)
        device = tokens.features.device
        view_cells_T, view_centres = _cut(tokens.num_views, views, device)
        row_cells_R, row_centres = _cut(rows, pooled[0], device)
        column_cells_C, column_centres = _cut(columns, pooled[1], device)
        owners_TRC = (view_cells_T[:, None] * pooled[0] + row_cells_R)[:, :, None] * pooled[1]
        owners_N = (owners_TRC + column_cells_C).flatten()
        centres_TRC = (view_centres[:, None] * rows + row_centres)[:, :, None] * columns
        centres_K = (centres_TRC + column_centres).flatten()

        num_images = tokens.features.shape[0]
        means_BKD, sizes_BK = _ops.group_mean(
            tokens.features, owners_N.expand(num_images, -1), len(centres_K)
        )
        order_BK = _ops.spread_order(pooled, means_BKD, views)
        return _ops.collect(means_BKD, order_BK, centres_K[order_BK], sizes_BK.gather(1, order_BK))


def pooled_grid(rows: int, columns: int, max_cells: int) -> tuple[int, int]:
    """Return the (rows, columns) of at most `max_cells` cells that are smallest and squarest."""
    grids = [(r, min(columns, max_cells // r)) for r in range(1, min(rows, max_cells) + 1)]
    return min(grids, key=lambda grid: (rows / grid[0]) ** 2 + (columns / grid[1]) ** 2)


def _cut(length: int, num_cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cut a line into nearly equal cells: (length,) cell of each place, (num_cells,) centres."""
    cells_L = torch.arange(length, device=device) * num_cells // length
    # Cell i starts at the first place p with p * num_cells // length == i.
    starts = -(-torch.arange(num_cells + 1, device=device) * length // num_cells)
    return cells_L, (starts[:-1] + starts[1:] - 1) // 2
