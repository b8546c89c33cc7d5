"""Keep tokens as different from one another as can be: farthest points by cosine distance.

The first token is the one whose nearest other token is farthest; each next one is the farthest
from all kept so far.

Source: Alvar et al., DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models,
arXiv 2503.02175; as in github.com/Tencent/AngelSlim @ 67394ce (Apache-2.0), whose stored outputs
it equals, order of picking included.
Differs: the published code selects on projected tokens in their own precision; here on the stored
features, whatever their stage, in float32. The budget is one image's; the port above shares one
budget among all images of a request. Added: tokens within a distance of 1e-6 count as equal, and
ties go to the lower position. Question-free as published.
Needs: no signal.
Cost: O(N^2 D) for the distances, then O(N) per kept token.
"""

from dataclasses import dataclass

from torch import Tensor

from pipeline.carvers import _distance, _greedy
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class DivPrune(SelectionCarver):
    """Keep K farthest points; ranks follow the picks. All views of an image share the budget."""

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return positions in the order of picking."""
        distances_BNN = _distance.cosine_distances(tokens.features)
        return _greedy.farthest(distances_BNN, _distance.most_isolated(distances_BNN), num_kept)
