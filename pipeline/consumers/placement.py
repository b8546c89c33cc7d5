"""Where kept tokens stand in a prompt, and what each counts for; see `types.Placement`.

T tokens of a prompt.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.types import Placement

PLACED = frozenset({"llava"})
"""Those whose image is its grid of tokens and nothing else, so that tokens can stand in their
original places: the others put ends of rows between them, and tiles of several sizes."""


class HasFeatures(Protocol):
    """Anything with `features` (K, D), such as `CarvedTokens` or a row of a cache."""

    @property
    def features(self) -> Tensor:
        """(K, D) features of one image."""


@runtime_checkable
class HasPlaces(HasFeatures, Protocol):
    """Features, and where they come from: a row of a cache."""

    @property
    def positions(self) -> Tensor:
        """(K,) int64 in [0, N), ascending: which of the image's N tokens each was."""

    @property
    def sizes(self) -> Tensor:
        """(K,) float32: how many source tokens each stands for."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Time, rows, columns before carving; N is their product."""


def check_placement(model: Any, placement: str) -> None:  # noqa: ANN401  (untyped)
    """Raise ConfigError if a model cannot be given tokens of a placement."""
    if placement not in get_args(Placement):
        known = ", ".join(get_args(Placement))
        raise ConfigError(f"no placement {placement!r}; known: {known}")
    kind = model.config.model_type
    if placement != "packed" and kind not in PLACED:
        raise ConfigError(
            f"models of type {kind!r} can only be given tokens with placement 'packed', not "
            f"{placement!r}: they put other tokens between those of an image"
        )
    attention = model.config.get_text_config()._attn_implementation
    if placement == "weighted" and attention != "sdpa":
        raise ConfigError(
            f"placement 'weighted' needs attention that takes a bias, and the model's is "
            f"{attention!r}, which would leave it out unsaid; load it with "
            "attn_implementation='sdpa'"
        )


def with_places(images: Sequence[Tensor | HasFeatures]) -> list[HasPlaces]:
    """Return the images if all say where their tokens come from.

    Raises:
        TypeError: one does not.
        ValueError: one has a token outside its grid.
    """
    checked = []
    for index, image in enumerate(images):
        if not isinstance(image, HasPlaces):
            raise TypeError(
                f"image {index} is a {type(image).__name__} without positions, sizes and grid, "
                "which only placement 'packed' can do without; give what a cache or a dataset gave"
            )
        last, num_source = int(image.positions.max()), prod(image.grid)
        if last >= num_source:
            raise ValueError(
                f"image {index} has a token at position {last} of a grid {image.grid}, which has "
                f"{num_source}"
            )
        checked.append(image)
    return checked


def place_tokens(
    ids: Sequence[Tensor], image_token_id: int, images: Sequence[Tensor | HasFeatures]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return for each prompt (T,) positions, and (T,) what is added to its attention scores.

    Args:
        ids: of the prompts, with one image token per image.
        image_token_id: among the ids.
        images: of all prompts in order of appearance, as many as there are image tokens.

    Raises:
        TypeError: an image does not say where its tokens come from.
        ValueError: one has a token outside its grid.
    """
    rest = iter(with_places(images))
    places, biases = [], []
    for prompt in ids:
        own_places, own_biases, start = [], [], 0
        for token in prompt.tolist():
            if token == image_token_id:
                image = next(rest)
                own_places.append(start + image.positions.cpu())
                own_biases.append(image.sizes.cpu().log())
                start += prod(image.grid)
            else:
                own_places.append(torch.tensor([start]))
                own_biases.append(torch.zeros(1))
                start += 1
        places.append(torch.cat(own_places))
        biases.append(torch.cat(own_biases))
    return places, biases


def widen_bias(bias_P11T: Tensor, num_columns: int) -> Tensor:
    """Return (P, 1, 1, num_columns): what comes behind a prompt counts once."""
    return functional.pad(bias_P11T, (0, num_columns - bias_P11T.shape[-1]))
