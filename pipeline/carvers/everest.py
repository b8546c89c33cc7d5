"""Keep the tokens that changed most since the frame before: the parts of a clip that move.

Source: Hwang et al., EVEREST: Efficient Masked Video Autoencoder by Removing Redundant
Spatiotemporal Tokens, arXiv 2211.10636; github.com/sunilhoho/EVEREST @ 8ebdd70, no licence.
Differs: the published code compares the patch embeddings of 8 tubelets before the position
embedding and trains the tower that goes on with the survivors; here the stored features of any
number of frames are compared, after a tower that saw all of them. Stored outputs of that code are
met exactly; how many tokens stay is the budget's matter, where the code rounds down. Equal changes
keep the lower position: the published code makes such ties, as frame 0 is scored like frame 1, and
leaves them to the sort. Choosing whole frames by how much happens in them is in the paper only, and
not here. One image, tiled or not, has no time: all its tokens tie, and they are kept coarse to fine
over the grid and its tiles, as `uniform_grid` does.
Needs: no signal; frames as the views of the tokens, in the order of time.
Cost: O(N D) per clip.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.carvers import _ops
from pipeline.carvers._base import SelectionCarver
from pipeline.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Everest(SelectionCarver):
    """Rank the tokens of all frames together by their distance to the same cell one frame back.

    Args:
        first_frame: what frame 0, which has none before it, is worth. `faithful`: the same as
            frame 1, cell by cell. `keep`: more than all others, so that the clip starts with a
            whole picture; a budget smaller than a frame keeps it coarse to fine.
    """

    first_frame: Literal["faithful", "keep"] = "faithful"

    def select(self, tokens: VisualTokens, num_kept: int) -> Tensor:
        """Return the positions of the most changed tokens of each clip, best first."""
        if tokens.num_views == 1 or tokens.tiles is not None:
            order_BN = _ops.spread_order(tokens.grid, tokens.features, tokens.num_views)
            return order_BN[:, :num_kept]
        changes_BN = changes(tokens)
        if self.first_frame == "faithful":
            return _ops.best_first(changes_BN)[:, :num_kept]
        cells_BC = _ops.spread_order(tokens.grid, tokens.features)
        num_cells = cells_BC.shape[1]
        later_BN = _ops.best_first(changes_BN[:, num_cells:]) + num_cells
        return torch.cat([cells_BC, later_BN], dim=1)[:, :num_kept]


def changes(tokens: VisualTokens) -> Tensor:
    """Return the (B, N) distance of each token to the same cell one frame back.

    Frame 0 has the values of frame 1. There must be two frames or more.
    """
    num_images, _, width = tokens.features.shape
    frames_BTCD = tokens.features.reshape(num_images, tokens.num_views, -1, width).float()
    distances_BTC = torch.linalg.vector_norm(frames_BTCD.diff(dim=1), dim=3)
    return torch.cat([distances_BTC[:, :1], distances_BTC], dim=1).flatten(1)
