"""Keep every token: the reference that every other carver is measured against.

Source: none; the uncompressed model.
Differs: from storing raster order, ranks run coarse to fine over the grid, so that a reader that
asks for a prefix gets an evenly spread sample (the one `uniform_grid` keeps), not the top rows.
Needs: no signal.
Cost: one copy.
"""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.carvers import _ops
from pipeline.carvers._base import Carver
from pipeline.types import CarvedTokens, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Identity(Carver):
    """Keep all N tokens unchanged; takes no budget."""

    conserves: ClassVar[bool] = True

    def _carve(self, tokens: VisualTokens) -> list[CarvedTokens]:
        order_BN = _ops.spread_order(tokens.grid, tokens.features, tokens.num_views)
        return _ops.keep(tokens.features, order_BN)
