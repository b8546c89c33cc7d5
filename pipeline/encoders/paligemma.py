"""PaliGemma 1 and 2: a SigLIP tower of fixed size and a linear projector.

Source: L. Beyer et al., PaliGemma, arXiv 2407.07726; A. Steiner et al., PaliGemma 2, arXiv
    2412.03555; the model class is transformers' `PaliGemmaModel`, whose `get_image_features` this
    equals.
Signals: of the tower, from the attention of its last layer and of an early one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector

from pipeline.encoders._base import Pixels
from pipeline.encoders._own_processor import views_of
from pipeline.encoders._tower_view_encoder import TowerViewEncoder


@dataclass(kw_only=True)
class Paligemma(TowerViewEncoder):
    """Visual tokens of a PaliGemma model, before or after its projector.

    Attributes:
        stage: `pre_projector`, the tower's output, or `projected`, what the language model is fed.
    """

    stage: Literal["pre_projector", "projected"] = "projected"

    family: ClassVar[str] = "paligemma"
    processors: ClassVar[tuple[str, ...]] = ("SiglipImageProcessor",)
    settings: ClassVar[tuple[str, ...]] = ()

    @property
    def _layers(self) -> tuple[Sequence[int], bool]:
        return [-1], True

    @property
    def _first_token(self) -> int:
        return 0

    def _make_projector(self) -> nn.Module:
        return PaliGemmaMultiModalProjector(self._config)

    def _views(self, image: Pixels) -> tuple[list[Pixels], None]:
        return views_of(self._processor(image)["pixel_values"], model=self.model), None
