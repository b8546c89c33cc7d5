"""Gemma 3: a SigLIP tower of fixed size, and a projector that averages squares of patches.

Source: Gemma Team, Gemma 3 Technical Report, arXiv 2503.19786; the model class is transformers'
    `Gemma3Model`, whose `get_image_features` this equals.
Signals: of the tower, from the attention of its last layer and of an early one; attention is summed
    over the patches of a token, everything else is averaged (`_merge_units.py`).
Differs: pan and scan, which shows elongated images again in crops, is refused. It is off by
    default, and its crops are images of their own in the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

from pipeline.encoders._base import Pixels
from pipeline.encoders._own_processor import views_of
from pipeline.encoders._tower_view_encoder import TowerViewEncoder
from pipeline.errors import ConfigError


@dataclass(kw_only=True)
class Gemma3(TowerViewEncoder):
    """Visual tokens of a Gemma 3 model, as its language model is fed them: 16 x 16 as published.

    Attributes:
        stage: always `projected`: the projector makes one token of several patches.
    """

    stage: Literal["projected"] = "projected"

    family: ClassVar[str] = "gemma3"
    processors: ClassVar[tuple[str, ...]] = ("Gemma3ImageProcessor",)
    settings: ClassVar[tuple[str, ...]] = ("mm_tokens_per_image",)

    @property
    def _layers(self) -> tuple[Sequence[int], bool]:
        return [-1], True

    @property
    def _first_token(self) -> int:
        return 0

    @property
    def _unit(self) -> int:
        vision = self._config.vision_config
        edge = vision.image_size // vision.patch_size
        return int(edge // round(self._config.mm_tokens_per_image**0.5))

    def _make_projector(self) -> nn.Module:
        return Gemma3MultiModalProjector(self._config)

    def _check_model(self) -> None:
        super()._check_model()
        if self._processor.own.do_pan_and_scan:
            raise ConfigError(
                f"model {self.model!r}: do_pan_and_scan is on in preprocessor_config.json, and its "
                "crops cannot be stored with the image; set it to false"
            )

    def _views(self, image: Pixels) -> tuple[list[Pixels], None]:
        return views_of(self._processor(image)["pixel_values"], model=self.model), None
