"""LLaVA-OneVision: a SigLIP tower over a thumbnail and tiles of the image, and LLaVA's projector.

Source: B. Li et al., LLaVA-OneVision, arXiv 2408.03326; the model class is transformers'
    `LlavaOnevisionModel`. Put together with its embedding for the end of a row, and without
    padding, the tokens equal its `get_image_features` for prompts of one image.
Signals: of the tower, each view by itself, from the attention of the layer that makes the selected
    features, of an early one and of the last one.
Differs: as for `llava_next`. Large canvases are resampled to fewer tokens, bilinearly, as the model
    does it (`anyres_max_N`); signals are resampled in the same way.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionMultiModalProjector,
)

from pipeline.encoders._anyres_encoder import AnyresEncoder
from pipeline.errors import ConfigError
from pipeline.types import TileLayout


@dataclass(kw_only=True)
class LlavaOnevision(AnyresEncoder):
    """Visual tokens of a LLaVA-OneVision model, as its language model is fed them.

    Attributes:
        stage: always `projected`: the model resamples tokens after projecting them.
    """

    stage: Literal["projected"] = "projected"

    family: ClassVar[str] = "llava_onevision"
    processors: ClassVar[tuple[str, ...]] = ("LlavaOnevisionImageProcessor",)
    settings: ClassVar[tuple[str, ...]] = (
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "vision_aspect_ratio",
        "projector_hidden_act",
        "multimodal_projector_bias",
        "image_grid_pinpoints",
    )

    @property
    def _max_tiles(self) -> int:
        ratio = str(self._config.vision_aspect_ratio)
        number = ratio.removeprefix("anyres_max_")
        if not number.isdigit():
            raise ConfigError(
                f"model {self.model!r} has vision_aspect_ratio {ratio!r}; known: anyres_max_N"
            )
        return int(number)

    def _make_projector(self) -> nn.Module:
        return LlavaOnevisionMultiModalProjector(self._config)

    def _arrange(self, features_BVnD: Tensor, tiles: TileLayout | None) -> Tensor:
        if tiles is None or tiles.canvas is None:
            return features_BVnD.flatten(1, 2)
        edge = round(features_BVnD.shape[2] ** 0.5)
        count, width = len(features_BVnD), features_BVnD.shape[-1]
        squares = features_BVnD[:, 1:].reshape(count, tiles.rows, tiles.columns, edge, edge, width)
        canvas_BDHW = squares.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        top, bottom, left, right = tiles.unpadded
        resampled_BDHW = nn.functional.interpolate(
            canvas_BDHW[:, :, top:bottom, left:right], list(tiles.canvas), mode="bilinear"
        )
        rows_BND = resampled_BDHW.flatten(2).transpose(1, 2)
        return torch.cat([features_BVnD[:, 0], rows_BND], dim=1)
