"""How much each token adds to the singular directions of a matrix: TokenCarve's information score.

Source: Tan et al., TokenCarve, arXiv 2503.10501; github.com/ShawnTan86/TokenCarve @ a57bd59.
Scores come from an eigen-decomposition of the smaller Gram matrix in float64, not from a full SVD
(`benchmarks/tokencarve_svd.md`).
"""

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.carvers import _image_pool

Values = TypeVar("Values", Tensor, NDArray[np.float64])

_EPSILON = float(np.finfo(np.float64).eps)


def contributions(matrix_BND: Tensor) -> Tensor:
    """Return each token's information contribution score, sum over j of |U_ij S_j|.

    Args:
        matrix_BND: (B, N, D) finite values, any float dtype; U S V^T is its SVD, image by image.

    Returns:
        (B, N) float32, >= 0.
    """
    if matrix_BND.device.type == "cpu":
        return _contributions_by_image(matrix_BND)
    return contributions_batched(matrix_BND)


def contributions_batched(matrix_BND: Tensor) -> Tensor:
    """Compute `contributions` of many images in one go, as a GPU wants it."""
    _, num_tokens, width = matrix_BND.shape
    return _image_pool.in_float64(_batch_scores, matrix_BND, values_per_image=num_tokens * width)


def _batch_scores(matrix_BND: Tensor) -> Tensor:
    _, num_tokens, width = matrix_BND.shape
    if width < num_tokens:
        # U S = X V, and V are the eigenvectors of the D x D Gram matrix.
        _, right_BDD = torch.linalg.eigh(matrix_BND.mT @ matrix_BND)
        return (matrix_BND @ right_BDD).abs().sum(dim=2).float()
    squares_BN, left_BNN = torch.linalg.eigh(matrix_BND @ matrix_BND.mT)
    singular_BN = squares_BN.where(squares_BN > _floor(squares_BN), 0).sqrt()
    return (left_BNN.abs() @ singular_BN[:, :, None]).squeeze(2).float()


def _contributions_by_image(matrix_BND: Tensor) -> Tensor:
    """Compute the same in NumPy: there X X^T costs half a product, and `eigh` is faster."""
    scores_BN = torch.empty(matrix_BND.shape[:2])
    each = _image_pool.map_images(_image_scores, matrix_BND)
    for row_N, scores_N in zip(scores_BN, each, strict=True):
        row_N.copy_(torch.from_numpy(scores_N))
    return scores_BN


def _image_scores(matrix_ND: Tensor) -> NDArray[np.float64]:
    rows_ND = np.ascontiguousarray(matrix_ND.double().numpy())
    num_tokens, width = rows_ND.shape
    if width < num_tokens:
        _, right_DD = np.linalg.eigh(rows_ND.T @ rows_ND, UPLO="U")
        return np.abs(rows_ND @ right_DD).sum(axis=1)
    squares_N, left_NN = np.linalg.eigh(rows_ND @ rows_ND.T, UPLO="U")
    squares_N[squares_N <= _floor(squares_N)] = 0
    return np.abs(left_NN, out=left_NN) @ np.sqrt(squares_N)


def _floor(squares_N: Values) -> Values:
    """Return below what an eigenvalue is 0; takes (N,) or (B, N), each row rising.

    Rounding leaves tiny eigenvalues, of either sign, where there should be none: their roots would
    add noise that breaks ties between equal tokens.
    """
    return squares_N[..., -1:] * (squares_N.shape[-1] * _EPSILON)
