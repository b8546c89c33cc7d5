"""Distances between the tokens of an image, for rules that keep tokens far from one another.

B images, N tokens, D feature width.
"""

import torch
from torch import Tensor

from pipeline.carvers import _similarity
from pipeline.types import VisualTokens

SAME = 1e-6
"""Cosine distance up to which tokens count as equal; float32 products are this exact."""


def cosine_distances(features_BND: Tensor) -> Tensor:
    """Return (B, N, N) float32 one minus cosine, in [0, 2]; a token is infinitely far from itself.

    Tokens within `SAME` are at distance 0, so that duplicates tie. A zero token is at distance 1
    from every other.
    """
    distances_BNN = 1 - _similarity.cosines(features_BND)
    distances_BNN.masked_fill_(distances_BNN <= SAME, 0)
    distances_BNN.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return distances_BNN


def most_isolated(distances_BNN: Tensor) -> Tensor:
    """Return (B,) the token whose nearest other token is farthest; ties to the lower position.

    Args:
        distances_BNN: of all pairs, with a diagonal of infinities.
    """
    return distances_BNN.amin(dim=2).argmax(dim=1)


def grid_squares(tokens: VisualTokens) -> Tensor:
    """Return (N, N) float32 of the grid's cells; infinite between cells of different views."""
    rows, columns = tokens.grid
    cells_n2 = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    squares_nn = (cells_n2[:, None] - cells_n2[None]).square().sum(dim=2)
    views_V = torch.arange(tokens.num_views).repeat_interleave(len(cells_n2))
    squares_NN = squares_nn.repeat(tokens.num_views, tokens.num_views)
    return squares_NN.masked_fill(views_V[:, None] != views_V, torch.inf)
