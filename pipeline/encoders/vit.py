"""A bare vision tower: CLIP, SigLIP (and SigLIP 2 of fixed size), DINOv2 with or without registers.

Source: A. Radford et al., arXiv 2103.00020 (CLIP); X. Zhai et al., arXiv 2303.15343 (SigLIP);
    M. Oquab et al., arXiv 2304.07193 (DINOv2); T. Darcet et al., arXiv 2309.16588 (registers); the
    model classes are those of transformers.
Signals: from the attention of the layer that makes the selected features, of an early one and of
    the last one.
Differs: DINOv3 and SigLIP 2 of native resolution are refused. Their attention is rotary or masked
    and their processors resize floats or pack patches; neither fits what this file promises.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.encoders._checkpoint_encoder import read_config
from pipeline.encoders._image_encoder import ImageEncoder, LoadedModel
from pipeline.encoders._tower import Tower, tower_keys
from pipeline.encoders._tower_plan import FAMILIES, TowerPlan, plan_tower
from pipeline.encoders._weights import Reads
from pipeline.errors import ConfigError

_PREFIXES = ("", "vision_model.", "dinov2.", "dinov2_with_registers.")
_WHOLE_MODELS = ("clip", "siglip")  # image and text; the tower is a part


@dataclass(kw_only=True)
class Vit(ImageEncoder):
    """Patch tokens of one hidden state of a bare tower, without class token and registers.

    Attributes:
        layer: index into transformers' `hidden_states`: 0 is the embeddings, i the output of the
            i-th layer, negative ones count from the last. The last one stands for the model's
            `last_hidden_state`: for SigLIP and DINOv2 that includes the final norm, for CLIP it
            does not (its norm is for the pooled output only).
        stage: there is no projector, so always `pre_projector`.
    """

    layer: int = -1
    stage: Literal["pre_projector"] = "pre_projector"

    @property
    def yields(self) -> frozenset[str]:
        """Attention signals; those of the class token only where there is one."""
        return self._plan.attention_signals

    @property
    def width(self) -> int:
        """Width of the tower."""
        return int(self._plan.config.hidden_size)

    def _read_plan(self) -> TowerPlan:
        settings = self._checkpoint.config
        kind = settings.get("model_type")
        if kind not in (*FAMILIES, *_WHOLE_MODELS):
            raise ConfigError(
                f"model {self.model!r} is a {kind!r}, not a vision tower this encoder knows: "
                f"{', '.join((*FAMILIES, *_WHOLE_MODELS))}"
            )
        config = read_config(settings, model=self.model)
        if kind in _WHOLE_MODELS:
            config = config.vision_config
        return plan_tower(
            config,
            [self.layer],
            final_norm=True,
            where="option 'layer'",
            shallow_layer=self.shallow_layer,
        )

    def _describe_numbers(self, signals: frozenset[str]) -> Mapping[str, Any]:
        return {"stage": self.stage, "layer": self._plan.states[0]}

    def _reads(self, signals: frozenset[str]) -> Reads:
        config = self._checkpoint.config
        return Reads(
            settings=config["vision_config"] if config["model_type"] in _WHOLE_MODELS else config,
            keys=tower_keys(self._plan, self._checkpoint, _PREFIXES, signals),
        )

    def _load_model(
        self, *, device: torch.device, dtype: torch.dtype, signals: frozenset[str]
    ) -> LoadedModel:
        tower = Tower(
            self._plan,
            self._checkpoint,
            prefixes=_PREFIXES,
            device=device,
            dtype=dtype,
            signals=signals,
        )
        first = self._plan.num_prefix

        def run(pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            (state_BTD,), found = tower(pixels_BCHW, first)
            return state_BTD[:, first:].contiguous(), found

        return run
