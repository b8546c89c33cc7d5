"""How much of the information of all tokens the kept ones hold, by two measures of linear algebra.

Effective rank: exp of the entropy of the normalised singular values of the centred tokens (Roy and
Vetterli, EUSIPCO 2007), as the carvers compute it. An image of few directions has a low one.

Spectrum share: X holds all N tokens as rows, Y the kept ones, P projects onto the span of Y's rows.
The share is |X P|^2 / |X|^2 (Frobenius): of the trace of the Gram matrix X X^T, the sum of X's
squared singular values, what lies in the directions that the kept tokens span. 1 where every token
is a combination of kept ones. Tokens are not centred: TokenCarve (arXiv 2503.10501) argues from the
singular values of the tokens as they are; the share is defined here.

Both are taken before the codec: its rounding noise would count as directions.

B images, N tokens, K kept, D width, M = min(K, D).
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.carvers._image_pool import in_float64
from pipeline.carvers._rank import effective_rank

_EPSILON = float(torch.finfo(torch.float64).eps)


def effective_ranks(kept: Sequence[Tensor]) -> list[float]:
    """Return the effective rank of the tokens of each image.

    Args:
        kept: (K, D) of each image, K may differ; finite, any float dtype.

    Returns:
        One value an image, in [1, min(K - 1, D)], 1 for a single token.
    """
    ranks = [0.0] * len(kept)
    for indices in _by_length(kept):
        stacked_BKD = torch.stack([kept[i] for i in indices])
        for index, rank in zip(indices, effective_rank(stacked_BKD).tolist(), strict=True):
            ranks[index] = rank
    return ranks


def spectrum_shares(full: Sequence[Tensor], kept: Sequence[Tensor]) -> list[float]:
    """Return the share of each image's Gram spectrum that lies in the span of the kept tokens.

    Directions whose eigenvalue in the Gram matrix of the kept tokens is below M * 2.2e-16 of the
    largest count as none. Computed in float64.

    Args:
        full: (N, D) of each image; finite, any float dtype.
        kept: (K, D) of each image, K may differ; on the same device.

    Returns:
        One value an image, in [0, 1]; 1 where all tokens are 0.
    """
    shares = [0.0] * len(kept)
    for indices in _by_length(kept):
        # Joined, so that one batch carries both: the kept tokens first.
        joined_BTD = torch.stack([torch.cat([kept[i], full[i].to(kept[i])]) for i in indices])
        num_kept = len(kept[indices[0]])
        shares_of = functools.partial(_shares, num_kept=num_kept)
        found = in_float64(shares_of, joined_BTD, values_per_image=2 * joined_BTD[0].numel())
        for index, share in zip(indices, found.tolist(), strict=True):
            shares[index] = share
    return shares


def _shares(rows_BTD: Tensor, num_kept: int) -> Tensor:
    kept_BKD, full_BND = rows_BTD[:, :num_kept], rows_BTD[:, num_kept:]
    total_B = full_BND.square().sum(dim=(1, 2))
    if num_kept <= kept_BKD.shape[2]:
        squares_BM, left_BKM = torch.linalg.eigh(kept_BKD @ kept_BKD.mT)
        # The right vectors are Y^T U / S: their products with X are those of X Y^T with U, / S.
        products_BNM = full_BND @ kept_BKD.mT @ left_BKM
        held_BM = products_BNM.square().sum(dim=1) / torch.where(squares_BM > 0, squares_BM, 1)
    else:
        squares_BM, right_BDM = torch.linalg.eigh(kept_BKD.mT @ kept_BKD)
        held_BM = (full_BND @ right_BDM).square().sum(dim=1)
    floor_B1 = squares_BM[:, -1:].clamp_min(0) * (squares_BM.shape[1] * _EPSILON)
    held_B = torch.where(squares_BM > floor_B1, held_BM, 0).sum(dim=1)
    return torch.where(
        total_B > 0, held_B / total_B.clamp_min(torch.finfo(torch.float64).tiny), 1
    ).clamp(0, 1)


def _by_length(images: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(len(image), []).append(index)
    return list(groups.values())
