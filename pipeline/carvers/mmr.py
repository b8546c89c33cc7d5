"""Keep important tokens unlike those already kept: maximal marginal relevance.

The most important token comes first; each next one has the largest importance, times a weight,
less its similarity to the nearest kept token, times the rest of the weight.

Source: Carbonell and Goldstein (SIGIR 1998), as IDPruner (arXiv 2602.13315) uses it for visual
tokens; github.com/Tencent/AngelSlim @ 67394ce, Apache-2.0 with third-party exceptions.
Differs: IDPruner's importance comes from a scorer trained for one model, which `scorer` loads; its
authors' file must be saved as safetensors first. Without one, importance is attention: training-
free, and not published. Tokens of several images share one budget there; here each image has its
own. Features are those stored; IDPruner's are projected.
Needs: one attention of the vision tower; with a scorer, no signal.
Cost: N^2 D for the similarities, then K N.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.carvers import _greedy, _ops, _scorer, _similarity
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens

_SPAN = 1e-6  # added to the range of the scores, as published


@dataclass(frozen=True, kw_only=True)
class Mmr(SelectionCarver):
    """Pick tokens greedily by importance less similarity to the picks.

    Args:
        attention: the importance, stretched to [0, 1] per image.
        scorer: safetensors file of a trained scorer that takes the place of the attention:
            `q_proj.weight` and `k_proj.weight`, (H, D), and optionally their biases. Relative to
            the working directory; its content, not its place, enters the fingerprint.
        importance_weight: in [0, 1]; 1 ranks by importance alone, 0 by dissimilarity alone.
        picks_per_round: tokens picked before similarities to them count, at least 1.
    """

    attention: Literal["cls_attention", "received_attention"] = "cls_attention"
    scorer: str | None = None
    importance_weight: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    picks_per_round: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        """Make the scorer's place absolute: an actor may have another working directory."""
        super().__post_init__()
        if self.scorer is not None:
            object.__setattr__(self, "scorer", os.path.abspath(self.scorer))

    @property
    def needs(self) -> frozenset[str]:
        """The attention, unless a scorer takes its place."""
        return frozenset({self.attention} if self.scorer is None else ())

    def describe(self) -> Mapping[str, Any]:
        """Return the options, with the sha256 of the scorer's file in its place."""
        options = super().describe()
        if self.scorer is None:
            return options
        return {**options, "scorer": f"sha256:{_scorer.digest(self.scorer)}"}

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return the picks in order.

        Raises:
            ConfigError: the scorer cannot be read, or is for features of another width.
        """
        scores_BN = (
            _ops.signal(tokens, self.attention)
            if self.scorer is None
            else _scorer.scores(tokens.features, self.scorer)
        )
        lowest_B1 = scores_BN.amin(dim=1, keepdim=True)
        span_B1 = scores_BN.amax(dim=1, keepdim=True) - lowest_B1
        importance_BN = (scores_BN - lowest_B1) / (span_B1 + _SPAN)
        return self._pick(importance_BN, _similarity.cosines(tokens.features), num_kept)

    def _pick(self, importance_BN: Tensor, cosines_BNN: Tensor, num_kept: int) -> Tensor:
        nearest_BN = torch.full_like(importance_BN, -2)  # below any cosine
        num_picked = 0

        def score(known_BN: Tensor) -> Tensor:
            return self.importance_weight * importance_BN - (1 - self.importance_weight) * known_BN

        def update(known_BN: Tensor, chosen_B: Tensor) -> Tensor:
            nonlocal nearest_BN, num_picked
            nearest_BN = torch.maximum(nearest_BN, _similarity.row(cosines_BNN, chosen_B))
            # The first token is a round of its own.
            done = num_picked % self.picks_per_round == 0
            num_picked += 1
            return nearest_BN if done else known_BN

        return _greedy.pick(num_kept, nearest_BN, score, update, importance_BN.argmax(dim=1))
