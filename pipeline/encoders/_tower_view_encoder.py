"""What families share that are a CLIP or SigLIP tower, a projector, and rules for views."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pipeline.encoders._checkpoint_encoder import read_config
from pipeline.encoders._merge_units import merge_signals
from pipeline.encoders._own_modules import build_model, fill_parts, part_sources
from pipeline.encoders._signals import SHALLOW_SIGNALS
from pipeline.encoders._tower import Tower, tower_keys
from pipeline.encoders._tower_plan import TowerPlan, plan_tower
from pipeline.encoders._view_encoder import LoadedViews, ViewEncoder
from pipeline.encoders._weights import Reads
from pipeline.errors import ConfigError

PROJECTOR = "multi_modal_projector"
_TOWERS = ("clip_vision_model", "siglip_vision_model")
_TOWER_PREFIXES = tuple(
    outer + inner
    for outer in ("model.vision_tower.", "vision_tower.", "vision_model.", "model.vision_model.")
    for inner in ("vision_model.", "")
)
_PREFIXES: Mapping[str, Sequence[str]] = {PROJECTOR: (f"model.{PROJECTOR}.", f"{PROJECTOR}.")}


@dataclass(kw_only=True)
class TowerViewEncoder(ViewEncoder):
    """An encoder with one tower and one projector, and the family's own views.

    Attributes:
        stage: `pre_projector`, the tower's output, or `projected`, what the language model is fed.
        shallow_layer: see the encoder `llava`.
    """

    stage: Literal["pre_projector", "projected"] = "projected"
    shallow_layer: int | None = None

    family: ClassVar[str]
    """`model_type` of its checkpoints."""
    settings: ClassVar[tuple[str, ...]]
    """What of config.json decides the numbers, beside the tower."""

    @abstractmethod
    def _make_projector(self) -> nn.Module:
        """Build the projector."""

    @property
    def _layers(self) -> tuple[Sequence[int], bool]:
        """Hidden states of the tower that are the features, and whether the last is normed."""
        layers = self._config.vision_feature_layer
        return ([layers] if isinstance(layers, int) else layers), False

    @property
    def _first_token(self) -> int:
        return 1 if self._config.vision_feature_select_strategy == "default" else 0

    @property
    def _projects(self) -> bool:
        return self.stage == "projected"

    @property
    def _unit(self) -> int:
        """Edge of the square of patches that becomes one token."""
        return 1

    @property
    def yields(self) -> frozenset[str]:
        """Attention signals of the tower; those of the class token only where there is one."""
        given = self._plan.attention_signals
        return given - {"attention_flow"} if self._unit > 1 else given

    @property
    def width(self) -> int:
        """Width of the language model if projected, else of the tower per selected layer."""
        if self._projects:
            return int(self._config.get_text_config().hidden_size)
        return int(self._plan.config.hidden_size) * len(self._plan.states)

    @cached_property
    def _config(self) -> Any:  # noqa: ANN401
        found = self._checkpoint.config
        if found.get("model_type") != self.family:
            raise ConfigError(
                f"model {self.model!r} is a {found.get('model_type')!r}, not a {self.family!r}"
            )
        config = read_config(found, model=self.model)
        if config.vision_config.model_type not in _TOWERS:
            raise ConfigError(
                f"model {self.model!r} has a tower of type {config.vision_config.model_type!r}; "
                f"known: {', '.join(_TOWERS)}"
            )
        return config

    @cached_property
    def _plan(self) -> TowerPlan:
        layers, final_norm = self._layers
        return plan_tower(
            self._config.vision_config,
            layers,
            final_norm=final_norm,
            where="vision_feature_layer",
            shallow_layer=self.shallow_layer,
        )

    def _check_model(self) -> None:
        if self._first_token != self._plan.num_prefix:
            raise ConfigError(
                f"model {self.model!r}: its features begin at token {self._first_token} of a tower "
                f"with {self._plan.num_prefix} tokens before the patches, so they fill no grid"
            )
        _ = self._processor

    def _view_grid(self, rows: int, columns: int) -> tuple[int, int]:
        height, width = self._plan.grid(rows, columns)
        return height // self._unit, width // self._unit

    def _describe_options(self, signals: frozenset[str]) -> Mapping[str, Any]:
        shallow = {"shallow_layer": self._plan.shallow_block} if signals & SHALLOW_SIGNALS else {}
        return {"stage": self.stage, "resize": self.resize, **shallow}

    def _after_tower(self) -> nn.Sequential:
        if not self._projects:
            return nn.Sequential()
        made = build_model(lambda: nn.Sequential(OrderedDict({PROJECTOR: self._make_projector()})))
        assert isinstance(made, nn.Sequential)
        return made

    def _reads(self, signals: frozenset[str]) -> Reads:
        keys = tower_keys(self._plan, self._checkpoint, _TOWER_PREFIXES, signals)
        sources = part_sources(self._after_tower(), self._checkpoint, _PREFIXES)
        used = {"vision_config", *self.settings}
        return Reads(
            settings={k: v for k, v in self._checkpoint.config.items() if k in used},
            keys=keys | {source.key for source in sources.values()},
        )

    def _load_model(
        self, *, device: torch.device, dtype: torch.dtype, signals: frozenset[str]
    ) -> LoadedViews:
        tower = Tower(
            self._plan,
            self._checkpoint,
            prefixes=_TOWER_PREFIXES,
            device=device,
            dtype=dtype,
            signals=signals,
        )
        projector = self._after_tower()
        fill_parts(projector, self._checkpoint, _PREFIXES, device=device, dtype=dtype)
        first, unit = self._first_token, self._unit

        def run(pixels_VCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            states, found = tower(pixels_VCHW, first)
            features_VnD = torch.cat([state[:, first:] for state in states], dim=-1)
            grid = self._plan.grid(*pixels_VCHW.shape[2:])
            return projector(features_VnD), merge_signals(found, grid, unit)

        return run
