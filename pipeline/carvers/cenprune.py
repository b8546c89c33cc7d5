"""Keep tokens that are distinct from the rest and, seen from their mean, from one another.

A token's weight is its distinctiveness: minus its mean cosine to the other tokens. Distances
between tokens are taken after the image's mean token is removed, which all tokens share. One of
three known rules then picks tokens by weight and distance.

Source: Cen-Prune (2026), no arXiv id and no code known; written from a description of the paper.
Differs: the original works on projected tokens (LLaVA), or on what the merger of Qwen2.5-VL is
fed; here on the stored features, whatever their stage. Not given in the paper: the constant that
is added to standard deviations (1e-6 here); the deviation is that of the population. `minmax`
needs no such constant; tokens that are equally distinct weigh 1. The first token of `zoo_prune` is
the heaviest, its own start with the new weight. `dpp` is question-free by a relevance of 1 for
every token, for which no number is published. Added: tokens within a distance of 1e-6 count as
equal, ties to the lower position.
Needs: no signal; `rule="zoo_prune"` needs projector_sensitivity.
Cost: O(N^2 D) for the distances, then O(N) per kept token, O(N K) with `dpp`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.carvers import _distance, _greedy, _ops, _similarity, _views
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens

_EPSILON = 1e-6  # added to deviations; the paper does not say


@dataclass(frozen=True, kw_only=True)
class CenPrune(SelectionCarver):
    """Keep K tokens by distinctiveness and centred distance; ranks follow the picks.

    Views of an image are selected from one by one, each with an equal share of the budget.

    Args:
        rule: `divprune` starts with the token whose nearest other token is farthest (no weight),
            then takes the largest weight times distance to the nearest kept token. `zoo_prune`
            multiplies the weight by the projector's sensitivity and starts with the heaviest.
            `dpp` takes the token that most raises the determinant of the kept tokens' weighted
            centred cosines.
        weighting: how distinctiveness becomes a weight: stretched to [0, 1] (the paper's form for
            LLaVA), or the sigmoid of its standard score (for Qwen2.5-VL), which suffers less from
            single outliers.
        standardise: divide each feature dimension by its standard deviation in the image first
            (the paper's form for Qwen2.5-VL); for features of which a few dimensions hold most of
            the variance.
    """

    rule: Literal["divprune", "zoo_prune", "dpp"] = "divprune"
    weighting: Literal["minmax", "sigmoid"] = "minmax"
    standardise: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """The projector's sensitivity where the rule weighs by it."""
        return frozenset({"projector_sensitivity"} if self.rule == "zoo_prune" else ())

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return positions in the order of picking, views taking turns."""
        return _views.select_in_each(tokens, num_kept, self._pick)

    def _pick(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        rows_BND = tokens.features.float()
        if self.standardise:
            variances_B1D = rows_BND.var(dim=1, correction=0, keepdim=True)
            rows_BND = rows_BND / (variances_B1D + _EPSILON).sqrt()
        weights_BN = self._weights(rows_BND)
        centred_BND = _similarity.centred(rows_BND)
        if self.rule == "dpp":
            kernel_BNN = _similarity.cosines(centred_BND)
            kernel_BNN *= weights_BN[:, :, None]
            kernel_BNN *= weights_BN[:, None, :]
            return _greedy.log_determinant(kernel_BNN, num_kept)
        distances_BNN = _distance.cosine_distances(centred_BND)
        if self.rule == "zoo_prune":
            weights_BN = weights_BN * _similarity.minmax(
                _ops.signal(tokens, "projector_sensitivity")
            )
            first_B = weights_BN.argmax(dim=1)
        else:
            first_B = _distance.most_isolated(distances_BNN)
        return _greedy.farthest(distances_BNN, first_B, num_kept, weights_BN)

    def _weights(self, rows_BND: Tensor) -> Tensor:
        distinct_BN = _distinctiveness(rows_BND)
        if self.weighting == "minmax":
            return _similarity.minmax(distinct_BN)
        mean_B1 = distinct_BN.mean(dim=1, keepdim=True)
        deviation_B1 = distinct_BN.std(dim=1, correction=0, keepdim=True)
        # By way of float64: float32 sigmoids differ with their place in memory, in the last bit.
        return torch.sigmoid(((distinct_BN - mean_B1) / (deviation_B1 + _EPSILON)).double()).float()


def _distinctiveness(rows_BND: Tensor) -> Tensor:
    """Return (B, N) minus the mean cosine of each token to the others, by way of their mean."""
    num_tokens = rows_BND.shape[1]
    unit_BND = _similarity.unit(rows_BND)
    shared_BN = (unit_BND * unit_BND.mean(dim=1, keepdim=True)).sum(dim=2)
    return (1 - num_tokens * shared_BN) / max(1, num_tokens - 1)
