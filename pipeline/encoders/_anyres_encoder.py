"""What LLaVA-NeXT and LLaVA-OneVision share: a thumbnail of the image, and tiles of it."""

from dataclasses import dataclass

from pipeline.encoders._anyres import lay_out
from pipeline.encoders._base import Pixels
from pipeline.encoders._own_processor import views_of
from pipeline.encoders._tower_view_encoder import TowerViewEncoder
from pipeline.types import TileLayout


@dataclass(kw_only=True)
class AnyresEncoder(TowerViewEncoder):
    """An encoder that cuts images into tiles by the checkpoint's `image_grid_pinpoints`."""

    @property
    def _max_tiles(self) -> int | None:
        """See `lay_out`."""
        return None

    def _views(self, image: Pixels) -> tuple[list[Pixels], TileLayout | None]:
        pinpoints, vision = self._config.image_grid_pinpoints, self._config.vision_config
        outputs = self._processor(image, image_grid_pinpoints=pinpoints)
        tiles = lay_out(
            (image.shape[0], image.shape[1]),
            tuple((int(height), int(width)) for height, width in pinpoints),
            tile_pixels=vision.image_size,
            tile_tokens=vision.image_size // vision.patch_size,
            max_tiles=self._max_tiles,
        )
        return views_of(outputs["pixel_values"][0], model=self.model), tiles
