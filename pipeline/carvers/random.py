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
from torch import Tensor

from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Random(SelectionCarver):
    """Keep the first K tokens of one permutation of the N positions.

    Args:
        seed: chooses the permutation, in [0, 2**32).
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return the same positions for every image; ranks follow the permutation."""
        num_images, num_tokens, _ = tokens.features.shape
        # RandomState's stream is frozen by numpy (NEP 19); torch.randperm promises no such thing.
        order_N = torch.from_numpy(np.random.RandomState(self.seed).permutation(num_tokens))
        order_K = order_N[:num_kept].to(tokens.features.device, torch.int64)
        return order_K.expand(num_images, -1)
