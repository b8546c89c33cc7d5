"""Idefics3 and SmolVLM: a SigLIP tower over tiles of the image, pixel shuffle, a projector.

Source: H. Laurençon et al., Building and better understanding vision-language models, arXiv
    2408.12637 (Idefics3); A. Marafioti et al., SmolVLM, arXiv 2504.05299; the model classes are
    transformers' `Idefics3Model` and `SmolVLMModel`, whose `get_image_features` this equals.
Signals: of the tower's last layer, each view by itself; attention is summed over the patches of a
    token, everything else is averaged (`_merge_units.py`).
Differs: the view of the whole image stands first here and last in the model's prompt, where it is
    put when it is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from pipeline.encoders._base import Pixels
from pipeline.encoders._merge_units import merge_signals
from pipeline.encoders._own_model_encoder import OwnModelEncoder
from pipeline.encoders._own_processor import views_of
from pipeline.encoders._signals import AttentionProbe, map_names
from pipeline.encoders._view_encoder import LoadedViews
from pipeline.types import TileLayout


@dataclass(kw_only=True)
class Idefics3(OwnModelEncoder):
    """Visual tokens of an Idefics3 or SmolVLM model, as its language model is fed them.

    Attributes:
        stage: always `projected`: the model makes one token of several patches before it projects.
    """

    stage: Literal["projected"] = "projected"

    models: ClassVar[Mapping[str, str]] = {"idefics3": "Idefics3Model", "smolvlm": "SmolVLMModel"}
    language: ClassVar[str] = "text_model"
    processors: ClassVar[tuple[str, ...]] = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
    prefixes: ClassVar[Mapping[str, Sequence[str]]] = {
        "vision_model": ("model.vision_model.", "vision_model."),
        "connector": ("model.connector.", "connector."),
    }
    settings: ClassVar[tuple[str, ...]] = ("scale_factor",)

    @property
    def _unit(self) -> int:
        return int(self._config.scale_factor)

    def _patches(self, rows: int, columns: int) -> tuple[int, int]:
        edge = self._config.vision_config.patch_size
        return rows // edge, columns // edge

    def _view_grid(self, rows: int, columns: int) -> tuple[int, int]:
        height, width = self._patches(rows, columns)
        return height // self._unit, width // self._unit

    def _views(self, image: Pixels) -> tuple[list[Pixels], TileLayout | None]:
        outputs = self._processor(image, return_row_col_info=True)
        views = views_of(outputs["pixel_values"][0], model=self.model)
        rows, columns = outputs["rows"][0][0], outputs["cols"][0][0]
        if len(views) == 1:
            return views, None
        height, width = self._view_grid(*views[0].shape[:2])
        unpadded = (0, rows * height, 0, columns * width)
        return [views[-1], *views[:-1]], TileLayout(rows=rows, columns=columns, unpadded=unpadded)

    def _run(self, model: Any, signals: frozenset[str]) -> LoadedViews:  # noqa: ANN401
        probe = AttentionProbe(
            model.vision_model.encoder.layers[-1].self_attn,
            names=map_names(output="out_proj"),
            num_heads=self._config.vision_config.num_attention_heads,
            has_class=False,
            signals=signals,
        )

        def run(pixels_VCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            (rows_ND,) = model.get_image_features(pixels_VCHW[None]).pooler_output
            features_VnD = rows_ND.view(len(pixels_VCHW), -1, rows_ND.shape[-1])
            grid = self._patches(*pixels_VCHW.shape[2:])
            return features_VnD, merge_signals(probe.take(0), grid, self._unit)

        return run
