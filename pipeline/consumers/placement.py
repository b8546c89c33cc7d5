"""Where kept tokens stand in a prompt, and what each counts for; see `types.Placement`."""

from collections.abc import Sequence
from math import prod
from typing import Any, Protocol, get_args, runtime_checkable

from torch import Tensor
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.types import Placement


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
    attention = model.config.get_text_config()._attn_implementation
    if placement == "weighted" and attention != "sdpa":
        raise ConfigError(
            f"placement 'weighted' needs attention that takes a bias, and the model's is "
            f"{attention!r}, which would leave it out unsaid; load it with "
            "attn_implementation='sdpa'"
        )


def with_places(images: Sequence[Tensor | HasFeatures]) -> list[HasPlaces]:
    """Return the images if all say where their tokens come from; see `check_places`."""
    return [check_places(image, index) for index, image in enumerate(images)]


def check_places(image: Tensor | HasFeatures, index: int) -> HasPlaces:
    """Return an image that says where its tokens come from.

    Raises:
        TypeError: it does not.
        ValueError: it has a token outside its grid.
    """
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
    return image


def widen_bias(bias_P11T: Tensor, num_columns: int) -> Tensor:
    """Return (P, 1, 1, num_columns): what comes behind a prompt counts once."""
    return functional.pad(bias_P11T, (0, num_columns - bias_P11T.shape[-1]))
