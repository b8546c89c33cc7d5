"""Tensor operations that carvers share: pure, batched, and the same for any batch size.

B images, N source tokens, K kept tokens, M rows to choose from, G groups, D feature width.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import MissingSignalError, NonFiniteError
from pipeline.types import CarvedTokens, VisualTokens

MAX_MATRIX_BYTES = 256 * 2**20
"""No (B, N, N) float32 matrix of a carver is larger; batches are cut into parts of fewer images.

A rule holds up to five such matrices at once; `benchmarks/carvers.md` has what each takes in all.
"""


def split(tokens: VisualTokens) -> Iterator[VisualTokens]:
    """Cut a batch into parts whose (B, N, N) float32 matrices keep to `MAX_MATRIX_BYTES`."""
    num_images, num_tokens, width = tokens.features.shape
    # Also copies of the features in float32, which are larger where D > N.
    at_once = max(1, MAX_MATRIX_BYTES // (4 * num_tokens * max(num_tokens, width)))
    if num_images <= at_once:
        yield tokens
        return
    for start in range(0, num_images, at_once):
        part = slice(start, start + at_once)
        signals = {name: signal[part] for name, signal in tokens.signals.items()}
        yield dataclasses.replace(
            tokens, features=tokens.features[part], signals=signals, image_indices=None
        )


def signal(tokens: VisualTokens, name: str) -> Tensor:
    """Return one signal of a batch in float32.

    Raises:
        MissingSignalError: the batch does not hold it.
    """
    if name not in tokens.signals:
        held = ", ".join(sorted(tokens.signals)) or "none"
        raise MissingSignalError(f"no signal {name!r} in the batch, which holds: {held}")
    return tokens.signals[name].float()


def require_finite(values_BNX: Tensor, name: str) -> None:
    """Refuse NaN and infinity, which would break a decomposition in its middle.

    Raises:
        NonFiniteError: naming the images of the batch that hold such a value.
    """
    # The extremes are NaN where a value is; `isfinite` on every value takes many times as long.
    flat_BX = values_BNX.flatten(1)
    finite_B = flat_BX.amax(dim=1).isfinite() & flat_BX.amin(dim=1).isfinite()
    if not bool(finite_B.all()):
        images = (~finite_B).nonzero().flatten().tolist()
        raise NonFiniteError(f"{name} of image {images} of the batch holds NaN or infinity")


def require_finite_results(results: Sequence[CarvedTokens], carver: str) -> None:
    """Refuse sums of finite tokens that are too large for the dtype of the features.

    Raises:
        NonFiniteError: naming the images of the batch, the carver and the dtype.
    """
    images = [i for i, result in enumerate(results) if not bool(result.features.isfinite().all())]
    if images:
        dtype = str(results[0].features.dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"{carver} adds tokens of image {images} of the batch up to more than {dtype} holds; "
            "encode in bfloat16 or float32, or take a carver that keeps or averages tokens"
        )


def best_first(scores_BN: Tensor) -> Tensor:
    """Return (B, N) positions by falling score; equal scores by rising position.

    `torch.topk` would choose among equal scores as it likes.
    """
    return scores_BN.argsort(dim=1, descending=True, stable=True)


def inverse(order_BN: Tensor) -> Tensor:
    """Return the inverse permutation of each row: the place of every token in its order."""
    places_BN = torch.arange(order_BN.shape[1], device=order_BN.device).expand_as(order_BN)
    return torch.empty_like(order_BN).scatter_(1, order_BN, places_BN)


def take_rows(features_BMD: Tensor, rows_BK: Tensor) -> Tensor:
    """Return the (B, K, D) rows named for each image."""
    num_images, num_rows, width = features_BMD.shape
    starts_B1 = torch.arange(num_images, device=rows_BK.device)[:, None] * num_rows
    # Whole rows are copied; `gather` would look up every value.
    taken = features_BMD.flatten(0, 1).index_select(0, (rows_BK + starts_B1).flatten())
    return taken.view(*rows_BK.shape, width)


def keep(
    features_BND: Tensor, order_BK: Tensor, counts_B: Tensor | None = None
) -> list[CarvedTokens]:
    """Return the tokens at `order_BK` (best first) unchanged, each standing for itself.

    Args:
        features_BND: all tokens.
        order_BK: positions, best token first.
        counts_B: int64, in [1, K]: how many of its row each image keeps; None for all.
    """
    sizes_BK = torch.ones(order_BK.shape, device=order_BK.device)
    return collect(features_BND, order_BK, order_BK, sizes_BK, counts_B)


def collect(
    features_BMD: Tensor,
    rows_BK: Tensor,
    positions_BK: Tensor,
    sizes_BK: Tensor,
    counts_B: Tensor | None = None,
) -> list[CarvedTokens]:
    """Bring kept tokens into position order, one result per image.

    Args:
        features_BMD: what the rows are taken from.
        rows_BK: row of each kept token, best token first.
        positions_BK: source position of each kept token, best token first.
        sizes_BK: source tokens each kept token stands for, best token first.
        counts_B: int64, in [1, K]: how many of its row each image keeps; None for all.

    Returns:
        Results with memory of their own, so that keeping one does not keep the batch.
    """
    num_kept = positions_BK.shape[1]
    counts = [num_kept] * len(positions_BK)
    if counts_B is not None:
        # What an image drops sorts behind every position.
        dropped_BK = torch.arange(num_kept, device=counts_B.device) >= counts_B[:, None]
        positions_BK = positions_BK.masked_fill(dropped_BK, torch.iinfo(torch.int64).max)
        counts = counts_B.tolist()
    positions_BK, ranks_BK = positions_BK.sort(dim=1)
    rows_BK = rows_BK.gather(1, ranks_BK)
    sizes_BK = sizes_BK.gather(1, ranks_BK)
    return [
        CarvedTokens(
            features=features_MD.index_select(0, rows_K[:count]),
            positions=positions_K[:count].clone(),
            sizes=sizes_K[:count].clone(),
            ranks=ranks_K[:count].clone(),
        )
        for features_MD, rows_K, positions_K, sizes_K, ranks_K, count in zip(
            features_BMD, rows_BK, positions_BK, sizes_BK, ranks_BK, counts, strict=True
        )
    ]


def group_mean(features_BMD: Tensor, owners_BM: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Average the rows of each group, in float32.

    Args:
        features_BMD: rows of each image, any float dtype.
        owners_BM: group of each row, in [0, num_groups). An empty group has size 0 and a mean that
            is not a number.
        num_groups: G.

    Returns:
        (B, G, D) means in the dtype of the features, and (B, G) float32 rows per group.
    """
    num_images, _, width = features_BMD.shape
    ones_BM = torch.ones_like(owners_BM)
    sizes_BG = ones_BM.new_zeros(num_images, num_groups).scatter_add_(1, owners_BM, ones_BM)
    if features_BMD.device.type == "cpu":
        starts_B1 = torch.arange(num_images)[:, None] * num_groups
        sums = torch.zeros(num_images * num_groups, width)
        sums.index_add_(0, (owners_BM + starts_B1).flatten(), features_BMD.flatten(0, 1).float())
        means = sums.div_(sizes_BG.view(-1, 1))
    else:
        # Sums in order as well; adding at indices would depend on thread timing on a GPU.
        rows_BM = owners_BM.argsort(dim=1, stable=True)
        sorted_rows = take_rows(features_BMD, rows_BM).flatten(0, 1).float()
        means = torch.segment_reduce(sorted_rows, "mean", lengths=sizes_BG.flatten(), axis=0)
    return means.view(num_images, num_groups, width).to(features_BMD.dtype), sizes_BG.float()


