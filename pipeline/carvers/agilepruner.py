"""Keep attended tokens, each unlike the ones before it: how unlike depends on the image's variety.

Tokens are gone through by falling attention. One that is still there stays and deletes all that are
nearer to it than a threshold, which grows with its rank and with the effective rank of the image:
simple images keep what is attended, varied ones what differs.

Source: Baek et al., AgilePruner: An Empirical Study of Attention and Diversity for Adaptive Visual
Token Pruning in Large Vision-Language Models, arXiv 2603.01236; github.com/cvsp-lab/AgilePruner
holds no code; constants from public copies of the rule.
Differs: the copies take the effective rank from the first image of a batch, here each image has
its own. It is computed in float64, singular values at rounding level count as 0, and equal tokens
have rank 1. `r_avg` belongs to one model and corpus (90 is LLaVA-1.5's, features after the
projector): for others, and for towers without a class token (`received_attention`), use
`calibrated`. Deleted tokens come back by rank where too few are left, so any K is met exactly.
Needs: one attention of the vision tower.
Cost: N^2 D, and N^3 in float64 for the singular values (on a CPU one core per image); the sweep is
some passes over N^2, up to N / 2 where each token would delete the next.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field
from torch import Tensor

from pipeline.carvers import _ops, _similarity, _suppression
from pipeline.carvers._base import SelectionCarver
from pipeline.carvers._rank import effective_rank, sample_ranks
from pipeline.errors import ConfigError
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class AgilePruner(SelectionCarver):
    """Sweep by attention with a threshold of rank / 100 * effective rank / r_avg.

    What stays, and in which order the rest comes back, does not depend on K: nested.

    Args:
        attention: what orders the tokens.
        r_avg: the mean effective rank of the corpus's images.
        tau_max: the largest threshold, a cosine distance in (0, 2].
    """

    attention: Literal["cls_attention", "received_attention"] = "cls_attention"
    r_avg: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 90.0
    tau_max: Annotated[float, Field(gt=0, le=2)] = 0.25

    @property
    def needs(self) -> frozenset[str]:
        """The attention."""
        return frozenset({self.attention})

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return the survivors of the sweep by attention, then the deleted tokens likewise."""
        order_BN = _ops.best_first(_ops.signal(tokens, self.attention))
        # Ranks count from 1, in the full order: deleted tokens count too.
        ranks_BN = _ops.inverse(order_BN) + 1
        varieties_B1 = effective_rank(tokens.features)[:, None] / self.r_avg
        thresholds_BN = (ranks_BN * varieties_B1 * 0.01).clamp_max(self.tau_max)
        distances_BNN = 1 - _similarity.cosines(tokens.features)
        stays_BN = _suppression.survivors(distances_BNN < thresholds_BN[:, :, None], order_BN)
        survivors_first_BN = _ops.best_first(stays_BN.gather(1, order_BN).float())
        return order_BN.gather(1, survivors_first_BN)[:, :num_kept]

    def calibrated(self, sample: Iterable[VisualTokens]) -> Self:
        """Return this carver with `r_avg` set to the mean effective rank of the sample.

        Raises:
            ConfigError: the sample is empty.
            NonFiniteError: features hold NaN or infinity.
        """
        ranks = [rank for _, rank in sample_ranks(sample)]
        if not ranks:
            raise ConfigError("r_avg cannot be set from a sample without images")
        return dataclasses.replace(self, r_avg=sum(ranks) / len(ranks))
