"""Non-maximum suppression: a token that stays deletes those after it that are too like it.

B images, N tokens.
"""

import torch
from torch import Tensor

from pipeline.carvers import _ops


def survivors(deletes_BNN: Tensor, order_BN: Tensor) -> Tensor:
    """Return (B, N) whether each token stays, going through them in an order.

    Args:
        deletes_BNN: bool; row i says whom token i deletes if it stays itself. Tokens that stand
            before i, and i itself, are not touched.
        order_BN: positions, the first token to look at first.
    """
    places_BN = _ops.inverse(order_BN)
    later_BNN = places_BN[:, :, None] < places_BN[:, None, :]
    # 0 and 1 in float32: sums of them are exact, and a product runs on all units.
    deletes_BNN = deletes_BNN.logical_and(later_BNN).float()
    stays_BN = torch.ones_like(places_BN, dtype=torch.float32)
    while True:
        # After t rounds the first t tokens of an order are settled; most settle much earlier.
        next_BN = (torch.bmm(stays_BN[:, None], deletes_BNN).squeeze(1) == 0).float()
        if torch.equal(next_BN, stays_BN):
            return stays_BN.bool()
        stays_BN = next_BN
