"""LLaVA-1.5 and its relatives: a CLIP or SigLIP tower, a projector, a Llama-like language model.

Source: H. Liu et al., Improved Baselines with Visual Instruction Tuning, arXiv 2310.03744; the
    model class is transformers' `LlavaModel`, whose `get_image_features` this equals.
Signals: of the tower, from the attention of the layer that makes the selected features (the
    deepest, where several are selected), of an early one and of the last one; of the projector, its
    gain; of the language model, from its first `llm_layers` layers under a fixed prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from pipeline.encoders._checkpoint_encoder import read_config
from pipeline.encoders._image_encoder import ImageEncoder, LoadedModel
from pipeline.encoders._llm_prefix import (
    LLM_SIGNALS,
    LlmPrefix,
    llm_reads,
    llm_signals,
    tokenize_prompt,
)
from pipeline.encoders._sensitivity import ProjectorSensitivity
from pipeline.encoders._tower import Tower, tower_keys
from pipeline.encoders._tower_plan import TowerPlan, plan_tower
from pipeline.encoders._weights import Checkpoint, Reads, Source, fill, locate
from pipeline.errors import ConfigError

_TOWERS = ("clip_vision_model", "siglip_vision_model")
_TOWER_PREFIXES = tuple(
    outer + inner
    for outer in ("model.vision_tower.", "vision_tower.")
    for inner in ("vision_model.", "")
)
# What is read of config.json, by the part that reads it.
_TOWER_SETTINGS = ("vision_config", "vision_feature_layer", "vision_feature_select_strategy")
_PROJECTOR_SETTINGS = ("projector_hidden_act", "multimodal_projector_bias")
_LLM_SETTINGS = ("text_config",)
_PROJECTOR_SIGNALS = frozenset({"projector_sensitivity"})
_PROJECTOR_PREFIXES = ("model.multi_modal_projector.", "multi_modal_projector.")


@dataclass(kw_only=True)
class Llava(ImageEncoder):
    """Visual tokens of a LLaVA model, before or after its projector.

    Which hidden states of the tower are the features, and whether the first token is dropped, are
    the checkpoint's own `vision_feature_layer` and `vision_feature_select_strategy`. Signals stand
    for exactly the tokens of the features. With `full` and a CLIP tower the class token is one of
    them, and with `default` a SigLIP tower loses its first patch: then the tokens fill no
    rectangle and the grid is (1, N).

    Attributes:
        stage: `pre_projector`, the tower's output, or `projected`, what the language model is fed.
        llm_layers: K >= 1, the decoder layers that run for the signals `llm_hidden` and
            `llm_attention`; with other signals no part of the language model is loaded.
        prompt: what those layers see beside the image; holds the image token once.
    """

    stage: Literal["pre_projector", "projected"] = "pre_projector"
    llm_layers: int = 2
    prompt: str = "USER: <image>\nDescribe the image in detail. ASSISTANT:"

    def __post_init__(self) -> None:
        """Check the options that need no model."""
        super().__post_init__()
        if self.llm_layers < 1:
            raise ConfigError(f"llm_layers must be at least 1, got {self.llm_layers}")

    @property
    def yields(self) -> frozenset[str]:
        """The tower's and the projector's, and the language model's where its kind is known."""
        of_llm = llm_signals(self._config.text_config, self.llm_layers)
        return self._plan.attention_signals | _PROJECTOR_SIGNALS | of_llm

    @property
    def width(self) -> int:
        """Width of the language model if projected, else of the tower per selected layer."""
        if self.stage == "projected":
            return int(self._config.text_config.hidden_size)
        return int(self._plan.config.hidden_size) * len(self._plan.states)

    @cached_property
    def _config(self) -> Any:  # noqa: ANN401
        settings = self._checkpoint.config
        if settings.get("model_type") != "llava":
            raise ConfigError(
                f"model {self.model!r} is a {settings.get('model_type')!r}, not a 'llava'; for a "
                "bare tower use the encoder 'vit'"
            )
        return read_config(settings, model=self.model)

    @property
    def _first_token(self) -> int:
        return 1 if self._config.vision_feature_select_strategy == "default" else 0

    def _read_plan(self) -> TowerPlan:
        config = self._config
        if config.vision_config.model_type not in _TOWERS:
            raise ConfigError(
                f"model {self.model!r} has a tower of type {config.vision_config.model_type!r}; "
                f"known: {', '.join(_TOWERS)}"
            )
        layers = config.vision_feature_layer
        return plan_tower(
            config.vision_config,
            [layers] if isinstance(layers, int) else layers,
            final_norm=False,
            where="vision_feature_layer",
            shallow_layer=self.shallow_layer,
        )

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self._plan.grid(height, width)
        if self._first_token == self._plan.num_prefix:
            return rows, columns
        return 1, rows * columns + self._plan.num_prefix - self._first_token

    def _describe_numbers(self, signals: frozenset[str]) -> Mapping[str, Any]:
        if signals & LLM_SIGNALS:
            return {"stage": self.stage, "llm_layers": self.llm_layers, "prompt": self.prompt}
        return {"stage": self.stage}

    def _reads(self, signals: frozenset[str]) -> Reads:
        config, checkpoint = self._config, self._checkpoint
        used = set(_TOWER_SETTINGS)
        of_tower = signals & self._plan.attention_signals
        keys = tower_keys(self._plan, checkpoint, _TOWER_PREFIXES, of_tower)
        rows: Mapping[str, Sequence[int]] = {}
        if self._needs_projector(signals):
            used |= {*_PROJECTOR_SETTINGS}
            sources = _projector_sources(_projector(config), checkpoint)
            keys |= {source.key for source in sources.values()}
        if signals & LLM_SIGNALS:
            used |= {*_LLM_SETTINGS}
            # The ids stand for the tokenizer: nothing else of it is used.
            ids, _ = tokenize_prompt(checkpoint, self.prompt, config.image_token_id)
            llm_keys, rows = llm_reads(
                config.text_config, checkpoint, num_layers=self.llm_layers, ids=ids
            )
            keys |= llm_keys
        settings = {k: v for k, v in checkpoint.config.items() if k in used}
        return Reads(settings=settings, keys=keys, rows=rows)

    def _runs_projector(self, signals: frozenset[str]) -> bool:
        return self.stage == "projected" or bool(signals & LLM_SIGNALS)

    def _needs_projector(self, signals: frozenset[str]) -> bool:
        return self._runs_projector(signals) or bool(signals & _PROJECTOR_SIGNALS)

    def _load_model(
        self, *, device: torch.device, dtype: torch.dtype, signals: frozenset[str]
    ) -> LoadedModel:
        config, checkpoint = self._config, self._checkpoint
        tower = Tower(
            self._plan,
            checkpoint,
            prefixes=_TOWER_PREFIXES,
            device=device,
            dtype=dtype,
            signals=signals & self._plan.attention_signals,
        )
        projector = llm = sensitivity = None
        if self._needs_projector(signals):
            projector = _projector(config)
            sources = _projector_sources(projector, checkpoint)
            fill(projector, checkpoint, sources, device=device, dtype=dtype)
            if signals & _PROJECTOR_SIGNALS:
                sensitivity = ProjectorSensitivity(projector)
            if not self._runs_projector(signals):
                projector = None
        if signals & LLM_SIGNALS:
            llm = LlmPrefix(
                config.text_config,
                checkpoint,
                num_layers=self.llm_layers,
                prompt=tokenize_prompt(checkpoint, self.prompt, config.image_token_id),
                device=device,
                dtype=dtype,
            )
        return _LoadedLlava(
            tower=tower,
            first_token=self._first_token,
            projector=projector,
            llm=llm,
            sensitivity=sensitivity,
            signals=signals,
            gives_projected=self.stage == "projected",
        )


