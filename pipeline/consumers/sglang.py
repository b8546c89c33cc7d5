"""Cached tokens in the form that SGLang's offline engine takes in place of pixels.

Read from SGLang 0.5.23 and checked against its own code (`docs/serving.md`). A request's images go
as one `processor_output` item with `precomputed_embeddings`, so the vision tower does not run; and
as SGLang takes M-RoPE positions with it, a Qwen model can be given any kept tokens, each at the
place it had among all of its image. SGLang is not imported here.

Shape letters: K tokens of an image, D width of the features, T tokens of a prompt.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.consumers.placement import HasPlaces, with_places
from pipeline.consumers.served_model import check_served, served_model, served_rows
from pipeline.errors import ConfigError

PLACED = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"})
"""`config.model_type` of models that take M-RoPE positions: kept tokens stand where they stood."""

PACKED = frozenset({"gemma3", "internvl_chat"})
"""Those whose kept tokens stand in the text like words, one behind the other."""

_LLAVA = "SGLang 0.5.23 runs the vision tower of a LLaVA on whatever features it is given"
REFUSED = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "paligemma": "SGLang 0.5.23 has no PaliGemma",
    "idefics3": "SGLang 0.5.23 has no Idefics3",
    "smolvlm": "SGLang 0.5.23 has no SmolVLM",
}
"""Model types that SGLang 0.5.23 does not serve from features, and why."""


def generate_inputs(
    config: Any,  # noqa: ANN401  (transformers is untyped)
    input_ids: Sequence[int],
    images: Sequence[HasPlaces],
    *,
    image_token_id: int | None = None,
) -> dict[str, Any]:
    """Return the prompt and images of one request: `engine.generate(**inputs, ...)`.

    Args:
        config: of the model, from transformers.
        input_ids: of the prompt, with one image token per image, between the tokens that the
            model's chat template puts around images.
        images: of the prompt in order of appearance, as rows of a cache.
        image_token_id: of the image token; None for the config's. InternVL's config names none:
            give that of `<IMG_CONTEXT>`.

    Returns:
        `input_ids`, a list of T ids, each image token repeated once per kept token, and
        `image_data`, a list of one dict: `format`, `precomputed_embeddings` (sum of K, D),
        `offsets` (first and last id of each image), `hash`; for `PLACED` also `mrope_positions`
        (3, T) int64 and `mrope_position_delta` (1, 1) int64.

    Raises:
        ConfigError: the model cannot be served, the features are of another width than its, the
            images were carved for another model, or the image token is not known.
        ValueError: no images, not as many as image tokens, a token outside its grid, a clip.
        TypeError: an image without places.
    """
    model = served_model(config)
    check_served(model, PLACED | PACKED, REFUSED)
    token_id = _image_token_id(config, image_token_id)
    features_KD = torch.cat(served_rows(model, images))
    placed = with_places(images)
    ids, offsets = _expand(input_ids, token_id, placed)
    item: dict[str, Any] = {
        "format": "processor_output",
        "precomputed_embeddings": features_KD,
        "offsets": offsets,
        "hash": _identity(features_KD, placed),
    }
    if model.model_type in PLACED:
        positions_3T, delta = mrope_positions(input_ids, placed, image_token_id=token_id)
        item["mrope_positions"] = positions_3T
        item["mrope_position_delta"] = torch.tensor([[delta]])
    return {"input_ids": ids, "image_data": [item]}


def mrope_positions(
    input_ids: Sequence[int], images: Sequence[HasPlaces], *, image_token_id: int
) -> tuple[Tensor, int]:
    """Return where the tokens of a prompt stand for a model with M-RoPE.

    A kept token has the time, row and column that it had among all tokens of its image, counted
    from the text before it. Text goes on at the number that would follow the whole image: its
    first one plus the larger of rows and columns, as in transformers' `get_rope_index`.

    Args:
        input_ids: of the prompt, with one image token per image.
        images: of the prompt in order of appearance; their `grid` is that of merged patches.
        image_token_id: of the image token.

    Returns:
        (3, T) int64: time, row and column of the T tokens of the prompt with each image token
        repeated once per kept token; and the number that follows, less T, which decoding adds.

    Raises:
        ValueError: not as many images as image tokens, or a clip: its times depend on the model.
    """
    _check_count(input_ids, images, image_token_id)
    rest, pieces, start = iter(images), [], 0
    for token in input_ids:
        if token == image_token_id:
            image = next(rest)
            pieces.append(start + _places(image))
            start += max(image.grid)
        else:
            pieces.append(torch.full((3, 1), start))
            start += 1
    positions_3T = torch.cat(pieces, dim=1)
    return positions_3T, start - positions_3T.shape[1]


def _places(image: HasPlaces) -> Tensor:
    """Return (3, K): time, row and column of each kept token."""
    frames, rows, columns = image.grid
    if frames != 1:
        raise ValueError(
            f"grid {image.grid} is of a clip of {frames} frames: only images are served"
        )
    positions_K = image.positions.cpu()
    return torch.stack(
        [
            positions_K // (rows * columns),
            positions_K // columns % rows,
            positions_K % columns,
        ]
    )


def _expand(
    input_ids: Sequence[int], image_token_id: int, images: Sequence[HasPlaces]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Repeat each image token once per kept token; return also first and last of each image."""
    _check_count(input_ids, images, image_token_id)
    rest = iter(images)
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for token in input_ids:
        if token == image_token_id:
            num_kept = len(next(rest).positions)
            offsets.append((len(ids), len(ids) + num_kept - 1))
            ids.extend([image_token_id] * num_kept)
        else:
            ids.append(int(token))
    return ids, offsets


def _check_count(
    input_ids: Sequence[int], images: Sequence[HasPlaces], image_token_id: int
) -> None:
    num_tokens = sum(token == image_token_id for token in input_ids)
    if num_tokens != len(images):
        raise ValueError(
            f"{len(images)} images for {num_tokens} image tokens (id {image_token_id}) in the "
            "prompt; write one image token per image"
        )


def _image_token_id(config: Any, given: int | None) -> int:  # noqa: ANN401
    token_id = getattr(config, "image_token_id", None) if given is None else given
    if token_id is None:
        raise ConfigError(
            f"the config of this {config.model_type} names no image token; give image_token_id"
        )
    return int(token_id)


def _identity(features_KD: Tensor, images: Sequence[HasPlaces]) -> int:
    """Return 64 bits that stand for these tokens at these places.

    SGLang shares the keys and values of prompts with equal ids and hashes; tokens that are equal
    and stand elsewhere must not be taken for one another.
    """
    digest = hashlib.sha256(repr((features_KD.dtype, tuple(features_KD.shape))).encode())
    digest.update(features_KD.view(torch.uint8).numpy().data)
    for image in images:
        digest.update(repr((image.grid, len(image.positions))).encode())
        digest.update(image.positions.cpu().contiguous().numpy().data)
    return int.from_bytes(digest.digest()[:8], "big")
