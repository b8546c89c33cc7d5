"""The best low-rank approximation of an image's error, with the same bits on every machine.

A truncated singular value decomposition by subspace iteration with a fixed start (Halko,
Martinsson, Tropp, "Finding structure with randomness", 2011). Both factors of every large product
are rounded to whole numbers so small that its sums are exact in float64, so neither the number of
threads nor the order a library adds in can change a bit.

K tokens; D features; P directions tried, the R best of them are kept.
"""

import torch
from torch import Tensor

from pipeline.codecs._rotation import signs

_ITERATIONS = 6
_EXTRA = 8  # directions tried beyond the rank
_WHOLE = 2.0**18  # sums of 2^16 products of two numbers up to this are exact in float64


def directions(error_KD: Tensor, rank: int) -> Tensor:
    """Return the directions that hold most of the error, all zeros where there are fewer.

    Args:
        error_KD: float32, K and D at most 65536.
        rank: R.

    Returns:
        (R, D) float64, orthonormal rows or zeros, on the CPU.
    """
    rows_KD = _whole(error_KD.cpu().double())
    width = rows_KD.shape[1]
    tried = min(rank + _EXTRA, *rows_KD.shape)
    basis_DP = torch.cat([signs(place, width) for place in range(tried)], dim=1).double()
    for _ in range(_ITERATIONS):
        left_KP = _orthonormal(rows_KD @ _whole(basis_DP))
        basis_DP = _orthonormal(rows_KD.T @ _whole(left_KP))
    # Turn the basis so that its first directions hold the most.
    best_DP = _mix(basis_DP, _principal(rows_KD @ _whole(basis_DP))[1])
    found_RD = torch.zeros((rank, width), dtype=torch.float64)
    found = min(rank, best_DP.shape[1])
    found_RD[:found] = best_DP[:, :found].T
    return found_RD


def _whole(values: Tensor) -> Tensor:
    """Return values as whole numbers up to 2^18, their largest at that."""
    largest = values.abs().amax()
    return (values * (_WHOLE / largest.clamp(min=1e-300))).round_()


def _orthonormal(columns_XP: Tensor) -> Tensor:
    """Return orthonormal columns that span the same; zeros where some depend on others."""
    # Twice: the first time leaves an error where columns are nearly parallel.
    for _ in range(2):
        strengths_P, turns_PP = _principal(columns_XP)
        kept_P = strengths_P > strengths_P[0].clamp(min=1e-300) * 1e-10
        scale_P = torch.where(kept_P, strengths_P, torch.inf).rsqrt()
        columns_XP = _mix(columns_XP, turns_PP * scale_P)
    return columns_XP


def _principal(columns_XP: Tensor) -> tuple[Tensor, Tensor]:
    """Return (P,) squared strengths, falling, and the (P, P) turns to the principal columns."""
    largest = columns_XP.abs().amax().clamp(min=1e-300)
    whole_XP = _whole(columns_XP)
    strengths_P, turns_PP = torch.linalg.eigh(whole_XP.T @ whole_XP)
    scale = (largest / _WHOLE) ** 2
    return strengths_P.flip(0) * scale, turns_PP.flip(1)


def _mix(columns_XP: Tensor, turns_PQ: Tensor) -> Tensor:
    """Return `columns @ turns`, added up in a fixed order."""
    mixed_XQ = columns_XP[:, :1] * turns_PQ[:1]
    for place in range(1, columns_XP.shape[1]):
        mixed_XQ += columns_XP[:, place : place + 1] * turns_PQ[place]
    return mixed_XQ
