"""Any model of transformers whose `get_image_features` takes pixels alone: features as they come.

Source: transformers 5.23, the convention that `get_image_features` gives the tokens a language
    model is fed as `pooler_output`, which this equals. For families with an encoder of their own
    use that: it knows their tiles, their grids and more signals.
Signals: `received_attention` of the tower's last layer, where the tower is a CLIP, a SigLIP or a
    DINOv2 each of whose patches becomes one token; `cls_attention` besides where it has a class
    token. Whether a layer before the last one makes the features is not looked at.
Differs: what the views of an image are, if its processor makes several, is not known: they stand
    one after the other as it gives them, and are recorded as frames.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import transformers
from torch import Tensor, nn

from pipeline.encoders._base import Pixels
from pipeline.encoders._checkpoint_encoder import read_config
from pipeline.encoders._own_modules import build_model, fill_parts, part_sources
from pipeline.encoders._own_processor import KNOWN_PROCESSORS, views_of
from pipeline.encoders._signals import AttentionProbe, map_names
from pipeline.encoders._tower_plan import FAMILIES
from pipeline.encoders._view_encoder import LoadedViews, ViewEncoder
from pipeline.encoders._weights import Reads
from pipeline.errors import ConfigError
from pipeline.types import TileLayout, VisualTokens

_LANGUAGE = ("language_model", "text_model", "lm_head")


@dataclass(kw_only=True)
class ImageFeatures(ViewEncoder):
    """Visual tokens of a model that has no encoder of its own here.

    Attributes:
        stage: always `projected`: what the model's language model is fed.
    """

    stage: Literal["projected"] = "projected"

    processors: ClassVar[tuple[str, ...]] = KNOWN_PROCESSORS

    @property
    def yields(self) -> frozenset[str]:
        """None where the tower is of another kind, or makes one token of several patches."""
        family = FAMILIES.get(self._vision.model_type)
        if family is None or self._num_tokens != self._num_patches:
            return frozenset()
        received = frozenset({"received_attention"})
        return received | {"cls_attention"} if family.has_class_token else received

    @property
    def width(self) -> int:
        """Width of the language model."""
        return int(self._config.get_text_config().hidden_size)

    @cached_property
    def _config(self) -> Any:  # noqa: ANN401
        return read_config(self._checkpoint.config, model=self.model)

    @property
    def _vision(self) -> Any:  # noqa: ANN401
        vision = getattr(self._config, "vision_config", None)
        if vision is None:
            raise ConfigError(
                f"model {self.model!r} is a {self._config.model_type!r}, which has no vision "
                "tower; for a bare tower use the encoder of its kind"
            )
        return vision

    @property
    def _num_patches(self) -> int:
        return int((self._vision.image_size // self._vision.patch_size) ** 2)

    @cached_property
    def _num_tokens(self) -> int:
        """Number of tokens of a view, from a run without numbers."""
        edge = self._vision.image_size
        with torch.device("meta"):
            model: Any = self._class()(self._config)
            tokens_VnD = _tokens(model, torch.empty(1, 3, edge, edge))
        return tokens_VnD.shape[1]

    def _class(self) -> Any:  # noqa: ANN401
        kind = transformers.MODEL_MAPPING.get(type(self._config), None)
        if not hasattr(kind, "get_image_features"):
            raise ConfigError(
                f"model {self.model!r} is a {self._config.model_type!r}, which has no "
                "get_image_features"
            )
        given = inspect.signature(kind.get_image_features).parameters.values()
        needed = [
            p.name
            for p in given
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        if needed != ["self", "pixel_values"]:
            raise ConfigError(
                f"model {self.model!r}: its get_image_features needs {', '.join(needed[1:])}; this "
                "encoder can give pixel_values alone"
            )
        return kind

    def _check_model(self) -> None:
        _ = self._class(), self._vision, self._processor

    def _describe_options(self, signals: frozenset[str]) -> Mapping[str, Any]:
        return {"stage": self.stage, "resize": self.resize}

    def _build(self) -> nn.Module:
        kind = self._class()
        return build_model(lambda: kind(self._config), without=_LANGUAGE)

    def _prefixes(self, model: nn.Module) -> Mapping[str, Sequence[str]]:
        return {
            name: (f"model.{name}.", f"{name}.", f"model.{name}.vision_model.")
            for name, _ in model.named_children()
        }

    def _reads(self, signals: frozenset[str]) -> Reads:
        model = self._build()
        sources = part_sources(model, self._checkpoint, self._prefixes(model))
        config = self._checkpoint.config
        return Reads(
            settings={k: v for k, v in config.items() if k != "text_config"},
            keys=frozenset(source.key for source in sources.values()),
        )

    def _views(self, image: Pixels) -> tuple[list[Pixels], TileLayout | None]:
        return views_of(self._processor(image)["pixel_values"], model=self.model), None

    def _view_grid(self, rows: int, columns: int) -> tuple[int, int]:
        return 1, 1  # known from the tokens alone

    def _encode_group(self, *args: Any) -> VisualTokens:  # noqa: ANN401
        tokens = super()._encode_group(*args)
        per_view = tokens.features.shape[1] // tokens.num_views
        edge = math.isqrt(per_view)
        return replace(tokens, grid=(edge, edge) if edge**2 == per_view else (1, per_view))

    def _load_model(
        self, *, device: torch.device, dtype: torch.dtype, signals: frozenset[str]
    ) -> LoadedViews:
        model: Any = self._build()
        fill_parts(model, self._checkpoint, self._prefixes(model), device=device, dtype=dtype)
        probe, first = None, 0
        if signals:
            family = FAMILIES[self._vision.model_type]
            first = int(family.has_class_token)
            tower = next(m for m in model.modules() if type(m).__name__ == family.model)
            probe = AttentionProbe(
                tower.get_submodule(family.layers)[-1].get_submodule(family.attention),
                names=map_names(output=family.output),
                num_heads=self._vision.num_attention_heads,
                has_class=family.has_class_token,
                signals=signals,
            )

        def run(pixels_VCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            tokens_VnD = _tokens(model, pixels_VCHW)
            return tokens_VnD, probe.take(first) if probe is not None else {}

        return run


def _tokens(model: Any, pixels_VCHW: Tensor) -> Tensor:  # noqa: ANN401
    """Return (V, n, D).

    Raises:
        ConfigError: the model gives something else, such as one vector an image.
    """
    found = model.get_image_features(pixels_VCHW)
    tokens = getattr(found, "pooler_output", found)
    if isinstance(tokens, (list, tuple)):
        tokens = torch.stack(list(tokens)) if tokens[0].ndim == 2 else torch.cat(list(tokens))
    if tokens.ndim != 3 or len(tokens) != len(pixels_VCHW):
        raise ConfigError(
            f"get_image_features of {type(model).__name__} gives {tuple(tokens.shape)} for "
            f"{len(pixels_VCHW)} views, expected (views, tokens, width)"
        )
    result: Tensor = tokens
    return result
