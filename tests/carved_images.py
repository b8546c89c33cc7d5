"""Images as a cache gives them, and a cache of them, made in code for the tests of consumers."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline import codecs
from pipeline.cache.commit import claim_identity
from pipeline.cache.writer import RowToWrite
from pipeline.carved_cache import CachedImage, CarvedCache, open_cache
from pipeline.storage import open_store
from pipeline.types import TileLayout
from tests.cache.rows import IDENTITY, SETTINGS, commit_rows

CODEC = codecs.build("fp32")


def make_image(
    key: str,
    *,
    grid: tuple[int, int, int] = (1, 4, 6),
    positions: Sequence[int] | None = None,
    width: int = 64,
    seed: int = 0,
    tiles: TileLayout | None = None,
) -> CachedImage:
    """Return an image whose ranks run against its positions; all positions where none are given."""
    kept = (
        torch.arange(grid[0] * grid[1] * grid[2]) if positions is None else torch.tensor(positions)
    )
    return CachedImage(
        key=key,
        features=torch.randn(len(kept), width, generator=torch.Generator().manual_seed(seed)),
        positions=kept,
        sizes=torch.ones(len(kept)),
        ranks=torch.arange(len(kept)).flip(0),
        grid=grid,
        width=64,
        height=48,
        tiles=tiles,
    )


def make_cache(url: str, images: Sequence[CachedImage]) -> CarvedCache:
    """Return a cache that holds these images, all of one width."""
    settings = {
        **SETTINGS,
        "codec": {"name": "fp32", "options": {}},
        "width": images[0].features.shape[1],
    }
    store = open_store(url)
    claim_identity(store, {**IDENTITY, "settings": settings})
    commit_rows(store, "a", [_row(image) for image in images])
    return open_cache(url)


def _row(image: CachedImage) -> RowToWrite:
    order = image.ranks.argsort()  # rows lie most important token first
    features: Tensor = image.features[order]
    return RowToWrite(
        key=image.key,
        content_hash=bytes(16),
        packed=CODEC.pack(features),
        positions=image.positions[order].numpy().astype(np.uint32),
        sizes=image.sizes[order].numpy(),
        grid=image.grid,
        image_size=(image.width, image.height),
        tiles=image.tiles,
        columns={"txt": None},
    )
