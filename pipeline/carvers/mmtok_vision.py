"""Keep tokens that cover the image: greedy facility location under a softmax of similarities.

Each token spreads one unit of attention over all tokens by a softmax of their cosines; the next
pick is the token that most raises how much every token finds of its own in the kept ones.

Source: Dong et al., MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs, arXiv
2508.18264; github.com/Ironieser/MMTok @ d1522cd, Apache-2.0; on features before the projector.
Differs: only the vision objective. The original adds the question's coverage with a weight, which
without a question changes nothing. Tokens that see nothing but padding compete as the others do.
Similarities are float32, sums exact, ties go to the lower position.
Needs: no signal.
Cost: N^2 D for the similarities, then K steps over the tokens newly covered, some 20 of 576.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from pipeline.carvers import _greedy, _similarity
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class MmtokVision(SelectionCarver):
    """Pick tokens greedily by their gain in softmax coverage.

    Args:
        temperature: of the softmax over cosines, at least 0.001; lower counts only the most
            similar tokens as covered.
    """

    temperature: Annotated[float, Field(ge=0.001, allow_inf_nan=False)] = 0.2

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return the picks in order."""
        cosines_BNN = _similarity.cosines(tokens.features)
        # Rows are to be covered. The original divides by N, which changes no pick.
        return _greedy.coverage(cosines_BNN.div_(self.temperature).softmax(dim=2), num_kept)
