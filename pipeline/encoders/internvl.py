"""InternVL 2.5, 3, 3.5 in transformers' format: InternViT over tiles, pixel shuffle, a projector.

Source: J. Zhu et al., InternVL3, arXiv 2504.10479; the model class is transformers'
    `InternVLModel`, whose `get_image_features` this equals, view by view.
Signals: of the tower's last layer, each view by itself; those of the class token are given too.
    Attention is summed over the four patches of a token, everything else is averaged
    (`_merge_units.py`).
Differs: the thumbnail stands first here and last in the model's prompt, where it is put when it is
    read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from pipeline.encoders._base import Pixels
from pipeline.encoders._merge_units import merge_signals
from pipeline.encoders._own_model_encoder import OwnModelEncoder
from pipeline.encoders._own_processor import views_of
from pipeline.encoders._signals import AttentionProbe, map_names
from pipeline.encoders._view_encoder import LoadedViews
from pipeline.errors import ConfigError
from pipeline.types import TileLayout


@dataclass(kw_only=True)
class Internvl(OwnModelEncoder):
    """Visual tokens of an InternVL model, view after view, as its language model is fed them.

    Attributes:
        stage: always `projected`: the model makes one token of four patches before it projects.
    """

    stage: Literal["projected"] = "projected"

    models: ClassVar[Mapping[str, str]] = {"internvl": "InternVLModel"}
    processors: ClassVar[tuple[str, ...]] = ("GotOcr2ImageProcessor",)
    prefixes: ClassVar[Mapping[str, Sequence[str]]] = {
        "vision_tower": ("model.vision_tower.", "vision_tower."),
        "multi_modal_projector": ("model.multi_modal_projector.", "multi_modal_projector."),
    }
    settings: ClassVar[tuple[str, ...]] = (
        "downsample_ratio",
        "projector_hidden_act",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )
    signals: ClassVar[frozenset[str]] = OwnModelEncoder.signals | {"cls_attention"}

    def _check_model(self) -> None:
        super()._check_model()
        config = self._config
        given = config.vision_feature_layer, config.vision_feature_select_strategy
        if given != (-1, "default"):
            raise ConfigError(
                f"model {self.model!r} has vision_feature_layer {given[0]!r} and "
                f"vision_feature_select_strategy {given[1]!r}; known: -1 and 'default'"
            )

    def _patches(self, rows: int, columns: int) -> tuple[int, int]:
        height, width = self._config.vision_config.patch_size
        return rows // height, columns // width

    @property
    def _unit(self) -> int:
        return round(1 / self._config.downsample_ratio)

    def _view_grid(self, rows: int, columns: int) -> tuple[int, int]:
        height, width = self._patches(rows, columns)
        return height // self._unit, width // self._unit

    def _views(self, image: Pixels) -> tuple[list[Pixels], TileLayout | None]:
        # What the model's processor asks of its image processor, whatever that one's own default.
        outputs = self._processor(image, crop_to_patches=True)
        views = views_of(outputs["pixel_values"], model=self.model)
        if len(views) == 1:
            return views, None
        own = self._processor.own
        columns, rows = get_optimal_tiled_canvas(
            image.shape[:2], views[0].shape[:2], own.min_patches, own.max_patches
        )
        height, width = self._view_grid(*views[0].shape[:2])
        tiles = TileLayout(
            rows=rows, columns=columns, unpadded=(0, rows * height, 0, columns * width)
        )
        return [views[-1], *views[:-1]], tiles

    def _run(self, model: Any, signals: frozenset[str]) -> LoadedViews:  # noqa: ANN401
        attention = model.vision_tower.encoder.layer[-1].attention
        vision = self._config.vision_config
        queries, keys = ("q_norm", "k_norm") if vision.use_qk_norm else ("q_proj", "k_proj")
        probe = AttentionProbe(
            attention,
            names=map_names(output="projection_layer", queries=queries, keys=keys),
            num_heads=vision.num_attention_heads,
            has_class=True,
            signals=signals,
        )

        def run(pixels_VCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            features_VnD = model.get_image_features(pixels_VCHW).pooler_output
            grid = self._patches(*pixels_VCHW.shape[2:])
            return features_VnD, merge_signals(probe.take(1), grid, self._unit)

        return run
