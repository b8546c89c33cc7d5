"""Merging tokens into groups: what becomes of a group, and where it stands.

B images, N tokens, M rows, G groups, D feature width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.carvers import _ops


def median_positions(owners_BN: Tensor, num_groups: int) -> Tensor:
    """Return (B, G) the lower median of the positions in each group; any for an empty one."""
    # Stable, so the positions of a group stand in rising order.
    positions_BN = owners_BN.argsort(dim=1, stable=True)
    sizes_BG = torch.zeros(
        (len(owners_BN), num_groups), dtype=torch.int64, device=owners_BN.device
    ).scatter_add_(1, owners_BN, torch.ones_like(owners_BN))
    starts_BG = sizes_BG.cumsum(dim=1) - sizes_BG
    return positions_BN.gather(1, (starts_BG + (sizes_BG - 1) // 2).clamp_min(0))


def group_means(
    features_BND: Tensor, owners_BN: Tensor, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (B, G, D) plain means, (B, G) sizes and (B, G) lower median positions of groups."""
    means_BGD, sizes_BG = _ops.group_mean(features_BND, owners_BN, num_groups)
    return means_BGD, sizes_BG, median_positions(owners_BN, num_groups)


def put(values_BX: Tensor, places_Bk: Tensor, given_Bk: Tensor, is_given_Bk: Tensor) -> Tensor:
    """Return values with those given at their places."""
    # What is not given goes into a column that is cut off.
    padded_BX = functional.pad(values_BX, (0, 1))
    places_Bk = places_Bk.where(is_given_Bk, values_BX.shape[1])
    return padded_BX.scatter(1, places_Bk, given_Bk)[:, :-1]
