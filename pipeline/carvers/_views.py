"""Carving each view of an image, or frame of a clip, by itself with an equal share of the budget.

B images, V views, N tokens of an image, n of a view, K kept tokens, k of a view.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.carvers import _ops
from pipeline.types import VisualTokens


def select_in_each(
    tokens: VisualTokens, num_kept: int, select: Callable[[VisualTokens, int], Tensor]
) -> Tensor:
    """Select in every view as if it were an image; the views take turns.

    Where the selection in a view is nested, so is the whole. Turns start with the thumbnail of a
    tiled image and go on tile by tile; frames of a clip take them spread over the clip.

    Args:
        tokens: a part of a batch.
        num_kept: K, in [1, N]; views differ by at most one token.
        select: from B * V images of one view and k to (B * V, k) positions, best first.

    Returns:
        (B, K) positions, best first.
    """
    num_views = tokens.num_views
    if num_views == 1:
        return select(tokens, num_kept)
    picks_Xk = select(_apart(tokens), -(-num_kept // num_views))
    picks_BVk = picks_Xk.view(-1, num_views, picks_Xk.shape[1])
    turns = range(num_views) if tokens.tiles else _ops.coarse_to_fine(num_views, 1)
    order_V = torch.tensor(turns, device=picks_BVk.device)
    num_cells = tokens.features.shape[1] // num_views
    positions_BVk = picks_BVk[:, order_V] + (order_V * num_cells)[:, None]
    return positions_BVk.mT.flatten(1)[:, :num_kept]


def _apart(tokens: VisualTokens) -> VisualTokens:
    """Return the views as images of their own."""

    def fold(values_BNX: Tensor) -> Tensor:
        num_images, num_tokens, *rest = values_BNX.shape
        views, cells = num_images * tokens.num_views, num_tokens // tokens.num_views
        return values_BNX.reshape(views, cells, *rest)

    signals = {name: fold(signal) for name, signal in tokens.signals.items()}
    return VisualTokens(features=fold(tokens.features), grid=tokens.grid, signals=signals)
