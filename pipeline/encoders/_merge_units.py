"""Signals of patches for tokens that are made of a square of patches each.

Source: the rule of AngelSlim's pruners for Qwen2.5-VL (github.com/Tencent/AngelSlim, 67394ce):
    attention is summed over the patches of a token, keys are averaged. Outputs are averaged too.
"""

from collections.abc import Mapping

from torch import Tensor

_SUMMED = frozenset(
    {"cls_attention", "received_attention", "shallow_attention", "last_cls_attention"}
)


def merge_signals(
    signals: Mapping[str, Tensor], grid: tuple[int, int], unit: int
) -> dict[str, Tensor]:
    """Return signals of (rows / unit) * (columns / unit) tokens.

    Args:
        signals: (B, rows * columns, ...) of the patches, row by row.
        grid: rows and columns of patches, multiples of the unit.
        unit: patches along the edge of a token.
    """
    if unit == 1:
        return dict(signals)
    return {
        name: merge(values, grid, unit, adds=name in _SUMMED) for name, values in signals.items()
    }


def merge(values_BNX: Tensor, grid: tuple[int, int], unit: int, *, adds: bool) -> Tensor:
    """Add or average the values of each token's patches; see `merge_signals`."""
    rows, columns = grid
    shape = (len(values_BNX), rows // unit, unit, columns // unit, unit, *values_BNX.shape[2:])
    squares = values_BNX.reshape(shape)
    merged = squares.sum(dim=(2, 4)) if adds else squares.mean(dim=(2, 4))
    return merged.flatten(1, 2)
