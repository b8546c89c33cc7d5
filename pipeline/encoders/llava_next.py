"""LLaVA-NeXT (1.6): a CLIP tower over a thumbnail and tiles of the image, and LLaVA's projector.

Source: H. Liu et al., LLaVA-NeXT, https://llava-vl.github.io/blog/2024-01-30-llava-next (AnyRes);
    the model class is transformers' `LlavaNextModel`. Put together with its embedding for the end
    of a row, and without padding, the tokens equal its `get_image_features`.
Signals: of the tower, each view by itself, from the attention of the layer that makes the selected
    features, of an early one and of the last one.
Differs: tokens that see only padding are kept apart, not dropped: `TileLayout.unpadded` says which.
    The tokens at the ends of rows are none of the image's, and are put in when it is read.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from pipeline.encoders._anyres_encoder import AnyresEncoder


@dataclass(kw_only=True)
class LlavaNext(AnyresEncoder):
    """Visual tokens of a LLaVA-NeXT model, view after view, before or after its projector.

    Attributes:
        stage: `pre_projector`, the tower's output, or `projected`, what the language model is fed.
    """

    stage: Literal["pre_projector", "projected"] = "projected"

    family: ClassVar[str] = "llava_next"
    processors: ClassVar[tuple[str, ...]] = ("LlavaNextImageProcessor",)
    settings: ClassVar[tuple[str, ...]] = (
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "projector_hidden_act",
        "multimodal_projector_bias",
        "image_grid_pinpoints",
    )

    def _make_projector(self) -> nn.Module:
        return LlavaNextMultiModalProjector(self._config)
