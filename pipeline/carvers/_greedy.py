"""Greedy picks, K batched steps each: one pick for every image of the batch per step.

B images, N tokens, K picks. Ties go to the lower position. The first k picks are those of a
smaller budget, so rules built on these are nested.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.carvers import _similarity

_NO_GAIN = 1e-6  # share of a token's diagonal: up to here its gain is float32 rounding

_CHUNK_VALUES = 2**17  # of float64 copies made at once


def pick(
    num_picks: int,
    state_BN: Tensor,
    score: Callable[[Tensor], Tensor],
    update: Callable[[Tensor, Tensor], Tensor],
    first_B: Tensor | None = None,
) -> Tensor:
    """Choose one token after the other, each the best by a score that earlier picks have changed.

    Args:
        num_picks: K, at most N.
        state_BN: what the score is computed from, as it is before the first pick.
        score: from the state to (B, N) finite scores, higher is picked first.
        update: from the state and the (B,) tokens just picked to the next state.
        first_B: picked first, whatever its score.

    Returns:
        (B, K) positions in the order of picking.
    """
    taken_BN = torch.zeros(state_BN.shape, dtype=torch.bool, device=state_BN.device)
    picks: list[Tensor] = []
    for step in range(num_picks):
        if step == 0 and first_B is not None:
            chosen_B = first_B
        else:
            # `argmax` returns the first of several maximal values.
            chosen_B = score(state_BN).masked_fill(taken_BN, -torch.inf).argmax(dim=1)
        picks.append(chosen_B)
        taken_BN.scatter_(1, chosen_B[:, None], True)
        if step + 1 < num_picks:
            state_BN = update(state_BN, chosen_B)
    return torch.stack(picks, dim=1)


def farthest(
    distances_BNN: Tensor, first_B: Tensor, num_picks: int, weights_BN: Tensor | None = None
) -> Tensor:
    """Pick the token farthest from all picks so far: by weight times distance to the nearest."""
    weights = torch.ones_like(distances_BNN[:, 0]) if weights_BN is None else weights_BN
    return pick(
        num_picks,
        torch.full_like(weights, torch.finfo(torch.float32).max),
        lambda nearest_BN: weights * nearest_BN,
        lambda nearest_BN, chosen_B: torch.minimum(
            nearest_BN, _similarity.row(distances_BNN, chosen_B)
        ),
        first_B,
    )


def coverage(similarities_BNN: Tensor, num_picks: int, weights_BN: Tensor | None = None) -> Tensor:
    """Pick the token that most raises how well the picks cover all tokens (facility location).

    The gain of j is the sum over i of max(0, S_ij - covered_i), times the weight of j; covered_i
    starts at 0 and becomes the largest S_ij of a pick j. Sums are exact, so equal tokens tie.

    Args:
        similarities_BNN: S; row i is the token to be covered, column j the candidate.
        num_picks: K.
        weights_BN: of the candidates; all 1 if None.
    """
    similarities_BNN = _summable(similarities_BNN)
    columns_BNN, rows_MN = similarities_BNN.mT, similarities_BNN.flatten(0, 1)
    num_images, num_tokens, _ = similarities_BNN.shape
    covered_BN = similarities_BNN.new_zeros(num_images, num_tokens)

    def update(gains_BN: Tensor, chosen_B: Tensor) -> Tensor:
        nonlocal covered_BN
        raised_BN = torch.maximum(covered_BN, _similarity.row(columns_BNN, chosen_B))
        # Gains change through these tokens only, some 20 of 576: max(0, S - c) is max(S, c) - c.
        tokens_M = (raised_BN > covered_BN).flatten().nonzero().squeeze(1)
        gains_BN -= (raised_BN.double() - covered_BN).sum(dim=1, keepdim=True)
        for tokens_m in torch.split(tokens_M, max(1, _CHUNK_VALUES // num_tokens)):
            given_mN = rows_MN.index_select(0, tokens_m).double()
            lost_mN = given_mN.clamp(min=covered_BN.flatten()[tokens_m, None].double())
            lost_mN -= given_mN.clamp_(min=raised_BN.flatten()[tokens_m, None].double())
            gains_BN.index_add_(0, tokens_m // num_tokens, lost_mN, alpha=-1)
        covered_BN = raised_BN
        return gains_BN

    def score(gains_BN: Tensor) -> Tensor:
        return gains_BN.float() if weights_BN is None else gains_BN.float() * weights_BN

    gains_BN = covered_BN.double()
    num_rows = max(1, _CHUNK_VALUES // gains_BN.numel())
    for part_BnN in torch.split(similarities_BNN, num_rows, dim=1):
        gains_BN += part_BnN.clamp(min=0).sum(dim=1, dtype=torch.float64)
    return pick(num_picks, gains_BN, score, update)


def _summable(values_BNN: Tensor) -> Tensor:
    """Scale and round each matrix so that float64 sums of N values, or differences, are exact.

    Values end below 1, as multiples of one power of two: the last bit of float32 for a value of
    2^-18 of the largest, where N = 576.
    """
    num_tokens = values_BNN.shape[1]
    largest_B11 = values_BNN.abs().amax(dim=(1, 2), keepdim=True)
    _, exponent_B11 = torch.frexp(largest_B11)
    factor_B11 = torch.ldexp(torch.ones_like(largest_B11), -exponent_B11.clamp_min(-126))
    scale = 2.0 ** (52 - num_tokens.bit_length())
    return (values_BNN * factor_B11).mul_(scale).round_().div_(scale)


def log_determinant(kernel_BNN: Tensor, num_picks: int) -> Tensor:
    """Pick the token that most raises the determinant of the picks' kernel (greedy MAP of a DPP).

    A token that the picks explain but for rounding has no gain; where no token has any, the lower
    position is picked.

    Source: Chen et al., "Fast Greedy MAP Inference for Determinantal Point Process" (arXiv
    1709.05135): the Cholesky factor grows by one column a step.
    """
    num_images, num_tokens, _ = kernel_BNN.shape
    columns_BKN = kernel_BNN.new_zeros(num_images, num_picks, num_tokens)
    gains_BN = kernel_BNN.diagonal(dim1=1, dim2=2).clone()
    floor_BN = _NO_GAIN * gains_BN
    step = 0

    def update(gains_BN: Tensor, chosen_B: Tensor) -> Tensor:
        nonlocal step
        index_B1 = chosen_B[:, None]
        so_far_BSN = columns_BKN[:, :step]
        known_BS1 = so_far_BSN.gather(2, index_B1[:, None].expand(-1, step, 1))
        explained_BN = (known_BS1 * so_far_BSN).sum(dim=1)
        gain_B1 = gains_BN.gather(1, index_B1)
        # A pick without gain explains nothing; dividing rounding errors by its root would overflow.
        root_B1 = torch.where(gain_B1 > 0, gain_B1, torch.inf).sqrt()
        column_BN = (_similarity.row(kernel_BNN, chosen_B) - explained_BN) / root_B1
        columns_BKN[:, step] = column_BN
        step += 1
        left_BN = gains_BN - column_BN.square()
        return left_BN.where(left_BN > floor_BN, 0)

    return pick(num_picks, gains_BN, lambda gains_BN: gains_BN, update)