def spread_order(grid: tuple[int, int], tokens: Tensor, num_views: int = 1) -> Tensor:
    """Return (B, N) positions, every prefix of them spread evenly over the grid and the views.

    Args:
        grid: rows and columns of a view; see `coarse_to_fine`.
        tokens: (B, N, *), for its number of images and its device.
        num_views: taken in turns, the most distant ones first.
    """
    cells = torch.tensor(coarse_to_fine(*grid), device=tokens.device)
    views = torch.tensor(coarse_to_fine(num_views, 1), device=tokens.device)
    order_N = (views * len(cells) + cells[:, None]).flatten()
    return order_N.expand(tokens.shape[0], -1)


@functools.lru_cache(maxsize=1024)
def coarse_to_fine(rows: int, columns: int) -> tuple[int, ...]:
    """Order the cells of a grid so that every prefix is spread evenly over it.

    Each next cell is the one that most reduces the sum, over all cells, of the squared distance
    to the nearest chosen cell; equal gains take the lower position. All numbers are integers, so
    the order is the same everywhere. Gains only shrink as cells are chosen, hence a gain that is
    still the best after being recomputed needs no comparison with the rest (lazy greedy).

    Returns:
        All positions of the grid, row-major, first to last to choose.
    """
    nearest_RC = np.full((rows, columns), rows**2 + columns**2, dtype=np.int64)
    gains = [(-_gain(nearest_RC, p), p) for p in range(rows * columns)]
    heapq.heapify(gains)
    order: list[int] = []
    reach = rows + columns
    while gains:
        _, position = heapq.heappop(gains)
        current = (-_gain(nearest_RC, position, reach), position)
        if gains and current > gains[0]:
            heapq.heappush(gains, current)
            continue
        window_rc, distances_rc = _around(nearest_RC, position, reach)
        np.minimum(window_rc, distances_rc, out=window_rc)
        # Cells further from a choice than this are nearer to an earlier one.
        reach = math.isqrt(int(nearest_RC.max()))
        order.append(position)
    return tuple(order)


def _around(
    nearest_RC: NDArray[np.int64], position: int, reach: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the view of the grid within `reach` of a cell, and its squared distances to it."""
    rows, columns = nearest_RC.shape
    row, column = divmod(position, columns)
    rows_r = np.arange(max(0, row - reach), min(rows, row + reach + 1))
    columns_c = np.arange(max(0, column - reach), min(columns, column + reach + 1))
    window_rc = nearest_RC[rows_r[0] : rows_r[-1] + 1, columns_c[0] : columns_c[-1] + 1]
    return window_rc, (rows_r[:, None] - row) ** 2 + (columns_c - column) ** 2


def _gain(nearest_RC: NDArray[np.int64], position: int, reach: int | None = None) -> int:
    span = sum(nearest_RC.shape) if reach is None else reach
    window_rc, distances_rc = _around(nearest_RC, position, span)
    return int(np.maximum(window_rc - distances_rc, 0).sum())
