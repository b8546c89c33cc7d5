"""Keep every s-th token: the fixed-stride sampling of ADSC, as a baseline without its training.

Source: ADSC, arXiv 2602.12618, no code; only the sampling pattern is taken from it.
Differs: this is not ADSC. The method samples at several layers of a language model that is tuned
until its attention has moved the information into the tokens that survive; its layers and ratios
are not published. Here tokens are sampled once, after the tower, and what the others held is lost.
Unlike `uniform_grid`, which keeps exactly K tokens and is nested, the stride is a whole number:
576 tokens at K = 128 become 116 (every fifth), or 64 (every third row and column).
Needs: no signal.
Cost: O(K) per image.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.carvers import _ops
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class AdscStride(SelectionCarver):
    """Keep the first token of every run of s; s is the smallest with at most K tokens kept.

    Ranks run coarse to fine over what is kept.

    Args:
        pattern: `raster` takes every s-th token of the whole sequence, all views in one;
            `rows_and_columns` every s-th row and every s-th column of each view, and only where
            there are more views than K, every n-th view as well.
    """

    nested: ClassVar[bool] = False  # another budget has another stride

    pattern: Literal["raster", "rows_and_columns"] = "raster"

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return the same positions for every image: at most `num_kept`, in coarse order."""
        if self.pattern == "raster":
            cells, views = (1, tokens.features.shape[1]), 1
            view_step, row_step, column_step = 1, 1, _ceil(cells[1], num_kept)
        else:
            cells, views = tokens.grid, tokens.num_views
            view_step = _ceil(views, num_kept)
            row_step = column_step = _square_step(cells, num_kept // _ceil(views, view_step))
        places_TRC = torch.arange(views * cells[0] * cells[1], device=tokens.features.device)
        kept_TRC = places_TRC.view(views, *cells)[::view_step, ::row_step, ::column_step]
        coarse = (kept_TRC.shape[1], kept_TRC.shape[2])
        order_BK = _ops.spread_order(coarse, tokens.features, len(kept_TRC))
        return kept_TRC.flatten()[order_BK]


def _square_step(cells: tuple[int, int], max_cells: int) -> int:
    """Return the smallest step along both axes that leaves at most `max_cells` cells."""
    rows, columns = cells
    steps = range(1, max(rows, columns) + 1)
    return next(s for s in steps if _ceil(rows, s) * _ceil(columns, s) <= max_cells)


def _ceil(count: int, step: int) -> int:
    return -(-count // step)
