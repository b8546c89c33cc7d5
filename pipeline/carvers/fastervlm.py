"""Keep the K tokens that the class token attends to most: ranking by attention and nothing else.

Source: Zhang et al., [CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make
VLM Inference Faster, arXiv 2412.01818v1; github.com/Theia-4869/FasterVLM.
Differs: ties go to the lower position. `received_attention` is for towers without a class token;
the original names none. Its tokens stand in raster order, as here; ranks add the order of scores.
Needs: one attention of the vision tower.
Cost: one sort of N numbers per image.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pipeline.carvers import _ops
from pipeline.carvers._base import ScoreCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FasterVLM(ScoreCarver):
    """Score a token by the attention that it draws.

    Args:
        attention: whose attention; of all visual tokens for towers without a class token.
    """

    attention: Literal["cls_attention", "received_attention"] = "cls_attention"

    @property
    def needs(self) -> frozenset[str]:
        """The attention."""
        return frozenset({self.attention})

    def score(self, tokens: VisualTokens) -> Tensor:
        """Return the attention itself."""
        return _ops.signal(tokens, self.attention)
