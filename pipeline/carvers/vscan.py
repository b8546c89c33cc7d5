"""Keep what an early layer finds in every window and a late layer in the whole; merge the rest.

Half of the budget goes to the best tokens of each window by the attention of an early layer, the
other half to the best of all others by that of the selected layer. Every token that is dropped is
averaged into the kept one that is most like it.

Source: Zhang et al., VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language
Models, arXiv 2505.22654, its first stage (the second one needs the question);
github.com/Tencent/SelfEvolvingAgent @ a82450e, MIT.
Differs: the original returns fewer tokens where the local half does not divide by the number of
windows (45 of 58); here those left over go to the windows whose next token has the highest early
attention, and what a window is too small for to others. Its windows are 6 x 6 of a grid of 24 x 24;
here any grid is cut into windows as equal as can be and at most so large, in each view of an image.
There the early layer is block 5 of CLIP ViT-L, 7 of Qwen2.5-VL; here the one the encoder takes as
shallow. Merging takes the features that are stored; sizes are kept. All views of an image share the
global half and the merging. Zero vectors are similar to nothing.
Needs: class (or received) attention of an early and of the selected layer.
Cost: O(N K D) per image.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _anchors, _ops
from pipeline.carvers._base import BudgetCarver
from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VScan(BudgetCarver):
    """Select locally and globally, half each, and merge; ranks take both halves in turns.

    Args:
        window: rows and columns of the largest window.
        attention: of the selected layer, for the global half, which is the larger one.
    """

    nested: ClassVar[bool] = False  # who joins whom depends on the budget

    conserves: ClassVar[bool] = True

    window: Annotated[int, Field(ge=1)] = 6
    attention: Literal["cls_attention", "received_attention"] = "cls_attention"

    @property
    def needs(self) -> frozenset[str]:
        """Attention of an early and of the selected layer."""
        return frozenset([self.attention, "shallow_attention"])

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        kept_BK = self._select(tokens)
        owners_BN = _anchors.nearest(tokens.features, kept_BK)
        means_BKD, sizes_BK = _ops.group_mean(tokens.features, owners_BN, kept_BK.shape[1])
        rows_BK = torch.arange(kept_BK.shape[1], device=kept_BK.device).expand_as(kept_BK)
        return _ops.collect(means_BKD, rows_BK, kept_BK, sizes_BK)

    def _select(self, tokens: VisualTokens) -> Tensor:
        early_BN = _ops.signal(tokens, "shallow_attention")
        num_kept = self.budget(early_BN.shape[1])
        windows_N = _windows(tokens.grid, tokens.num_views, self.window).to(early_BN.device)
        local_BL = _best_of_each(early_BN, windows_N)[:, : num_kept // 2]
        is_local_BN = _anchors.positions_mask(local_BL, early_BN.shape[1])
        late_BN = _ops.signal(tokens, self.attention).masked_fill(is_local_BN, -torch.inf)
        global_BG = _ops.best_first(late_BN)[:, : num_kept - num_kept // 2]
        kept_BK = torch.cat([local_BL, global_BG], dim=1)
        is_global_K = torch.arange(num_kept, device=kept_BK.device) >= num_kept // 2
        return _anchors.in_turns(kept_BK, is_global_K.long().expand_as(kept_BK))


def _windows(grid: tuple[int, int], num_views: int, largest: int) -> Tensor:
    """Return (N,) the window of each token, numbered view by view in raster order."""
    rows, columns = grid
    down, across = -(-rows // largest), -(-columns // largest)
    row_windows_R = torch.arange(rows) * down // rows
    column_windows_C = torch.arange(columns) * across // columns
    view_windows_V11 = torch.arange(num_views)[:, None, None] * (down * across)
    return (view_windows_V11 + row_windows_R[:, None] * across + column_windows_C).flatten()


def _best_of_each(scores_BN: Tensor, windows_N: Tensor) -> Tensor:
    """Return (B, N) positions: the best of every window, then the second of every window, ...

    The n-th ones of all windows stand by falling score.
    """
    by_score_BN = _ops.best_first(scores_BN)
    # Sorted by window as well, a token's place in its window is its distance to the window's start.
    by_window_BN = windows_N[by_score_BN].argsort(dim=1, stable=True)
    counts_W = torch.bincount(windows_N)
    starts_N = (counts_W.cumsum(0) - counts_W)[windows_N.sort().values]
    nth_N = torch.arange(len(windows_N), device=windows_N.device) - starts_N
    nth_BN = torch.empty_like(by_score_BN).scatter_(1, by_window_BN, nth_N.expand_as(by_score_BN))
    return by_score_BN.gather(1, nth_BN.argsort(dim=1, stable=True))
