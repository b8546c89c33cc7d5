"""Products between the tokens of an image, which most rules start from; all in float32.

B images, N tokens, D feature width. An image's result does not depend on its batch-mates.
"""

import torch
from torch import Tensor

from pipeline.carvers._image_pool import product


def centred(features_BND: Tensor) -> Tensor:
    """Return the features in float32, less the mean token of their image."""
    rows_BND = features_BND.float()
    return rows_BND - rows_BND.mean(dim=1, keepdim=True)


def gram(features_BND: Tensor) -> Tensor:
    """Return the (B, N, N) products of all pairs of tokens of an image."""
    rows_BND = features_BND.float().contiguous()
    return product(rows_BND, rows_BND.mT)


def cosines(features_BND: Tensor) -> Tensor:
    """Return (B, N, N) cosine similarities; a zero token is similar to nothing, itself included."""
    return gram(unit(features_BND))


def unit(features_BND: Tensor) -> Tensor:
    """Return the tokens in float32, scaled to length 1; a zero token stays zero."""
    rows_BND = features_BND.float()
    # Scaled first: squares of very large or small features would leave float32.
    largest_BN1 = rows_BND.abs().amax(dim=2, keepdim=True)
    rows_BND = rows_BND / torch.where(largest_BN1 > 0, largest_BN1, 1)
    lengths_BN1 = torch.linalg.vector_norm(rows_BND, dim=2, keepdim=True)
    return rows_BND / torch.where(lengths_BN1 > 0, lengths_BN1, 1)


def row(matrix_BNN: Tensor, chosen_B: Tensor) -> Tensor:
    """Return the (B, N) row of each image's chosen token."""
    num_tokens = matrix_BNN.shape[2]
    return matrix_BNN.gather(1, chosen_B[:, None, None].expand(-1, 1, num_tokens)).squeeze(1)


def minmax(scores_BN: Tensor) -> Tensor:
    """Return scores stretched to [0, 1] per image; all 1 where an image's scores are equal."""
    lowest_B1 = scores_BN.amin(dim=1, keepdim=True)
    span_B1 = scores_BN.amax(dim=1, keepdim=True) - lowest_B1
    stretched_BN = (scores_BN - lowest_B1) / torch.where(span_B1 > 0, span_B1, 1)
    return torch.where(span_B1 > 0, stretched_BN, 1)
