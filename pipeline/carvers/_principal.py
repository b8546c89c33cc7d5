"""How strongly each token takes part in the principal directions of its image.

B images, N tokens, D width, M = min(N, D), G directions.
"""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.carvers import _image_pool

_EPSILON = float(np.finfo(np.float64).eps)


def token_weights(values_BND: Tensor, num_directions: int) -> Tensor:
    """Return |U|, where U holds the first left singular vectors of the centred tokens.

    Each token is centred by the mean of its own D values. Computed in float64.

    Args:
        values_BND: (B, N, D) finite values, any float dtype.
        num_directions: G, at most N.

    Returns:
        (B, N, G) float32 in [0, 1], the strongest direction first; 0 for directions whose
        singular value is below sqrt(M * 2.2e-16) of the largest, or that do not exist.
    """
    if values_BND.device.type == "cpu":
        image_weights = functools.partial(_image_weights, num_directions=num_directions)
        weights = _image_pool.map_images(image_weights, values_BND)
        return torch.from_numpy(np.stack(weights))
    return token_weights_batched(values_BND, num_directions)


def token_weights_batched(values_BND: Tensor, num_directions: int) -> Tensor:
    """Compute `token_weights` of many images in one go, as a GPU wants it."""
    _, num_tokens, width = values_BND.shape
    weights = functools.partial(_batch_weights, num_directions=num_directions)
    values = num_tokens * max(num_tokens, width)
    return _image_pool.in_float64(weights, values_BND, values_per_image=values)


def _batch_weights(rows_BND: Tensor, num_directions: int) -> Tensor:
    num_images, num_tokens, width = rows_BND.shape
    rows_BND = rows_BND - rows_BND.mean(dim=2, keepdim=True)
    wide = width >= num_tokens
    squares_BM, vectors_BMM = torch.linalg.eigh(
        rows_BND @ rows_BND.mT if wide else rows_BND.mT @ rows_BND
    )
    squares_BG = squares_BM.flip(1)[:, :num_directions]
    vectors_BMG = vectors_BMM.flip(2)[:, :, :num_directions]
    real_BG = squares_BG > squares_BG[:, :1].clamp_min(0) * (squares_BM.shape[1] * _EPSILON)
    if not wide:
        # U S = X V, and V are the eigenvectors of the D x D Gram matrix.
        vectors_BMG = rows_BND @ vectors_BMG / torch.where(real_BG, squares_BG, 1).sqrt()[:, None]
    weights_BNG = rows_BND.new_zeros((num_images, num_tokens, num_directions), dtype=torch.float32)
    weights_BNG[:, :, : squares_BG.shape[1]] = torch.where(real_BG[:, None], vectors_BMG.abs(), 0)
    return weights_BNG


def _image_weights(values_ND: Tensor, num_directions: int) -> NDArray[np.float32]:
    # NumPy's X X^T costs half a product, and its `eigh` is faster than torch's.
    rows_ND: NDArray[np.float64] = values_ND.double().numpy()
    rows_ND = np.ascontiguousarray(rows_ND - rows_ND.mean(axis=1, keepdims=True))
    num_tokens, width = rows_ND.shape
    wide = width >= num_tokens
    squares_M, vectors_MM = np.linalg.eigh(
        rows_ND @ rows_ND.T if wide else rows_ND.T @ rows_ND, UPLO="U"
    )
    squares_G = squares_M[::-1][:num_directions]
    real = int(np.sum(squares_G > max(squares_G[0], 0) * len(squares_M) * _EPSILON))
    vectors_MG = vectors_MM[:, ::-1][:, :real]
    if not wide:
        vectors_MG = rows_ND @ vectors_MG / np.sqrt(squares_G[:real])
    weights_NG = np.zeros((num_tokens, num_directions), dtype=np.float32)
    weights_NG[:, :real] = np.abs(vectors_MG)
    return weights_NG
