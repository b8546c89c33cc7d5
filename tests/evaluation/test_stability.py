"""Disturbed copies and the overlap of what is kept of them."""

import numpy as np
import pytest
import torch

from pipeline.evaluation.stability import DISTURBANCES, disturbed, overlap
from pipeline.types import CarvedTokens
from tests.encoders.tiny_models import photo


def kept(positions: list[int], ranks: list[int] | None = None) -> CarvedTokens:
    count = len(positions)
    return CarvedTokens(
        features=torch.zeros(count, 2),
        positions=torch.tensor(positions),
        sizes=torch.ones(count),
        ranks=torch.tensor(ranks or list(range(count))),
    )


@pytest.mark.parametrize("kind", DISTURBANCES)
def test_a_copy_differs_little_and_is_the_same_each_time(kind: str) -> None:
    pixels = photo()
    before = pixels.copy()

    copy = disturbed(pixels, kind, key="a", seed=0)

    assert copy.shape == pixels.shape and copy.dtype == np.uint8
    assert (copy == disturbed(pixels, kind, key="a", seed=0)).all()
    assert (pixels == before).all()
    assert 0 < np.abs(copy.astype(int) - pixels).mean() < 12


def test_noise_has_a_standard_deviation_of_2_levels_and_depends_on_key_and_seed() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)

    noise = disturbed(grey, "noise", key="a", seed=0)

    assert (noise.astype(float) - 128).std() == pytest.approx(2.0, rel=0.05)
    assert (noise != disturbed(grey, "noise", key="b", seed=0)).any()
    assert (noise != disturbed(grey, "noise", key="a", seed=1)).any()


def test_the_shift_moves_every_column_one_to_the_right() -> None:
    pixels = photo()

    shifted = disturbed(pixels, "shift", key="a", seed=0)

    assert (shifted[:, 1:] == pixels[:, :-1]).all()
    assert (shifted[:, 0] == pixels[:, 0]).all()


def test_an_unknown_disturbance_is_refused() -> None:
    with pytest.raises(ValueError, match="no disturbance 'blur'"):
        disturbed(photo(), "blur", key="a", seed=0)


def test_overlap_is_what_both_keep_of_what_either_keeps() -> None:
    assert overlap(kept([1, 2, 3, 4]), kept([3, 4, 5, 6]), first=4) == 2 / 6
    assert overlap(kept([1, 2]), kept([1, 2]), first=2) == 1
    assert overlap(kept([1]), kept([2]), first=1) == 0


def test_overlap_of_a_prefix_counts_the_best_ranked_alone() -> None:
    one, other = kept([1, 5, 9], ranks=[2, 0, 1]), kept([2, 5, 9], ranks=[0, 1, 2])

    assert overlap(one, other, first=2) == 1 / 3  # 5, 9 and 2, 5
