"""Prompts with cached images, token by token: what is written, what stays, and where it stands.

T tokens of a prompt that stay; K kept tokens of an image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.consumers.arrangement import ROW_END, Arrangement, arrange, in_order, kept_slots
from pipeline.consumers.placement import HasFeatures, HasPlaces, check_places
from pipeline.consumers.prompt import image_marker, write_images
from pipeline.errors import ConfigError
from pipeline.types import TileLayout


@dataclass(frozen=True, kw_only=True)
class FedImage:
    """One image as the model is fed it."""

    features: Tensor  # (K, D) as stored
    arrangement: Arrangement  # of all that there was
    slots: Tensor  # (T,) of the arrangement, those that stay
    rows: Tensor  # (T,) which of the K tokens stands there, or ROW_END
    sizes: Tensor | None  # (K,)
    grid: tuple[int, int, int] | None
    positions: Tensor | None
    tiles: TileLayout | None

    @classmethod
    def of(cls, kind: str, image: Tensor | HasFeatures, index: int) -> "FedImage":
        """Return how a model is fed an image.

        Args:
            kind: `model_type` of the model.
            image: (K, D) features, or a row of a cache.
            index: of the image, for messages.

        Raises:
            ConfigError: it was carved for another kind of model.
            ValueError: it has no tokens, or none that the model would see.
        """
        features_KD = _rows(image, index)
        if not isinstance(image, HasPlaces):
            arrangement = in_order(len(features_KD))
            slots = rows = torch.arange(len(features_KD))
            sizes = grid = positions = tiles = None
        else:
            check_places(image, index)
            grid, positions, sizes = image.grid, image.positions.cpu(), image.sizes.cpu()
            tiles = getattr(image, "tiles", None)
            arrangement = arrange(kind, grid, tiles)
            slots, rows = kept_slots(arrangement, positions)
            if not len(slots):
                raise ValueError(f"image {index} kept only tokens that lie in its padding")
        return cls(
            features=features_KD,
            arrangement=arrangement,
            slots=slots,
            rows=rows,
            sizes=sizes,
            grid=grid,
            positions=positions,
            tiles=tiles,
        )


@dataclass(frozen=True, kw_only=True)
class LaidOutPrompt:
    """One prompt, tokenized; T of its tokens stay."""

    ids: Tensor  # (T,)
    slots: Tensor  # (T,) where each would stand if nothing had been carved
    bias: Tensor  # (T,) logarithm of the size
    image: Tensor  # (T,) which image of the prompt a token is of; -1 for text
    images: Sequence[FedImage]  # of this prompt


def lay_out(
    kind: str,
    tokenizer: Any,  # noqa: ANN401
    prompts: Sequence[str],
    images: Sequence[FedImage],
    image_token_id: int,
) -> list[LaidOutPrompt]:
    """Tokenize prompts, with all that stands for their images.

    Args:
        kind: `model_type` of the model.
        tokenizer: of the model.
        prompts: P texts, with one image token, or the family's own marker, per image.
        images: of all prompts, in order of appearance.
        image_token_id: of the model.

    Raises:
        ValueError: no prompts, or not as many images as image tokens.
        ConfigError: the tokenizer is not that of the model.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts are {prompts!r}, expected a list of at least one text")
    texts, counts = list(prompts), None
    marker = image_marker(kind, tokenizer)
    if marker is not None:
        counts = [text.count(marker) for text in texts]
        _check_count(counts, len(images), marker)
        texts = [
            write_images(kind, tokenizer, text, [image.tiles for image in own])
            for text, own in zip(texts, _split(images, counts), strict=True)
        ]
    encoded = tokenizer(texts, padding=False, return_attention_mask=False)["input_ids"]
    ids = [torch.tensor(row, dtype=torch.long) for row in encoded]
    if counts is None:
        counts = [int((row == image_token_id).sum()) for row in ids]
        _check_count(counts, len(images), f"id {image_token_id}")
    split = _split(images, counts)
    return [_expand(row, image_token_id, own) for row, own in zip(ids, split, strict=True)]


def _check_count(counts: Sequence[int], num_images: int, token: str) -> None:
    if sum(counts) != num_images:
        raise ValueError(
            f"{num_images} images for {sum(counts)} image tokens ({token}) in the prompts, which "
            f"hold {list(counts)}; write one image token per image"
        )


def _split(images: Sequence[FedImage], counts: Sequence[int]) -> list[Sequence[FedImage]]:
    rest = iter(images)
    return [[next(rest) for _ in range(count)] for count in counts]


def _expand(ids: Tensor, image_token_id: int, images: Sequence[FedImage]) -> LaidOutPrompt:
    """Put in place of each image token the slots of its stretch, and drop those that are empty."""
    runs = [length for image in images for length in image.arrangement.runs]
    is_token = ids == image_token_id
    if int(is_token.sum()) != len(runs):
        raise ConfigError(
            f"the tokenizer makes {int(is_token.sum())} image tokens (id {image_token_id}) of "
            f"{len(runs)}: it is not that of the model"
        )
    repeats = torch.ones_like(ids)
    repeats[is_token] = torch.tensor(runs, dtype=torch.long)
    full = ids.repeat_interleave(repeats)
    at_image = full == image_token_id
    stays, bias = ~at_image, torch.zeros(len(full))
    owner = torch.full((len(full),), -1)
    lengths = [sum(image.arrangement.runs) for image in images]
    starts = torch.split(at_image.nonzero(as_tuple=True)[0], lengths)
    for number, (image, where) in enumerate(zip(images, starts, strict=True)):
        kept = where[image.slots]
        stays[kept], owner[kept] = True, number
        if image.sizes is not None:
            own = image.sizes[image.rows.clamp_min(0)].log()
            bias[kept] = torch.where(image.rows == ROW_END, 0.0, own)
    (slots,) = stays.nonzero(as_tuple=True)
    return LaidOutPrompt(
        ids=full[slots], slots=slots, bias=bias[slots], image=owner[slots], images=images
    )


def grid_positions(prompt: LaidOutPrompt, *, is_packed: bool) -> Tensor:
    """Return (3, T): time, row and column of each token.

    Text goes on behind the longest edge of the whole grid, as `get_rope_index` of transformers has
    it.
    """
    if is_packed:
        return torch.arange(len(prompt.ids)).expand(3, -1)
    axes, start = [], 0
    for number, length in _stretches(prompt.image):
        if number < 0:
            axes.append((start + torch.arange(length)).expand(3, -1))
            start += length
        else:
            image = prompt.images[number]
            assert image.grid is not None and image.positions is not None
            own = torch.unravel_index(image.positions, image.grid)
            axes.append(start + torch.stack(own))
            start += max(image.grid)
    return torch.cat(axes, dim=1)


def _stretches(owner: Tensor) -> Iterator[tuple[int, int]]:
    """Yield each run of tokens of one image or of text, with its length."""
    numbers, lengths = torch.unique_consecutive(owner, return_counts=True)
    yield from zip(numbers.tolist(), lengths.tolist(), strict=True)


def _rows(image: Tensor | HasFeatures, index: int) -> Tensor:
    rows_KD = image if isinstance(image, Tensor) else image.features
    if rows_KD.ndim != 2 or len(rows_KD) == 0:
        raise ValueError(
            f"features of image {index} have the shape {tuple(rows_KD.shape)}, expected (K, D) "
            "with K at least 1"
        )
    if not rows_KD.is_floating_point():
        raise ValueError(
            f"features of image {index} are {rows_KD.dtype}, expected floating point numbers: "
            "unpack them first"
        )
    return rows_KD
