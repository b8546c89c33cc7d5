"""Keep tokens to which the projector is sensitive and which differ from one another.

A token's weight is how much the projector amplifies small changes of it, stretched to [0, 1]. The
heaviest token comes first; each next one has the largest product of weight and cosine distance to
the nearest kept token.

Source: ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in
Vision-Language Models, arXiv 2509.24837 (CVPR 2026); written from a description of the method.
Differs: the original estimates the sensitivity from 64 random directions and finite differences,
so its result depends on a seed. Here it is the root mean square over all directions in closed form
(`zoo-exact`) where the original takes the mean over 64, almost the same ranking; it is a signal of
the encoder, so the carver draws no random numbers and needs no projector. The original
compares projected tokens; this one the stored features, whatever their stage. It adds all newline
tokens of a tiled image on top of the budget; a cache holds none. Where all tokens of an image are
equally sensitive they weigh 1, not 0, and distance alone decides. Added: tokens within a distance
of 1e-6 count as equal; ties to the lower position. Question-free as published.
Needs: projector_sensitivity.
Cost: O(N^2 D) for the distances, then O(N) per kept token.
"""

from dataclasses import dataclass

from torch import Tensor

from pipeline.carvers import _distance, _greedy, _ops, _similarity, _views
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class ZooPrune(SelectionCarver):
    """Keep K sensitive and distant tokens; ranks follow the picks.

    Views of an image are selected from one by one, each with an equal share of the budget.
    """

    @property
    def needs(self) -> frozenset[str]:
        """The projector's sensitivity at each token."""
        return frozenset({"projector_sensitivity"})

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return positions in the order of picking, views taking turns."""
        return _views.select_in_each(tokens, num_kept, _pick)


def _pick(tokens: VisualTokens, num_kept: int) -> Tensor:
    weights_BN = _similarity.minmax(_ops.signal(tokens, "projector_sensitivity"))
    distances_BNN = _distance.cosine_distances(tokens.features)
    return _greedy.farthest(distances_BNN, weights_BN.argmax(dim=1), num_kept, weights_BN)
