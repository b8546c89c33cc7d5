"""Average runs of s tokens that follow one another in raster order: one-dimensional pooling.

Source: Chen et al., Efficient Large Multi-modal Models via Visual Context Compression (LLaVolta),
arXiv 2406.20092; github.com/Beckschen/LLaVolta @ 31ec151, Apache-2.0.
Differs: this is the variant that pools right after the projector (K = -1 there); pooling at a
later decoder layer saves no storage, and the schedule of strides over training is the trainer's
matter. As there, the last N mod s tokens are dropped, and a run goes on over the end of a row (and
here of a view) where s does not divide it; `average_pool` does neither. The published stride is 8:
72 tokens of 576. Added: the stride from a budget, any N, positions, sizes. A stride above N counts
as N.
Needs: no signal.
Cost: O(N D) per image.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from pipeline.carvers import _merge, _ops
from pipeline.carvers._base import BudgetCarver
from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Llavolta(BudgetCarver):
    """Replace each run by its mean, placed at its middle token (the lower of two).

    Ranks run coarse to fine over the sequence of runs.

    Args:
        stride: tokens per run, instead of a budget. A budget of K takes the smallest stride that
            gives at most K whole runs, so 128 of 576 tokens become 115 runs of 5.

    Raises:
        ValueError: a stride and a budget are both given, or one is out of range.
    """

    nested: ClassVar[bool] = False  # another budget has other runs

    stride: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        """Check that one of stride and budget is given; without both, set the default budget."""
        if self.stride is None:
            super().__post_init__()
            return
        if self.keep_tokens is not None or self.keep_ratio is not None:
            raise ValueError(
                f"stride={self.stride} is given beside keep_tokens={self.keep_tokens} and "
                f"keep_ratio={self.keep_ratio}; give exactly one of the three"
            )
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        num_images, num_tokens, _ = tokens.features.shape
        stride = self._stride(num_tokens)
        num_runs = num_tokens // stride
        owners_N = torch.arange(num_runs * stride, device=tokens.features.device) // stride
        means_BKD, sizes_BK, positions_BK = _merge.group_means(
            tokens.features[:, : len(owners_N)], owners_N.expand(num_images, -1), num_runs
        )
        order_BK = _ops.spread_order((1, num_runs), means_BKD)
        return _ops.collect(
            means_BKD, order_BK, positions_BK.gather(1, order_BK), sizes_BK.gather(1, order_BK)
        )

    def _stride(self, num_tokens: int) -> int:
        if self.stride is not None:
            return min(self.stride, num_tokens)
        # num_tokens // stride <= K exactly where num_tokens / stride < K + 1.
        return num_tokens // (self.budget(num_tokens) + 1) + 1
