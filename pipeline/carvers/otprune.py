"""Keep tokens whose spread matches that of all tokens, by a determinant.

With G the products of tokens whose feature dimensions were each scaled to length 1 over the image,
tokens are picked one by one, each the one that most raises the determinant of the kept rows and
columns of I + 0.01 G G^T.

Source: OTPrune: Distribution-Aligned Visual Token Pruning via Optimal Transport, arXiv 2602.20205
(CVPR 2026), Apache-2.0 @ 3414730; written from a description of that code.
Differs: the original works on projected tokens; here on the stored features, whatever their stage.
Added: a dimension that is 0 in all tokens counts as 0, ties to the lower position. Question-free:
the code takes the text and does not use it.
Needs: no signal.
Cost: O(N^2 D + N^3) for the kernel, then O(N K) per kept token.
"""

from dataclasses import dataclass

from torch import Tensor

from pipeline.carvers import _greedy, _similarity
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens

_SCALE = 0.01  # of G G^T beside the identity


@dataclass(frozen=True, kw_only=True)
class OTPrune(SelectionCarver):
    """Keep K tokens by greedy log-determinant; ranks follow the picks.

    All views of an image share the budget.
    """

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return positions in the order of picking."""
        scaled_BND = _similarity.unit(tokens.features.mT).mT
        kernel_BNN = _similarity.gram(_similarity.gram(scaled_BND)).mul_(_SCALE)
        kernel_BNN.diagonal(dim1=1, dim2=2).add_(1)
        return _greedy.log_determinant(kernel_BNN, num_kept)
