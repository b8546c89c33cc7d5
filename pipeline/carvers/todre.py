"""Keep tokens that are least like those kept before, starting from one pivot token.

The pivot is the token that draws the most attention; each next token is the one whose cosines to
all kept tokens have the smallest sum.

Source: Li et al., ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance,
arXiv 2505.18757; no code; written from a description of the paper.
Differs: this is stage 1 of ToDRE; stage 2 drops all visual tokens in late decoder layers, by the
question, and cannot be cached. The original selects on projected tokens; here on the stored
features, whatever their stage. Its attention is that of the last layer of the tower; here that of
the layer that the encoder selects. Added: ties to the lower position; with the `k_center` rule
tokens within a distance of 1e-6 count as equal.
Needs: cls_attention or received_attention; nothing with a pivot in the centre.
Cost: O(N^2 D) for the cosines, then O(N) per kept token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.carvers import _distance, _greedy, _ops, _similarity
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class ToDRE(SelectionCarver):
    """Keep K diverse tokens; ranks follow the picks. All views of an image share the budget.

    Args:
        rule: `max_sum` is version 2 of the paper. `k_center`, of version 1, takes the token
            farthest from its nearest kept token instead; it keeps other tokens.
        pivot: the first token. `attention`: the one with the most, in the thumbnail of a tiled
            image, else in all views. `center`: the token in the middle of the grid (of the lower
            position, where two are), of the thumbnail or of the middle frame of a clip.
        attention: of the class token, or for towers without one the mean attention received.
    """

    rule: Literal["max_sum", "k_center"] = "max_sum"
    pivot: Literal["attention", "center"] = "attention"
    attention: Literal["cls_attention", "received_attention"] = "cls_attention"

    @property
    def needs(self) -> frozenset[str]:
        """The attention, if the pivot is chosen by it."""
        return frozenset({self.attention} if self.pivot == "attention" else ())

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return positions in the order of picking, the pivot first."""
        first_B = self._pivot(tokens)
        if self.rule == "k_center":
            distances_BNN = _distance.cosine_distances(tokens.features)
            return _greedy.farthest(distances_BNN, first_B, num_kept)
        return _least_like(_similarity.cosines(tokens.features), first_B, num_kept)

    def _pivot(self, tokens: VisualTokens) -> Tensor:
        rows, columns = tokens.grid
        if self.pivot == "center":
            view = 0 if tokens.tiles else (tokens.num_views - 1) // 2
            middle = (view * rows + (rows - 1) // 2) * columns + (columns - 1) // 2
            return torch.full(tokens.features.shape[:1], middle, device=tokens.features.device)
        attention_BN = _ops.signal(tokens, self.attention)
        if tokens.tiles:
            attention_BN = attention_BN[:, : rows * columns]
        return attention_BN.argmax(dim=1)


def _least_like(cosines_BNN: Tensor, first_B: Tensor, num_picks: int) -> Tensor:
    return _greedy.pick(
        num_picks,
        torch.zeros_like(cosines_BNN[:, 0]),
        torch.neg,
        lambda sums_BN, chosen_B: sums_BN + _similarity.row(cosines_BNN, chosen_B),
        first_B,
    )
