"""Let the thumbnail of a tiled image decide how many tokens, and which, each of its tiles keeps.

A tile that the thumbnail attends to more keeps a larger share. In a tile, tokens are scored by its
own attention and by the thumbnail's at the same place, equally; padding is left out.

Source: Liu et al., Compression with Global Guidance: Towards Training-free High-Resolution MLLMs
Acceleration (GlobalCom2), arXiv 2501.05179; github.com/xuyang-liu16/GlobalCom2 @ 96b2d00,
Apache-2.0.
Differs: the original emits a stream with newline tokens, which nothing removes; here are kept
tokens with their positions, and newlines are the business of whoever serves them. It is right for
one image per call only. A budget in tokens becomes a share of all tokens of all views; rounding
down and padding leave fewer, and at least one token of the thumbnail stays. A share of 1 keeps
everything, padding too; the original then still drops some of the weaker tiles. It does not
compress an image without tiles; here that is treated like a thumbnail, with the exact budget.
Ranks are added: the thumbnail by its attention, then all tiles by the combined score.
Needs: the class token's attention of the last layer before softmax, or (the authors' code has no
such path) received attention, whose small sums give all tiles nearly the same share.
Cost: O(N log N) per image.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.carvers import _ops
from pipeline.carvers._base import BudgetCarver
from pipeline.types import CarvedTokens, TileLayout, VisualTokens


@dataclass(frozen=True, kw_only=True)
class GlobalCom2(BudgetCarver):
    """Keep a share of the thumbnail, and in each tile a share that the thumbnail chooses.

    Args:
        placement: `corrected` gives a kept token its own position. `faithful` gives one of a padded
            tile that at which the released code puts it: its index among the tile's unpadded
            tokens, taken for an index among all of them. Without padding both are the same.
        temperature: of the softmax over the tiles' summed attention; higher evens shares out.
        attention: of the thumbnail and of the tiles.
    """

    nested: ClassVar[bool] = False  # a smaller budget takes from all views

    placement: Literal["corrected", "faithful"] = "corrected"
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    attention: Literal["cls_logits", "received_attention"] = "cls_logits"

    @property
    def needs(self) -> frozenset[str]:
        """The attention."""
        return frozenset([self.attention])

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        scores_BN = _ops.signal(tokens, self.attention)
        share = self.keep_ratio
        if share is None:
            share = self.budget(scores_BN.shape[1]) / scores_BN.shape[1]
        if tokens.tiles is None or share == 1:
            order_BN = _ops.best_first(scores_BN)
            return _ops.keep(tokens.features, order_BN[:, : self.budget(scores_BN.shape[1])])

        per_view = tokens.grid[0] * tokens.grid[1]
        thumbnail_BK = _ops.best_first(scores_BN[:, :per_view])[:, : max(1, int(per_view * share))]
        ratios_BC = tile_ratios(
            scores_BN[:, :per_view], tokens.grid, tokens.tiles, share, self.temperature
        )
        tiles_BN, kept_B = _tiles_best_first(scores_BN, tokens.grid, tokens.tiles, ratios_BC)
        rows_BK = torch.cat([thumbnail_BK, tiles_BN[:, : int(kept_B.max())]], dim=1)
        positions_BK = rows_BK
        if self.placement == "faithful":
            released_N = _released_positions(tokens.grid, tokens.tiles).to(rows_BK.device)
            positions_BK = released_N[rows_BK]
        sizes_BK = torch.ones(rows_BK.shape, device=rows_BK.device)
        counts_B = kept_B + thumbnail_BK.shape[1]
        return _ops.collect(tokens.features, rows_BK, positions_BK, sizes_BK, counts_B)


def tile_ratios(
    scores_Bn: Tensor, grid: tuple[int, int], tiles: TileLayout, share: float, temperature: float
) -> Tensor:
    """Return (B, C) float64: the share of its tokens that each tile keeps, at most 1.

    Args:
        scores_Bn: attention of the thumbnail.
        grid: of a view.
        tiles: C of them.
        share: of all tokens, the mean of the result but for the cut at 1.
        temperature: of the softmax over the sums of attention that fall on each tile.
    """
    row_tiles_R, column_tiles_C = (
        (torch.arange(length) // max(1, length // count)).clamp_max(count - 1)
        for length, count in zip(grid, (tiles.rows, tiles.columns), strict=True)
    )
    owners_n = (row_tiles_R[:, None] * tiles.columns + column_tiles_C).flatten()
    sums_BC = scores_Bn.new_zeros(
        (len(scores_Bn), tiles.rows * tiles.columns), dtype=torch.float64
    ).scatter_add_(1, owners_n.to(scores_Bn.device).expand_as(scores_Bn), scores_Bn.double())
    powers_BC = ((sums_BC - sums_BC.amax(dim=1, keepdim=True)) / temperature).exp()
    weights_BC = powers_BC / (powers_BC.sum(dim=1, keepdim=True) + 1e-8)
    return (share * (1 + weights_BC - weights_BC.mean(dim=1, keepdim=True))).clamp_max(1)


def _tiles_best_first(
    scores_BN: Tensor, grid: tuple[int, int], tiles: TileLayout, ratios_BC: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (B, N) rows, those of tiles that stay first, best first; (B,) how many stay."""
    (rows, columns), (top, bottom, left, right) = grid, tiles.unpadded
    thumbnail_B1RC = scores_BN[:, : rows * columns].view(-1, 1, rows, columns)
    size = (bottom - top, right - left)
    image_BHW = functional.interpolate(thumbnail_B1RC, size, mode="bilinear").squeeze(1)
    blended_BN = torch.full_like(scores_BN, -torch.inf)
    for tile, cells_v in enumerate(_unpadded_cells(grid, tiles)):
        down_v = tile // tiles.columns * rows + cells_v // columns - top
        across_v = tile % tiles.columns * columns + cells_v % columns - left
        rows_v = (1 + tile) * rows * columns + cells_v
        blended_Bv = _unit(scores_BN[:, rows_v]) + _unit(image_BHW[:, down_v, across_v])
        counts_B1 = (len(cells_v) * ratios_BC[:, tile, None]).long()
        stays_Bv = _ops.inverse(_ops.best_first(blended_Bv)) < counts_B1
        blended_BN[:, rows_v] = blended_Bv.where(stays_Bv, -torch.inf)
    return _ops.best_first(blended_BN), blended_BN.isfinite().sum(dim=1)


