"""Keep K tokens drawn at random: a baseline that many published methods do not beat.

Source: none; random pruning, see UniPruneBench (github.com/TianfanPeng/VLMUniPruneBench).
Differs: the draw depends on the seed and N alone, so every image of a size keeps the same
positions; a draw per image would need its key, which a carver does not see.
Needs: no signal.
Cost: O(N) once per batch.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from pipeline.carvers import _ops
from pipeline.carvers._base import BudgetCarver
from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Random(BudgetCarver):
    """Keep the first K tokens of one permutation of the N positions.

    Args:
        seed: chooses the permutation, in [0, 2**32).
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        """Return the same positions for every image; ranks follow the permutation."""
        num_images, num_tokens, _ = tokens.features.shape
        # RandomState's stream is frozen by numpy (NEP 19); torch.randperm promises no such thing.
        order_N = torch.from_numpy(np.random.RandomState(self.seed).permutation(num_tokens))
        order_K = order_N[: self.budget(num_tokens)].to(tokens.features.device, torch.int64)
        return _ops.keep(tokens.features, order_K.expand(num_images, -1))
