"""SigLIP 2 of native resolution (NaFlex): any proportions, up to a number of patches.

Source: M. Tschannen et al., SigLIP 2, arXiv 2502.14786; the model class is transformers'
    `Siglip2VisionModel`, whose `last_hidden_state` this equals. SigLIP 2 of fixed size is a SigLIP
    to transformers: use the encoder `vit`.
Signals: of the tower's last layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    get_image_size_for_max_num_patches,
)

from pipeline.encoders._base import Pixels
from pipeline.encoders._own_model_encoder import OwnModelEncoder
from pipeline.encoders._own_modules import build_model
from pipeline.encoders._resize import RESIZERS
from pipeline.encoders._signals import AttentionProbe, map_names
from pipeline.encoders._view_encoder import LoadedViews
from pipeline.types import TileLayout

_OUTER = ("", "vision_model.", "vision_model.vision_model.")


@dataclass(kw_only=True)
class Siglip2(OwnModelEncoder):
    """Patch tokens of the last layer of a SigLIP 2 tower, behind its norm.

    Attributes:
        stage: there is no projector, so always `pre_projector`.
    """

    stage: Literal["pre_projector"] = "pre_projector"

    models: ClassVar[Mapping[str, str]] = {
        "siglip2": "Siglip2VisionModel",
        "siglip2_vision_model": "Siglip2VisionModel",
    }
    processors: ClassVar[tuple[str, ...]] = ("Siglip2ImageProcessor",)
    prefixes: ClassVar[Mapping[str, Sequence[str]]] = {
        part: tuple(f"{outer}{part}." for outer in _OUTER)
        for part in ("embeddings", "encoder", "post_layernorm")
    }

    @property
    def width(self) -> int:
        """Width of the tower."""
        return int(self._vision.hidden_size)

    @property
    def _vision(self) -> Any:  # noqa: ANN401
        return getattr(self._config, "vision_config", self._config)

    def _used_settings(self) -> Mapping[str, Any]:
        found = self._checkpoint.config
        return found.get("vision_config", found)

    def _describe_options(self, signals: frozenset[str]) -> Mapping[str, Any]:
        return {"stage": self.stage, "resize": self.resize}

    def _build(self) -> nn.Module:
        config = type(self._vision).from_dict({**self._vision.to_dict(), "vision_use_head": False})
        return build_model(lambda: transformers.Siglip2VisionModel(config))

    def _view_grid(self, rows: int, columns: int) -> tuple[int, int]:
        edge = self._vision.patch_size
        return rows // edge, columns // edge

    def _views(self, image: Pixels) -> tuple[list[Pixels], TileLayout | None]:
        own, size = self._processor.own, image.shape[:2]
        if own.do_resize:
            size = get_image_size_for_max_num_patches(
                *size, patch_size=own.patch_size, max_num_patches=own.max_num_patches
            )
        if size != image.shape[:2]:
            image = RESIZERS[self.resize](image, size, int(own.resample), None)
        return [np.ascontiguousarray(image)], None

    def _run(self, model: Any, signals: frozenset[str]) -> LoadedViews:  # noqa: ANN401
        probe = AttentionProbe(
            model.encoder.layers[-1].self_attn,
            names=map_names(output="out_proj"),
            num_heads=self._vision.num_attention_heads,
            has_class=False,
            signals=signals,
        )

        def run(pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            rows, columns = grid = self._view_grid(*pixels_BCHW.shape[2:])
            edge, count = self._vision.patch_size, len(pixels_BCHW)
            squares = pixels_BCHW.reshape(count, -1, rows, edge, columns, edge)
            patches_BNX = squares.permute(0, 2, 4, 3, 5, 1).reshape(count, rows * columns, -1)
            # Images of one size: nothing is padded, so nothing is masked.
            found = model(
                patches_BNX,
                pixel_attention_mask=torch.ones(patches_BNX.shape[:2], device=patches_BNX.device),
                spatial_shapes=torch.tensor([grid] * count, device=patches_BNX.device),
            )
            return found.last_hidden_state, probe.take(0)

        return run
