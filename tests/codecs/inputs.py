"""Features and stored codes that the tests of several codecs share."""

import itertools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.types import PackedTokens
from tests.codecs.decoders import numbers, read_codes, token_rows
from tests.golden import GoldenCase


def gaussian(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def with_outlier_channels(count: int, width: int, factor: float) -> Tensor:
    rows = gaussian(count, width)
    rows[:, torch.randperm(width, generator=torch.Generator().manual_seed(1))[:6]] *= factor
    return rows


def relative_error(rows: Tensor, unpacked: Tensor) -> float:
    return ((unpacked - rows).norm(dim=1) / rows.norm(dim=1)).mean().item()


def flat_heads(tensor_1HLD: Tensor) -> Tensor:
    """Return (L, H * D): a token's heads one after the other."""
    return tensor_1HLD[0].transpose(0, 1).flatten(1)


def by_importance(case: GoldenCase) -> Tensor:
    """Return the value rows of a case of two classes, the important class first.

    Row r of a class holds the r-th identifier of every head, as the released code mixes them.
    """
    value_HLD = case.inputs["value"][0]
    ids_HN = torch.cat([case.inputs["important_ids"], case.inputs["unimportant_ids"]], dim=2)[0]
    rows_HND = value_HLD.gather(1, ids_HN.long().unsqueeze(2).expand(-1, -1, value_HLD.shape[2]))
    return rows_HND.transpose(0, 1).flatten(1)


def stored_affine(packed: PackedTokens) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return (K,) minima and (K,) steps."""
    minimum, step = np.frombuffer(packed.aux, "<f4").reshape(-1, 2).T
    return minimum, step


def stored_scales(head: bytes) -> NDArray[np.float32]:
    return numbers(head, "float32")


def stored_codes(packed: PackedTokens, bits: int, width: int) -> NDArray[np.uint8]:
    return read_codes(token_rows(packed), bits, width)


def lloyd_max(num_levels: int) -> tuple[list[float], float]:
    """Return the best levels for a Gaussian of variance 1, and their mean squared error."""
    levels = [4 * (place + 0.5) / num_levels - 2 for place in range(num_levels)]
    for _ in range(3000):
        levels = [m / p for m, p in _cells(levels)]
    return levels, _mean_square_error(levels, 1.0)


def error_of_levels(levels: list[int], unit: float) -> float:
    """Return the mean squared error of `levels / unit` for a Gaussian of variance 1."""
    return _mean_square_error([level / unit for level in levels], 1.0)


def _mean_square_error(levels: list[float], variance: float) -> float:
    cells = zip(levels, _cells(levels), strict=True)
    return variance + sum(level * level * p - 2 * level * m for level, (m, p) in cells)


def _cells(levels: list[float]) -> list[tuple[float, float]]:
    """Return first moment and probability of the values nearest to each level."""
    inner = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    borders = [-math.inf, *inner, math.inf]
    density = [math.exp(-b * b / 2) / math.sqrt(2 * math.pi) for b in borders]
    below = [0.5 * (1 + math.erf(b / math.sqrt(2))) for b in borders]
    return [(density[i] - density[i + 1], below[i + 1] - below[i]) for i in range(len(levels))]
