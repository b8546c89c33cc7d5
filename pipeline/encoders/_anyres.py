"""How LLaVA's AnyRes models lay out the tiles of an image.

Source: transformers 5.23, `LlavaNextModel.pack_image_features` and
    `LlavaOnevisionModel.pack_image_features`, whose own functions decide the tiles and the padding.
"""

import functools
import math

import torch
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from pipeline.errors import EncodeError
from pipeline.types import TileLayout


@functools.lru_cache(maxsize=4096)
def lay_out(
    image_size: tuple[int, int],
    pinpoints: tuple[tuple[int, int], ...],
    *,
    tile_pixels: int,
    tile_tokens: int,
    max_tiles: int | None = None,
) -> TileLayout:
    """Return how the views of an image lie.

    Args:
        image_size: height, width in pixels.
        pinpoints: heights and widths of the canvases that may be chosen.
        tile_pixels: edge of a tile.
        tile_tokens: edge of its grid of tokens.
        max_tiles: a canvas of more tokens than 1.21 times those of so many tiles is resampled;
            None for never.

    Raises:
        EncodeError: the image is so elongated that none of its tiles' tokens would be left.
    """
    rows, columns = get_anyres_image_grid_shape(
        image_size, [list(p) for p in pinpoints], tile_pixels
    )
    height, width = rows * tile_tokens, columns * tile_tokens
    axes = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    kept = unpad_image(torch.stack(axes), image_size)
    if not kept.numel():
        size = f"{image_size[1]} x {image_size[0]} pixels"
        raise EncodeError(
            f"image of {size} is too elongated: on a canvas of {columns} x {rows} tiles it is less "
            "than one token high or wide",
            key="",
            reason="too_elongated",
        )
    (top, left), (bottom, right) = kept[:, 0, 0].tolist(), kept[:, -1, -1].tolist()
    unpadded = (top, bottom + 1, left, right + 1)
    return TileLayout(
        rows=rows,
        columns=columns,
        unpadded=unpadded,
        canvas=_resampled(kept.shape[1], kept.shape[2], tile_tokens, max_tiles),
    )


def _resampled(
    height: int, width: int, tile_tokens: int, max_tiles: int | None
) -> tuple[int, int] | None:
    if max_tiles is None:
        return None
    ratio = math.sqrt(height * width / (max_tiles * tile_tokens**2))
    return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else None
