"""In which order a model is fed the tokens of an image, and what it puts between them.

N tokens of an image as they are stored: view after view, the thumbnail first, each row by row.
S slots of the image in a prompt: what the model would be fed if nothing had been carved.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.types import TileLayout

ROW_END = -1


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """What stands in the slots of a whole image, all image tokens of the prompt.

    Attributes:
        sources: (S,) int64: which of the N tokens stands there, or `ROW_END`, where the model puts
            an embedding of its own at the end of a row.
        lines: (S,) int64: which row of the canvas a slot is in, from 1; 0 for those in none.
        runs: number of slots that stand together, for each stretch of the prompt; their sum is S.
    """

    sources: Tensor
    lines: Tensor
    runs: tuple[int, ...]


def arrange(kind: str, grid: tuple[int, int, int], tiles: TileLayout | None) -> Arrangement:
    """Return the slots of an image.

    Args:
        kind: `model_type` of the model.
        grid: views, rows and columns of one view, as they are stored.
        tiles: how the views of a tiled image lie.

    Raises:
        ConfigError: an image of another kind of model.
    """
    if tiles is None:
        if kind in _NEEDS_TILES:
            raise ConfigError(
                f"models of type {kind!r} see an image in tiles, and this image has none: it was "
                "carved for another model"
            )
        return in_order(prod(grid))
    if kind not in _TILED:
        raise ConfigError(
            f"models of type {kind!r} see an image whole, and this one was carved in tiles"
        )
    return _TILED[kind](grid, tiles)


def in_order(num_tokens: int) -> Arrangement:
    """Return the slots of an image that is fed as it is stored."""
    return _without_ends(torch.arange(num_tokens), (num_tokens,))


def kept_slots(arrangement: Arrangement, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return which slots stay, and what stands in them.

    The end of a row stays if any token of its row does. Tokens that the model never sees, because
    they lie in padding, have no slot.

    Args:
        arrangement: of the image.
        positions: (K,) int64, ascending: the kept tokens, of N.

    Returns:
        slots: (T,) int64, ascending.
        rows: (T,) int64: which of the K tokens, or `ROW_END`.
    """
    sources, lines = arrangement.sources, arrangement.lines
    rank = torch.full((max(int(sources.max()), int(positions.max())) + 1,), -1, dtype=torch.long)
    rank[positions] = torch.arange(len(positions))
    is_end = sources == ROW_END
    rows = torch.where(is_end, ROW_END, rank[sources.clamp_min(0)])
    stays = ~is_end & (rows >= 0)
    used = torch.zeros(int(lines.max()) + 1, dtype=torch.bool)
    used[lines[stays]] = True
    stays |= is_end & used[lines]
    (slots,) = stays.nonzero(as_tuple=True)
    return slots, rows[slots]


def in_slots(features_KD: Tensor, rows: Tensor, row_end: Tensor | None) -> Tensor:
    """Return (T, D): an image's tokens in the order of its slots, and the ends of its rows.

    Args:
        features_KD: of the kept tokens.
        rows: (T,) of `kept_slots`.
        row_end: (D,) what the model puts at the end of a row; None where no row has an end.
    """
    rows = rows.to(features_KD.device)
    ordered_TD = features_KD[rows.clamp_min(0)]
    if row_end is None:
        return ordered_TD
    return torch.where((rows == ROW_END)[:, None], row_end.to(ordered_TD), ordered_TD)


def _with_row_ends(grid: tuple[int, int, int], tiles: TileLayout) -> Arrangement:
    """LLaVA-NeXT and OneVision: the thumbnail, then the canvas with an end at each of its rows."""
    if tiles.canvas is not None:
        height, width = tiles.canvas
        first = prod(grid) - height * width
        canvas = first + torch.arange(height * width).view(height, width)
    else:
        _, rows, columns = grid
        first = rows * columns
        tokens = first + torch.arange(tiles.rows * tiles.columns * rows * columns)
        split = tokens.view(tiles.rows, tiles.columns, rows, columns)
        top, bottom, left, right = tiles.unpadded
        canvas = split.transpose(1, 2).reshape(tiles.rows * rows, -1)[top:bottom, left:right]
    ends = torch.full((len(canvas), 1), ROW_END)
    sources = torch.cat([torch.arange(first), torch.cat([canvas, ends], dim=1).flatten()])
    lines = torch.arange(1, len(canvas) + 1).repeat_interleave(canvas.shape[1] + 1)
    lines = torch.cat([torch.zeros(first, dtype=torch.long), lines])
    return Arrangement(sources=sources, lines=lines, runs=(len(sources),))


def _thumbnail_last(grid: tuple[int, int, int], tiles: TileLayout) -> Arrangement:
    """InternVL: the tiles, then the thumbnail, without a break."""
    _, rows, columns = grid
    return _without_ends(torch.arange(prod(grid)).roll(-rows * columns), (prod(grid),))


def _views_apart(grid: tuple[int, int, int], tiles: TileLayout) -> Arrangement:
    """Idefics3: the same with text around each view."""
    views, rows, columns = grid
    return _without_ends(_thumbnail_last(grid, tiles).sources, (rows * columns,) * views)


def _without_ends(sources: Tensor, runs: tuple[int, ...]) -> Arrangement:
    return Arrangement(sources=sources, lines=torch.zeros_like(sources), runs=runs)


_NEEDS_TILES = frozenset({"llava_next", "llava_onevision"})
_TILED: Mapping[str, Callable[[tuple[int, int, int], TileLayout], Arrangement]] = {
    "llava_next": _with_row_ends,
    "llava_onevision": _with_row_ends,
    "internvl": _thumbnail_last,
    "idefics3": _views_apart,
    "smolvlm": _views_apart,
}
