"""How many directions the tokens of an image really use: their effective rank.

Source: Roy and Vetterli, The Effective Rank: A Measure of Effective Dimensionality (EUSIPCO 2007),
on singular values; AgilePruner (arXiv 2603.01236) takes it of the centred tokens of an image.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.carvers import _image_pool, _ops
from pipeline.types import VisualTokens

_EPSILON = float(np.finfo(np.float64).eps)


def effective_rank(features_BND: Tensor) -> Tensor:
    """Return exp of the entropy of the singular values of each image's centred tokens.

    Singular values below sqrt(M * 2.2e-16) of the largest, M = min(N, D), count as 0. Computed in
    float64: squaring the matrix halves the digits that small singular values keep.

    Args:
        features_BND: (B, N, D) finite values, any float dtype.

    Returns:
        (B,) float32, in [1, min(N - 1, D)]; 1 where all tokens of an image are equal.
    """
    if features_BND.device.type == "cpu":
        return torch.tensor(_image_pool.map_images(_image_rank, features_BND), dtype=torch.float32)
    return effective_rank_batched(features_BND)


def sample_ranks(sample: Iterable[VisualTokens]) -> list[tuple[int, float]]:
    """Return number of tokens and effective rank of each image of a sample.

    Raises:
        NonFiniteError: features hold NaN or infinity.
    """
    images: list[tuple[int, float]] = []
    for tokens in sample:
        _ops.require_finite(tokens.features, "features")
        for part in _ops.split(tokens):
            num_tokens = part.features.shape[1]
            images += [(num_tokens, rank) for rank in effective_rank(part.features).tolist()]
    return images


def effective_rank_batched(features_BND: Tensor) -> Tensor:
    """Compute `effective_rank` of many images in one go, as a GPU wants it."""
    _, num_tokens, width = features_BND.shape
    return _image_pool.in_float64(_batch_ranks, features_BND, values_per_image=num_tokens * width)


def _batch_ranks(rows_BND: Tensor) -> Tensor:
    rows_BND = rows_BND - rows_BND.mean(dim=1, keepdim=True)
    wide = rows_BND.shape[2] >= rows_BND.shape[1]
    gram_BMM = rows_BND @ rows_BND.mT if wide else rows_BND.mT @ rows_BND
    squares_BM = torch.linalg.eigvalsh(gram_BMM)
    floor_B1 = squares_BM[:, -1:].clamp_min(0) * (squares_BM.shape[1] * _EPSILON)
    singular_BM = squares_BM.where(squares_BM > floor_B1, 0).sqrt()
    total_B1 = singular_BM.sum(dim=1, keepdim=True)
    shares_BM = singular_BM / torch.where(total_B1 > 0, total_B1, 1)
    return torch.special.entr(shares_BM).sum(dim=1).exp().float()


def _image_rank(features_ND: Tensor) -> float:
    # NumPy's X X^T costs half a product, and its `eigvalsh` is faster than torch's.
    rows_ND: NDArray[np.float64] = features_ND.double().numpy()
    rows_ND = np.ascontiguousarray(rows_ND - rows_ND.mean(axis=0))
    wide = rows_ND.shape[1] >= rows_ND.shape[0]
    gram_MM = rows_ND @ rows_ND.T if wide else rows_ND.T @ rows_ND
    squares_M = np.linalg.eigvalsh(gram_MM, UPLO="U")
    # Rounding leaves tiny eigenvalues, of either sign, where there should be none.
    singular_M = np.sqrt(squares_M[squares_M > max(squares_M[-1], 0) * len(squares_M) * _EPSILON])
    if len(singular_M) == 0:
        return 1.0
    shares_M = singular_M / singular_M.sum()
    return float(np.exp(-(shares_M * np.log(shares_M)).sum()))