@dataclass(frozen=True, kw_only=True)
class _LoadedLlava:
    """The weights, and the way through them."""

    tower: Tower
    first_token: int
    projector: nn.Module | None
    llm: LlmPrefix | None
    sensitivity: ProjectorSensitivity | None
    signals: frozenset[str]
    gives_projected: bool

    def __call__(self, pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        states, signals = self.tower(pixels_BCHW, self.first_token)
        features_BND = torch.cat([state_BTD[:, self.first_token :] for state_BTD in states], dim=-1)
        if self.sensitivity is not None:
            signals["projector_sensitivity"] = self.sensitivity(features_BND)
        if self.projector is None:
            return features_BND, signals
        projected_BND = self.projector(features_BND)
        if self.llm is not None:
            signals |= self.llm(projected_BND, self.signals)
        return (projected_BND if self.gives_projected else features_BND), signals


def _projector(config: Any) -> nn.Module:  # noqa: ANN401
    """Build the projector without memory for its weights."""
    with torch.device("meta"):
        projector: nn.Module = LlavaMultiModalProjector(config)
    return projector


def _projector_sources(projector: nn.Module, checkpoint: Checkpoint) -> dict[str, Source]:
    names = [name for name, _ in projector.named_parameters()]
    return locate(checkpoint, names, prefixes=_PROJECTOR_PREFIXES)
