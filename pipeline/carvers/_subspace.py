"""TokenCarve's information score from the leading singular directions and an estimate of the rest.

For GPUs, where a full eigen-decomposition may run image by image: here are batched matrix products
and a few decompositions of r x r matrices. `benchmarks/information_solvers.md` measures how near
the score, the ranking and the kept set come to the exact ones.

Source: block subspace iteration from a random start, after Halko, Martinsson and Tropp, Finding
Structure with Randomness (arXiv 0909.4061), with the whitening of Stathopoulos and Wu, A Block
Orthogonalization Procedure with Constant Synchronization Requirements (SIAM J. Sci. Comput. 2002).
The estimate of the rest is derived here, see `_spread`.

B images, N tokens, D width, M = min(N, D), r directions.
"""

import functools
import math

import torch
from torch import Tensor

from pipeline.carvers._image_pool import in_float64, product

_STEPS = 2  # of the iteration; a third finds less than 1 % more of the tokens kept by exact scores
_NOISE = 1e-13  # of the largest; what is smaller in a float64 Gram matrix may be rounding
_TINY = float(torch.finfo(torch.float64).tiny)


def contributions_from_subspace(matrix_BND: Tensor, rank: int) -> Tensor:
    """Estimate each token's information contribution score, sum over j of |U_ij S_j|.

    Reads and moves no global random state. An image does not depend on its batch-mates.

    Args:
        matrix_BND: (B, N, D) finite values, any float dtype; U S V^T is its SVD, image by image.
        rank: r, directions that are computed, in [1, min(N, D)); the others are estimated.

    Returns:
        (B, N) float32, >= 0. Computed in float64, so that equal tokens stay equal.
    """
    _, num_tokens, width = matrix_BND.shape
    small = min(num_tokens, width)
    values = num_tokens * width + 2 * small * small
    scores = functools.partial(_scores, rank=rank)
    return in_float64(scores, matrix_BND, values_per_image=values).float()


def _scores(rows_BND: Tensor, rank: int) -> Tensor:
    wide = rows_BND.shape[1] <= rows_BND.shape[2]
    sides_BMX = rows_BND if wide else rows_BND.mT  # M x M is the smaller Gram matrix
    gram_BMM = product(sides_BMX, sides_BMX.mT)
    squares_Br, vectors_BMr = _leading(sides_BMX, gram_BMM, rank)
    # (U_ij S_j)^2; U S = X V where V are the vectors.
    energies_BNr = (
        vectors_BMr.square() * squares_Br[:, None]
        if wide
        else product(rows_BND, vectors_BMr).square()
    )
    rest_BN = (rows_BND.square().sum(dim=2) - energies_BNr.sum(dim=2)).clamp_min(0)
    found_Br = squares_Br > _NOISE * squares_Br[:, -1:]
    squares_left_B = gram_BMM.square().sum(dim=(1, 2)) - squares_Br.square().sum(dim=1)
    smallest_B = squares_Br.where(found_Br, torch.inf).amin(dim=1)
    spread_B = _spread(
        gram_BMM.shape[1] - found_Br.sum(dim=1), rest_BN.sum(dim=1), squares_left_B, smallest_B
    )
    return energies_BNr.sqrt().sum(dim=2) + spread_B[:, None] * rest_BN.sqrt()


def _leading(sides_BMX: Tensor, gram_BMM: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (B, r) leading eigenvalues, rising, and (B, M, r) eigenvectors of the Gram matrix.

    Where its rank is below r, the eigenvalues too many are 0, and so are their vectors.
    """
    num_images, _, length = sides_BMX.shape
    start_BXr = _start(length, rank).to(sides_BMX.device).expand(num_images, -1, -1)
    # Half a step first: its columns differ by ratios of singular values, not of their squares.
    basis_BMr = _orthonormal(product(sides_BMX, start_BXr))
    for _ in range(_STEPS):
        basis_BMr = _orthonormal(product(gram_BMM, basis_BMr))
    squares_Br, turn_Brr = torch.linalg.eigh(product(basis_BMr.mT, product(gram_BMM, basis_BMr)))
    return squares_Br.clamp_min(0), product(basis_BMr, turn_Brr)


def _orthonormal(columns_BMr: Tensor) -> Tensor:
    """Return an orthonormal basis of what the columns span; columns too many become 0.

    By the eigen-decomposition of the r x r Gram matrix. A Cholesky factor, where one exists, would
    not say which directions are rounding noise; Householder QR of tall matrices is not batched on
    GPUs. Columns are nearly orthogonal after the first call, so squaring costs no digits then.
    """
    lengths_B1r = torch.linalg.vector_norm(columns_BMr, dim=1, keepdim=True)
    columns_BMr = columns_BMr / torch.where(lengths_B1r > 0, lengths_B1r, 1)
    squares_Br, turn_Brr = torch.linalg.eigh(product(columns_BMr.mT, columns_BMr))
    is_noise_Br = squares_Br <= _NOISE * squares_Br[:, -1:]
    scales_Br = squares_Br.clamp_min(_TINY).rsqrt().masked_fill(is_noise_Br, 0)
    return product(columns_BMr, turn_Brr * scales_Br[:, None])


def _spread(num_left_B: Tensor, sum_B: Tensor, sum_squares_B: Tensor, largest_B: Tensor) -> Tensor:
    """Return the expected sum of |U_ij S_j| over the m directions left, per unit of residual norm.

    A token's residual norm rho is known: rho^2 is the sum of y_j^2 with y_j = U_ij S_j over these
    directions. If their basis is random, y_j is Gaussian of variance c S_j^2, with c = rho^2 / sum
    of S_j^2, so that E |y_j| = sqrt(2 / pi) sqrt(c) S_j and

        E sum |y_j| = sqrt(2 / pi) rho sum S_j / sqrt(sum of S_j^2).

    Of the eigenvalues S_j^2 only their number m, sum and sum of squares are known, as traces. For
    a gamma distribution of that mean and variance, of shape k = mean^2 / variance, the last ratio
    is sqrt(m) Gamma(k + 1/2) / (Gamma(k) sqrt(k)): sqrt(m) for equal ones, less for unequal ones.

    Args:
        num_left_B: m.
        sum_B: of the eigenvalues.
        sum_squares_B: of the eigenvalues; rounding may have left anything of a small one.
        largest_B: that no eigenvalue exceeds; inf where none is known.
    """
    count_B = num_left_B.clamp_min(1).double()
    mean_B = sum_B / count_B
    # What positive numbers up to the largest can have: at least equal, at most few large ones.
    at_most_B = torch.maximum(torch.minimum(largest_B, sum_B), mean_B) * sum_B
    squares_B = torch.minimum(torch.maximum(sum_squares_B, mean_B * sum_B), at_most_B)
    variance_B = squares_B / count_B - mean_B.square()
    shape_B = (mean_B.square() / variance_B.clamp_min(_TINY)).clamp(1e-3, 1e6)
    log_ratio_B = torch.lgamma(shape_B + 0.5) - torch.lgamma(shape_B) - shape_B.log() / 2
    return math.sqrt(2 / math.pi) * count_B.sqrt() * log_ratio_B.exp()


@functools.lru_cache(maxsize=64)
def _start(length: int, rank: int) -> Tensor:
    """Return the (length, rank) float64 numbers that every image starts from."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(length, rank, generator=generator, dtype=torch.float64)
