"""Tokens kept by two rules at once: the order of the two parts, who joins whom, sums.

B images, N tokens, K kept tokens, M entries of an order, D width of a vector,
n rows of a sum.
"""

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.carvers import _ops, _similarity
from pipeline.carvers._image_pool import product


def in_turns(order_BM: Tensor, groups_BM: Tensor, num_groups: int = 2) -> Tensor:
    """Return the entries of an order rearranged so that every prefix holds each group's share.

    The i-th of the n entries of a group stands at (i + 1/2) / n; inside a group the order stays,
    and equal places go to the entry that stood first.

    Args:
        order_BM: any entries, best first.
        groups_BM: group of each entry, in [0, num_groups); a group may be empty.
        num_groups: how many there are.
    """
    groups_G1 = torch.arange(num_groups, device=groups_BM.device)[:, None]
    belongs_BGM = groups_BM[:, None, :] == groups_G1
    nth_BGM = belongs_BGM.cumsum(dim=2)
    # Quotients of small whole numbers: equal shares are equal floats.
    shares_BGM = (nth_BGM - 0.5) / nth_BGM[:, :, -1:].clamp_min(1)
    places_BM = shares_BGM.gather(1, groups_BM[:, None, :]).squeeze(1)
    return order_BM.gather(1, places_BM.argsort(dim=1, stable=True))


def positions_mask(positions_BK: Tensor, num_tokens: int) -> Tensor:
    """Return (B, N) True at the positions named."""
    mask_BN = torch.zeros(
        (len(positions_BK), num_tokens), dtype=torch.bool, device=positions_BK.device
    )
    return mask_BN.scatter_(1, positions_BK, True)


def others(positions_BK: Tensor, num_tokens: int) -> Tensor:
    """Return (B, N - K) the positions that are not named, rising."""
    is_named_BN = positions_mask(positions_BK, num_tokens)
    order_BN = is_named_BN.byte().argsort(dim=1, stable=True)
    return order_BN[:, : num_tokens - positions_BK.shape[1]]


def nearest(vectors_BND: Tensor, anchors_BK: Tensor) -> Tensor:
    """Return (B, N) for each token the index of the anchor of highest cosine; its own for each.

    Only the (B, N, K) products with the anchors are made.

    Args:
        vectors_BND: what is compared, any float dtype; a zero vector is similar to nothing.
        anchors_BK: positions, no position twice. Ties go to the anchor that stands first.
    """
    unit_BND = _similarity.unit(vectors_BND)
    return joined(product(unit_BND, _ops.take_rows(unit_BND, anchors_BK).mT), anchors_BK)


def joined(similarities_BNK: Tensor, anchors_BK: Tensor) -> Tensor:
    """Return (B, N) for each token the index of the anchor it is most similar to; its own for each.

    Args:
        similarities_BNK: of each token to each anchor.
        anchors_BK: positions, no position twice. Ties go to the anchor that stands first.
    """
    groups_BK = torch.arange(anchors_BK.shape[1], device=anchors_BK.device).expand_as(anchors_BK)
    return similarities_BNK.argmax(dim=2).scatter(1, anchors_BK, groups_BK)


def weighted_sums(features_BND: Tensor, rows_BKn: Tensor, weights_BKn: Tensor) -> Tensor:
    """Return (B, K, D) sums of weighted rows, the rows of each sum in order and by themselves.

    Args:
        features_BND: float32.
        rows_BKn: int64, the rows of each sum; there may be no sum, or none in it.
        weights_BKn: float32.
    """
    num_images, num_tokens, width = features_BND.shape
    if rows_BKn.numel() == 0:
        return features_BND.new_zeros(*rows_BKn.shape[:2], width)
    starts_B11 = torch.arange(num_images, device=rows_BKn.device)[:, None, None] * num_tokens
    sums = functional.embedding_bag(
        (rows_BKn + starts_B11).flatten(0, 1),
        features_BND.flatten(0, 1),
        mode="sum",
        per_sample_weights=weights_BKn.flatten(0, 1),
    )
    return sums.view(num_images, -1, width)
