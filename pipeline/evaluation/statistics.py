"""Means with their uncertainty: the bootstrap over images, and rank correlations.

Images are what is sampled from the world, so images are resampled, not questions: those on one
image stand or fall together (Efron, The Annals of Statistics 7, 1979; percentile intervals). All
quantities of an evaluation use the same resamples, so differences between them are paired.

I images, R resamples, C columns (quantities).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95

RANK_RESAMPLES = 500

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A number with its interval."""

    mean: float  # or another statistic; NaN where it is not defined
    low: float  # of the interval of `CONFIDENCE`; NaN where fewer than two images tell of it
    high: float
    images: int  # that tell of it


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Resamples of a number of images.

    Args:
        num_images: I, at least 1.
        resamples: R.
        seed: of the resamples; the same for the same I, R and seed.
    """

    num_images: int
    resamples: int
    seed: int

    @cached_property
    def weights(self) -> Floats:
        """(R, I): how often each image is in each resample; rows sum to I."""
        generator = np.random.default_rng(self.seed)
        shares = np.full(self.num_images, 1 / self.num_images)
        return generator.multinomial(self.num_images, shares, size=self.resamples).astype(float)

    def ratios(self, sums_IC: Floats, counts_IC: Floats) -> Floats:
        """Return the means of each resample.

        Args:
            sums_IC: sum of a quantity over what each image has of it (its questions, say).
            counts_IC: how many those are; 0 where an image tells nothing of it.

        Returns:
            (R, C) sum of sums / sum of counts; NaN where a resample holds none.
        """
        counts_RC = self.weights @ counts_IC
        sums_RC = self.weights @ sums_IC
        return np.divide(sums_RC, counts_RC, out=np.full_like(sums_RC, np.nan), where=counts_RC > 0)

    def means(self, sums_IC: Floats, counts_IC: Floats) -> list[Interval]:
        """Return the mean of each column with its interval; arguments as for `ratios`."""
        totals_C = counts_IC.sum(axis=0)
        means_C = np.divide(
            sums_IC.sum(axis=0), totals_C, out=np.full(len(totals_C), np.nan), where=totals_C > 0
        )
        images_C = (counts_IC > 0).sum(axis=0)
        return intervals(means_C, self.ratios(sums_IC, counts_IC), images_C)

    def family_means(self, sums_IFC: Floats, counts_IFC: Floats) -> list[Interval]:
        """Return for each column the mean over families of its means, with its interval.

        Args:
            sums_IFC: as for `ratios`, by family.
            counts_IFC: likewise; a family without any for a column is left out of its mean.
        """
        num_families = sums_IFC.shape[1]
        totals_FC = counts_IFC.sum(axis=0)
        means_FC = np.divide(
            sums_IFC.sum(axis=0),
            totals_FC,
            out=np.full_like(totals_FC, np.nan),
            where=totals_FC > 0,
        )
        samples_FRC = np.stack(
            [self.ratios(sums_IFC[:, f], counts_IFC[:, f]) for f in range(num_families)]
        )
        is_there_FC = totals_FC > 0
        images_C = (counts_IFC.sum(axis=1) > 0).sum(axis=0)
        # A resample without any question of a family says nothing about the mean over families.
        samples_RC = np.where(is_there_FC[:, None], samples_FRC, 0).sum(axis=0)
        num_there_C = is_there_FC.sum(axis=0)
        samples_RC = _divided(samples_RC, num_there_C)
        means_C = _divided(np.where(is_there_FC, means_FC, 0).sum(axis=0), num_there_C)
        return intervals(means_C, samples_RC, images_C)

    def spearman(self, x_I: Floats, y_I: Floats) -> Interval:
        """Return Spearman's rank correlation over images, with its interval.

        Ties share the mean of their ranks. Images where either is NaN are left out. NaN where one
        of the two is constant; resamples where one is are left out of the interval. The interval is
        from the first `RANK_RESAMPLES` resamples: ranking anew in each is slow.
        """
        good_I = np.isfinite(x_I) & np.isfinite(y_I)
        # Images as rows: they are sorted, and a row of resamples lies together in memory.
        weights_IR = np.ascontiguousarray(self.weights[:RANK_RESAMPLES, good_I].T)
        x_I, y_I = x_I[good_I], y_I[good_I]
        ones_I1 = np.ones((len(x_I), 1))
        value_1 = _weighted_spearman(x_I, y_I, ones_I1)
        samples_R1 = _weighted_spearman(x_I, y_I, weights_IR)[:, None]
        return intervals(value_1, samples_R1, np.array([len(x_I)]))[0]


def intervals(values_C: Floats, samples_RC: Floats, images_C: NDArray[np.int64]) -> list[Interval]:
    """Return values with the percentile intervals of their resamples, NaN resamples left out."""
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    is_known_C = (images_C >= 2) & np.isfinite(samples_RC).any(axis=0)
    bounds_2C = np.full((2, len(values_C)), np.nan)
    if is_known_C.any():
        bounds_2C[:, is_known_C] = np.nanquantile(samples_RC[:, is_known_C], tails, axis=0)
    return [
        Interval(mean=float(value), low=float(low), high=float(high), images=int(images))
        for value, low, high, images in zip(values_C, *bounds_2C, images_C, strict=True)
    ]


def row_spearman(x_RC: Floats, y_RC: Floats) -> Floats:
    """Return Spearman's correlation of each row's C pairs; ties share the mean of their ranks.

    Returns:
        (R,), NaN where one of the two is constant or holds NaN.
    """
    x_RC, y_RC = _row_ranks(x_RC), _row_ranks(y_RC)
    x_RC -= x_RC.mean(axis=1, keepdims=True)
    y_RC -= y_RC.mean(axis=1, keepdims=True)
    return _correlations((x_RC * y_RC).sum(axis=1), (x_RC**2).sum(axis=1), (y_RC**2).sum(axis=1))


def _row_ranks(values_RC: Floats) -> Floats:
    """Return the rank of each value in its row, from 1; NaN rows where one is NaN."""
    ranks_RC = np.full_like(values_RC, np.nan)
    for row_C, ranks_C in zip(values_RC, ranks_RC, strict=True):
        if np.isfinite(row_C).all():
            below_CC, equal_CC = row_C < row_C[:, None], row_C == row_C[:, None]
            ranks_C[:] = below_CC.sum(axis=1) + (equal_CC.sum(axis=1) + 1) / 2
    return ranks_RC


def _correlations(both_R: Floats, left_R: Floats, right_R: Floats) -> Floats:
    """Return covariances over spreads, of ranks: NaN where one spread is 0."""
    spread_R = np.sqrt(left_R * right_R)
    # Ranks are multiples of 1/2, so a spread below this is none.
    return np.divide(both_R, spread_R, out=np.full_like(both_R, np.nan), where=spread_R > 1e-6)


def _divided(values: Floats, by: NDArray[np.int64]) -> Floats:
    return np.where(by > 0, values / np.maximum(by, 1), np.nan)


def _weighted_spearman(x_I: Floats, y_I: Floats, weights_IR: Floats) -> Floats:
    """Return (R,) correlations of the ranks in samples that hold images repeatedly."""
    x_IR, y_IR = _weighted_ranks(x_I, weights_IR), _weighted_ranks(y_I, weights_IR)
    # Mid-ranks of n images have the mean (n + 1) / 2 whatever is tied.
    middle_R = (weights_IR.sum(axis=0) + 1) / 2
    x_IR -= middle_R
    y_IR -= middle_R
    weighted_IR = weights_IR * x_IR
    left_R = np.einsum("ir,ir->r", weighted_IR, x_IR)
    both_R = np.einsum("ir,ir->r", weighted_IR, y_IR)
    right_R = np.einsum("ir,ir->r", weights_IR, np.square(y_IR, out=y_IR))
    return _correlations(both_R, left_R, right_R)


def _weighted_ranks(values_I: Floats, weights_IR: Floats) -> Floats:
    """Return (I, R) mean rank of each image among the copies of all, in samples by weights."""
    if len(values_I) == 0:
        return np.zeros_like(weights_IR)
    _, group_I = np.unique(values_I, return_inverse=True)
    order_I = np.argsort(group_I, kind="stable")
    starts_G = np.flatnonzero(np.diff(group_I[order_I], prepend=-1))
    held_GR = np.add.reduceat(weights_IR[order_I], starts_G, axis=0)
    ranks_GR = np.cumsum(held_GR, axis=0) - held_GR / 2 + 0.5
    return ranks_GR[group_I]
