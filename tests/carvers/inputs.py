"""Seeded visual tokens for the tests of carvers."""

from collections.abc import Collection

import torch
from torch import Tensor

from pipeline.types import SIGNALS, VisualTokens


def make_signals(
    names: Collection[str], batch: int, num_tokens: int, seed: int
) -> dict[str, Tensor]:
    """Return random float32 signals of the shapes that `types.SIGNALS` states."""
    generator = torch.Generator().manual_seed(seed)
    signals = {}
    for name in sorted(names):
        if SIGNALS[name].startswith("(B, N, D')"):
            signals[name] = torch.randn(batch, num_tokens, 7, generator=generator)
        elif SIGNALS[name].startswith("(B, N, L, 3)"):
            signals[name] = torch.rand(batch, num_tokens, 4, 3, generator=generator)
        else:
            signals[name] = torch.rand(batch, num_tokens, generator=generator)
    return signals


def make_tokens(
    needs: Collection[str],
    *,
    batch: int = 3,
    grid: tuple[int, int] = (5, 7),
    width: int = 40,
    seed: int = 0,
    num_views: int = 1,
) -> VisualTokens:
    """Return random float32 tokens with the signals named in `needs` and no others."""
    num_tokens = num_views * grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, num_tokens, width, generator=generator)
    return VisualTokens(
        features=features,
        grid=grid,
        signals=make_signals(needs, batch, num_tokens, seed + 1),
        num_views=num_views,
    )
