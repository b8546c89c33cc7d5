"""Keep the objects an early layer looks at, with their neighbours, and fill up by a late layer.

The tokens of highest attention in an early layer are anchors; they stay with the tokens left,
right, above and below. The rest of the budget goes to the highest attention of the selected layer.

Source: Liu et al., HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in
Vision-Language Models, arXiv 2508.00553; as ported in github.com/Tencent/AngelSlim @ 67394ce,
Apache-2.0 by its headers.
Differs: never more than K tokens; where anchors and neighbours exceed K (the port then keeps all
of them), those of lowest early attention go, which may be anchors too. Ties go to the lower
position. In the port the early layer is 9 of CLIP ViT-L, 16 of Qwen2.5-VL; here it is the one the
encoder takes as shallow. Views of an image are pruned each by itself, with equal shares.
Needs: class (or received) attention of an early and of the selected layer.
Cost: O(N log N) per image.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _anchors, _ops, _views
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class HiPrune(SelectionCarver):
    """Keep anchors and their neighbours, then fill up; ranks take both parts in turns.

    Anchors and neighbours rank by the early attention, the others by that of the selected layer.

    Args:
        alpha: share of the budget for anchors and their neighbours, five tokens for each anchor;
            half to even. From 5 tokens on and with alpha > 0 there is one anchor at least.
        neighbours: `faithful` adds and subtracts 1 and the width of a row and clamps to the
            positions there are, so the token after the end of a row is the next row's first, and
            an anchor in the first or last row takes the first or last token in; `grid` takes the
            neighbours that lie on the grid.
        attention: of the selected layer.
    """

    nested: ClassVar[bool] = False  # how many anchors there are depends on the budget

    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    neighbours: Literal["faithful", "grid"] = "faithful"
    attention: Literal["cls_attention", "received_attention"] = "cls_attention"

    @property
    def needs(self) -> frozenset[str]:
        """Attention of an early and of the selected layer."""
        return frozenset([self.attention, "shallow_attention"])

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return tokens around anchors and others of high attention, in turns."""
        return _views.select_in_each(tokens, num_kept, self._select)

    def _select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        early_BN = _ops.best_first(_ops.signal(tokens, "shallow_attention"))
        late_BN = _ops.best_first(_ops.signal(tokens, self.attention))
        num_tokens = late_BN.shape[1]
        anchors_BA = early_BN[:, : self._num_anchors(num_kept, num_tokens)]
        around_BN = self._around(anchors_BA, tokens.grid)
        # Everything around an anchor stands before everything else.
        places_BN = torch.where(
            around_BN, _ops.inverse(early_BN), num_tokens + _ops.inverse(late_BN)
        )
        kept_BK = places_BN.argsort(dim=1)[:, :num_kept]
        return _anchors.in_turns(kept_BK, (~around_BN).gather(1, kept_BK).long())

    def _num_anchors(self, num_kept: int, num_tokens: int) -> int:
        at_least = 1 if num_kept >= 5 and self.alpha > 0 else 0
        return min(num_tokens, max(at_least, round(num_kept * self.alpha / 5)))

    def _around(self, anchors_BA: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return (B, N) True at the anchors and their neighbours."""
        rows, columns = grid
        cells_N1 = torch.arange(rows * columns, device=anchors_BA.device)[:, None]
        steps_5 = torch.tensor([0, -1, 1, -columns, columns], device=anchors_BA.device)
        stepped_N5 = cells_N1 + steps_5
        beside_N5 = stepped_N5.clamp(0, rows * columns - 1)
        if self.neighbours == "grid":
            # A step to another row and column went over the end of its row.
            straight_N5 = stepped_N5 // columns == cells_N1 // columns
            straight_N5 |= stepped_N5 % columns == cells_N1 % columns
            exists_N5 = straight_N5 & (stepped_N5 == beside_N5)
            beside_N5 = torch.where(exists_N5, beside_N5, cells_N1)
        return _anchors.positions_mask(beside_N5[anchors_BA].flatten(1), rows * columns)
