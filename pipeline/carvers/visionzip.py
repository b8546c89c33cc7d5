"""Keep the tokens of high attention, and merge all others into evenly spaced ones by their keys.

The dominant tokens stay as they are. Of the rest, in raster order, every s-th is a target; each
other token joins the target whose key is most like its own. So no token is lost.

Source: Yang et al., VisionZip: Longer is Better but Not Necessary in Vision Language Models, arXiv
2412.04467; github.com/dvlab-research/VisionZip @ 3151f6d, Apache-2.0. `version="port"`:
github.com/Tencent/AngelSlim @ 67394ce, Apache-2.0 by its headers.
Differs: the original keeps the class token as one of the dominant ones; the cache holds visual
tokens only, so here one more of those stays. It states both counts (54 + 10, 108 + 20, 162 + 30);
here they follow from the budget by the share of the contextual ones, as in the port, with the same
result. Added: sizes, ties towards the lower position, zero keys (similar to nothing). The features
of all views of an image, or of a clip, are merged as one sequence.
Needs: the class token's attention, or the received one, and the keys averaged over heads.
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
class VisionZip(BudgetCarver):
    """Split the budget between dominant and contextual tokens; ranks take both in turns.

    A contextual token stands where its target stood. Both parts rank by falling attention.

    Args:
        version: `original` adds the mean of those that joined to the target, so that a contextual
            token is up to twice as long as others; `port` takes the mean of all of them.
        contextual_share: share of the budget for contextual tokens, half to even, at least one.
        attention: which attention makes a token dominant.
    """

    nested: ClassVar[bool] = False  # targets and those that join them depend on the budget

    conserves: ClassVar[bool] = True

    averages: ClassVar[bool] = False  # the original adds two means

    version: Literal["original", "port"] = "original"
    contextual_share: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 10 / 64
    attention: Literal["cls_attention", "received_attention"] = "cls_attention"

    @property
    def needs(self) -> frozenset[str]:
        """The attention and the keys."""
        return frozenset([self.attention, "mean_keys"])

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        num_kept = self.budget(tokens.features.shape[1])
        num_targets = max(1, round(num_kept * self.contextual_share))
        by_attention_BN = _ops.best_first(_ops.signal(tokens, self.attention))
        dominant_BM = by_attention_BN[:, : num_kept - num_targets]
        targets_BT = _targets(dominant_BM, by_attention_BN.shape[1], num_targets)

        owners_BN = _anchors.nearest(_ops.signal(tokens, "mean_keys"), targets_BT)
        dominant_K = torch.arange(num_targets, num_kept, device=owners_BN.device)
        owners_BN = owners_BN.scatter(1, dominant_BM, dominant_K.expand_as(dominant_BM))
        merged_BKD, sizes_BK = self._merge(tokens.features, owners_BN, targets_BT, num_kept)

        kept_BK = torch.cat([targets_BT, dominant_BM], dim=1)
        order_BK = _ops.inverse(by_attention_BN).gather(1, kept_BK).argsort(dim=1)
        order_BK = _anchors.in_turns(order_BK, (order_BK < num_targets).long())
        return _ops.collect(
            merged_BKD, order_BK, kept_BK.gather(1, order_BK), sizes_BK.gather(1, order_BK)
        )

    def _merge(
        self, features_BND: Tensor, owners_BN: Tensor, targets_BT: Tensor, num_kept: int
    ) -> tuple[Tensor, Tensor]:
        """Return (B, K, D) features of the groups, of which targets come first, and their sizes."""
        if self.version == "port":
            return _ops.group_mean(features_BND, owners_BN, num_kept)
        # Without the targets' own features, a mean over `size` tokens is one over `size - 1`.
        is_target_BN1 = _anchors.positions_mask(targets_BT, owners_BN.shape[1])[:, :, None]
        joined_BND = features_BND.float().masked_fill(is_target_BN1, 0)
        groups_BKD, sizes_BK = _ops.group_mean(joined_BND, owners_BN, num_kept)
        num_targets = targets_BT.shape[1]
        sizes_BT1 = sizes_BK[:, :num_targets, None]
        groups_BKD[:, :num_targets] *= sizes_BT1 / (sizes_BT1 - 1).clamp_min(1)
        groups_BKD[:, :num_targets] += _ops.take_rows(features_BND, targets_BT)
        return groups_BKD.to(features_BND.dtype), sizes_BK


def _targets(dominant_BM: Tensor, num_tokens: int, num_targets: int) -> Tensor:
    """Return (B, T) evenly spaced ones of the tokens that are not dominant, in raster order."""
    rest_BR = _anchors.others(dominant_BM, num_tokens)
    step = rest_BR.shape[1] // num_targets
    return rest_BR[:, : step * num_targets : step]
