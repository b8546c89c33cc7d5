"""The two measures of information against hand-made matrices and a plain computation."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.evaluation.information import effective_ranks, spectrum_shares


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_svd(full: Tensor, kept: Tensor) -> float:
    """Return the share by a projector from an SVD of the kept tokens."""
    x, y = full.double().numpy(), kept.double().numpy()
    _, singular, right = np.linalg.svd(y, full_matrices=False)
    right = right[singular > singular[0] * 1e-7]
    return float(np.linalg.norm(x @ right.T @ right) ** 2 / np.linalg.norm(x) ** 2)


@pytest.mark.parametrize(("num_kept", "width"), [(3, 16), (8, 16), (12, 6), (1, 4)])
def test_the_share_is_that_of_a_projection_on_the_kept_rows(num_kept: int, width: int) -> None:
    full = [drawn(20, width, seed=1), drawn(20, width, seed=2)]
    kept = [image[:num_kept] for image in full]

    shares = spectrum_shares(full, kept)

    assert shares == pytest.approx([by_svd(x, y) for x, y in zip(full, kept, strict=True)])


def test_orthogonal_tokens_hold_their_own_share_of_the_trace() -> None:
    full = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))

    shares = spectrum_shares([full] * 3, [full[[0]], full[[1, 2]], full[[3]]])

    assert shares == pytest.approx([9 / 14, 5 / 14, 0.0])


def test_copies_of_a_token_add_nothing_and_a_basis_holds_everything() -> None:
    full = drawn(10, 3) @ drawn(3, 8, seed=1)  # of rank 3

    once, twice, basis = spectrum_shares([full] * 3, [full[[0]], full[[0, 0]], full[[0, 4, 7]]])

    assert once == pytest.approx(twice, abs=1e-9)
    assert basis == pytest.approx(1.0)


def test_images_of_different_counts_stay_in_their_order_and_half_precision_is_taken() -> None:
    full = [drawn(9, 5, seed=i).half() for i in range(3)]
    kept = [full[0][:2], full[1][:4], full[2][:2]]

    together = spectrum_shares(full, kept), effective_ranks(kept)

    pairs = zip(full, kept, strict=True)
    alone = [spectrum_shares([x], [y]) + effective_ranks([y]) for x, y in pairs]
    assert pytest.approx(np.array(alone)) == np.array(together).T


def test_effective_rank_counts_directions_used_alike() -> None:
    corners = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])

    ranks = effective_ranks([corners, corners[:2], corners[:1]])

    assert ranks == pytest.approx([2.0, 1.0, 1.0])


def test_an_image_of_zeros_loses_nothing() -> None:
    assert spectrum_shares([torch.zeros(4, 3)], [torch.zeros(2, 3)]) == [1.0]
