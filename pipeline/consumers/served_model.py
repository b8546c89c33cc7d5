"""What a serving engine's model takes in place of pixels, read from its transformers config.

Shape letters: K kept tokens of an image, T of what stands for it in a prompt, D width.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.consumers.arrangement import ROW_END, arrange, in_slots, kept_slots
from pipeline.consumers.placement import HasFeatures, HasPlaces, check_places
from pipeline.errors import ConfigError

_ARRANGED_AS = {"internvl_chat": "internvl"}
"""Models under another name than that of transformers' own class."""


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


def served_rows(
    model: ServedModel, images: Sequence[HasFeatures], row_end: Tensor | None = None
) -> list[Tensor]:
    """Return the features of each image in the order that the model is fed them.

    Args:
        model: to be served.
        images: rows of a cache, or features that are in that order already.
        row_end: (D,) what the model puts at the end of a row of the image, its `image_newline`.

    Returns:
        (T, D) of each, on the CPU and contiguous. T is K, unless the model ends rows or drops
        padding (LLaVA-NeXT, OneVision).

    Raises:
        ConfigError: the features are of another width than the model's, the image was carved for
            another model, or the end of a row is needed.
        ValueError: no image, one without tokens, or with codes that were not unpacked.
    """
    if not images:
        raise ValueError("no images: give at least one")
    return [
        _arranged(model, image, index, row_end).detach().cpu().contiguous()
        for index, image in enumerate(images)
    ]


def _arranged(model: ServedModel, image: HasFeatures, index: int, row_end: Tensor | None) -> Tensor:
    rows_KD = image.features
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
    if not isinstance(image, HasPlaces):
        return rows_KD
    check_places(image, index)
    # Tokens of tiles are stored in another order than they are fed, and without ends of rows.
    kind = _ARRANGED_AS.get(model.model_type, model.model_type)
    arrangement = arrange(kind, image.grid, getattr(image, "tiles", None))
    _, rows_T = kept_slots(arrangement, image.positions.cpu())
    if not len(rows_T):
        raise ValueError(f"image {index} kept only tokens that lie in its padding")
    if not (rows_T == ROW_END).any():
        return in_slots(rows_KD, rows_T, None)
    if row_end is None or tuple(row_end.shape) != (model.width,):
        given = "none" if row_end is None else f"one of the shape {tuple(row_end.shape)}"
        raise ConfigError(
            f"a {model.model_type} ends each row of an image with its image_newline, and {given} "
            f"is given; give that of its weights, ({model.width},), as row_end"
        )
    return in_slots(rows_KD, rows_T, row_end)
