"""What a serving engine's model takes in place of pixels, read from its transformers config.

Shape letters: K tokens of an image, D width of the features.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.consumers.placement import HasFeatures
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """The facts of a model that decide what may be handed to it."""

    model_type: str  # as in its config.json
    width: int  # D of a token, all DeepStack planes side by side
    merge_size: int  # patches along each edge of a token; 1 where nothing is merged
    tower: str  # model type of the vision tower; "" where the config names none


def served_model(config: Any) -> ServedModel:  # noqa: ANN401  (transformers is untyped)
    """Read a model's config.

    Args:
        config: of transformers (`AutoConfig.from_pretrained`, or an engine's `hf_config`).
    """
    text = getattr(config, "llm_config", None) or config.get_text_config()
    vision = config.vision_config
    planes = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return ServedModel(
        model_type=config.model_type,
        width=text.hidden_size * planes,
        merge_size=getattr(vision, "spatial_merge_size", 1),
        tower=getattr(vision, "model_type", ""),
    )


def check_served(model: ServedModel, served: Set[str], refused: Mapping[str, str]) -> None:
    """Raise ConfigError unless an engine takes cached tokens for a model.

    Args:
        model: to be served.
        served: model types that the engine serves from cached tokens.
        refused: model types that it does not, and why.
    """
    if model.model_type in refused:
        raise ConfigError(
            f"models of type {model.model_type!r} cannot be served from cached tokens: "
            f"{refused[model.model_type]}"
        )
    if model.model_type not in served:
        known = ", ".join(sorted(served))
        raise ConfigError(
            f"models of type {model.model_type!r} are not known to take cached tokens; known: "
            f"{known}"
        )


def served_rows(model: ServedModel, images: Sequence[HasFeatures]) -> list[Tensor]:
    """Return each image's (K, D) features, on the CPU and contiguous.

    Raises:
        ConfigError: the features are of another width than the model's.
        ValueError: no image, one without tokens, or with codes that were not unpacked.
    """
    if not images:
        raise ValueError("no images: give at least one")
    return [_served_row(model, image.features, index) for index, image in enumerate(images)]


def _served_row(model: ServedModel, rows_KD: Tensor, index: int) -> Tensor:
    if rows_KD.ndim != 2 or len(rows_KD) == 0 or not rows_KD.is_floating_point():
        raise ValueError(
            f"features of image {index} are {rows_KD.dtype} of the shape {tuple(rows_KD.shape)}, "
            "expected floating point numbers (K, D) with K at least 1"
        )
    if rows_KD.shape[1] != model.width:
        raise ConfigError(
            f"features of image {index} are {rows_KD.shape[1]} wide and a {model.model_type} of "
            f"this config takes {model.width}; engines take them as the language model does: "
            "carve with stage 'projected'"
        )
    return rows_KD.detach().cpu().contiguous()