def _unpadded_cells(grid: tuple[int, int], tiles: TileLayout) -> list[Tensor]:
    """Return, for each tile, those of its cells that see the image, in raster order."""
    (rows, columns), (top, bottom, left, right) = grid, tiles.unpadded
    inside_HW = torch.zeros(tiles.rows * rows, tiles.columns * columns, dtype=torch.bool)
    inside_HW[top:bottom, left:right] = True
    inside_Cn = inside_HW.view(tiles.rows, rows, tiles.columns, columns).transpose(1, 2)
    return [inside_n.nonzero()[:, 0] for inside_n in inside_Cn.reshape(-1, rows * columns)]


def _released_positions(grid: tuple[int, int], tiles: TileLayout) -> Tensor:
    """Return (N,) the position that the released code gives each token it may keep."""
    per_view = grid[0] * grid[1]
    positions_N = torch.arange((1 + tiles.rows * tiles.columns) * per_view)
    for tile, cells_v in enumerate(_unpadded_cells(grid, tiles)):
        start = (1 + tile) * per_view
        positions_N[start + cells_v] = start + torch.arange(len(cells_v))
    return positions_N


def _unit(values_BN: Tensor) -> Tensor:
    lengths_B1 = torch.linalg.vector_norm(values_BN, dim=1, keepdim=True)
    return values_BN / torch.where(lengths_B1 > 0, lengths_B1, 1)
