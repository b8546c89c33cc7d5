"""Cached tokens in the forms that vLLM takes in place of pixels.

Read from vLLM 0.33.0 and checked against its own parsers and schemas (`docs/serving.md`). The
server or `LLM` must be started with `enable_mm_embeds`. vLLM is not imported here.

Two kinds of models. Those of `FREE` take any number of tokens, but the same number for all images
that are encoded in one step, also of other requests: `count_buckets`. Those of `GRIDDED` take as
many as a declared grid says: the kept tokens must form rows and columns of it (`declared_grid`).

Shape letters: K kept tokens of an image, T of what stands for it in a prompt, D width.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.carved_cache import CarvedCache
from pipeline.consumers.placement import HasFeatures, HasPlaces, with_places
from pipeline.consumers.served_model import ServedModel, check_served, served_model, served_rows
from pipeline.errors import ConfigError, NonFiniteError

FREE = frozenset({"internvl", "internvl_chat", "llava", "llava_next", "llava_onevision"})
"""`config.model_type` of models whose prompt has as many image tokens as there are features."""

GRIDDED = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"})
"""Those whose prompt has as many image tokens as the declared grid has merged patches."""

REFUSED = {
    "gemma3": "vLLM 0.33 asserts that Gemma 3 is given pixels",
    "gemma3n": "vLLM 0.33 asserts that Gemma 3n is given pixels",
    "gemma4": "vLLM 0.33 asserts that Gemma 4 is given pixels",
    "idefics3": "vLLM 0.33 sizes its prompt by the pixels of an image, which there are none of",
    "mistral3": "vLLM 0.33 sizes its prompt by the pixels of an image, which there are none of",
    "paligemma": "vLLM 0.33 drops image_embeds before its model sees them",
    "smolvlm": "vLLM 0.33 sizes its prompt by the pixels of an image, which there are none of",
}
"""Model types that vLLM 0.33 serves from pixels only, and why."""

RECTANGULAR = ("identity", "average_pool")
"""Carvers whose rows, read whole, always form rows and columns of the grid."""

_NPY_DTYPES = (torch.float16, torch.float32)


def multi_modal_data(
    config: Any,  # noqa: ANN401
    images: Sequence[HasFeatures],
    *,
    row_end: Tensor | None = None,
) -> dict[str, Any]:
    """Return the `multi_modal_data` of one prompt for `LLM.generate`.

    Args:
        config: of the model, from transformers.
        images: of the prompt in order of appearance; those of a model of `GRIDDED` must say where
            their tokens come from, as rows of a cache do.
        row_end: (D,) `image_newline` of the weights of a LLaVA-NeXT or OneVision.

    Returns:
        `{"image": [(T, D), ...]}`, or for `GRIDDED` `{"image": {"image_embeds": (sum of K, D),
        "image_grid_thw": (images, 3) int64}}`; on the CPU, in the dtype of the images.

    Raises:
        ConfigError: the model cannot be served, the features are of another width than its, the
            images were carved for another model, or `row_end` is needed.
        ValueError: no image, one without tokens, or: for `FREE`, images of different T; for
            `GRIDDED`, tokens that do not form rows and columns of their grid.
        TypeError: an image of a model of `GRIDDED` has no places.
    """
    model = vllm_model(config)
    rows = served_rows(model, images, row_end)
    if model.model_type in GRIDDED:
        grids = grid_only_data(config, images)["image"]
        return {"image": {"image_embeds": torch.cat(rows), **grids}}
    counts = sorted({len(row) for row in rows})
    if len(counts) > 1:
        raise ValueError(
            f"the images of the prompt take {', '.join(map(str, counts))} tokens, and vLLM 0.33 "
            f"takes a {model.model_type} only with equal counts; see count_buckets"
        )
    return {"image": rows}


def grid_only_data(config: Any, images: Sequence[HasFeatures]) -> dict[str, Any]:  # noqa: ANN401
    """Return the `multi_modal_data` of a prompt whose tokens an EC connector brings.

    Give `multi_modal_uuids={"image": [image.key, ...]}` beside it; see `vllm_ec_connector`.

    Args:
        config: of the model, from transformers; of `GRIDDED`.
        images: of the prompt in order of appearance.

    Returns:
        `{"image": {"image_grid_thw": (images, 3) int64}}`.

    Raises:
        ConfigError: the model cannot be served, or vLLM wants its features in the request.
        ValueError: no image, or tokens that do not form rows and columns of their grid.
        TypeError: an image has no places.
    """
    model = gridded_model(config)
    grids = [declared_grid(image, model.merge_size) for image in with_places(images)]
    if not grids:
        raise ValueError("no images: give at least one")
    return {"image": {"image_grid_thw": torch.tensor(grids, dtype=torch.long)}}


def image_part(
    config: Any,  # noqa: ANN401
    image: HasFeatures,
    *,
    uuid: str | None = None,
    dtype: torch.dtype = torch.float16,
    row_end: Tensor | None = None,
) -> dict[str, Any]:
    """Return the content part of a chat message that stands for one image, ready for JSON.

    Args:
        config: of the model, from transformers.
        image: a row of a cache.
        uuid: what vLLM shall take the image for, in place of a hash of its numbers: two images,
            or two budgets of one image, must never share it. None to let vLLM hash.
        dtype: of the numbers sent, float16 or float32: `.npy` has no bfloat16.
        row_end: as in `multi_modal_data`.

    Raises:
        ConfigError: as in `multi_modal_data`, or the dtype cannot be sent.
        NonFiniteError: a value does not fit into the dtype.
        ValueError: no tokens, or for `GRIDDED` not in rows and columns of the grid.
        TypeError: an image of a model of `GRIDDED` has no places.
    """
    model = vllm_model(config)
    (rows_TD,) = served_rows(model, [image], row_end)
    payload: str | dict[str, Any] = _npy_base64(rows_TD, dtype)
    if model.model_type in GRIDDED:
        payload = {"image_embeds": payload, "image_grid_thw": _grid(model, image)}
    return _part(payload, uuid)


def grid_only_part(config: Any, image: HasFeatures, *, uuid: str) -> dict[str, Any]:  # noqa: ANN401
    """Return the content part of an image whose tokens an EC connector brings.

    Args:
        config: of the model, from transformers; of `GRIDDED`.
        image: a row of a cache.
        uuid: the image's key in the connector's cache.

    Raises:
        ConfigError: the model cannot be served, or vLLM wants its features in the request.
        ValueError: tokens that do not form rows and columns of the grid.
        TypeError: the image has no places.
    """
    return _part({"image_grid_thw": _grid(gridded_model(config), image)}, uuid)


def declared_grid(image: HasPlaces, merge_size: int) -> tuple[int, int, int]:
    """Return the patch grid (1, rows, columns) to declare for an image's kept tokens.

    They must be all crossings of some rows and some columns of the grid they come from. vLLM then
    numbers them as if these rows and columns were next to one another.

    Args:
        image: a row of a cache.
        merge_size: patches along each edge of a token.

    Raises:
        ValueError: they are not, or the image is a clip.
    """
    frames, _, num_columns = image.grid
    if frames != 1:
        raise ValueError(
            f"grid {image.grid} is of a clip of {frames} frames: only images are served"
        )
    rows = set((image.positions // num_columns).tolist())
    columns = set((image.positions % num_columns).tolist())
    # Positions are unique, so as many as there are crossings are all of them.
    if len(image.positions) != len(rows) * len(columns):
        raise ValueError(
            f"{len(image.positions)} tokens lie in {len(rows)} rows and {len(columns)} columns of "
            f"the grid {image.grid} and do not fill them, so no grid can be declared; carve with "
            f"{' or '.join(RECTANGULAR)} and read whole rows (keep_tokens=None)"
        )
    return 1, merge_size * len(rows), merge_size * len(columns)


def count_buckets(
    cache: CarvedCache, keys: Iterable[str], counts: Sequence[int]
) -> dict[int, list[str]]:
    """Group images by the largest of a few counts that each can give.

    Reads the index only. The images of a bucket are
    `cache.keeping(count).get_many(buckets[count])`; bucket after bucket, every batch has equal
    counts. A server that many clients share needs one count for all of them. For LLaVA-NeXT and
    OneVision these are counts before ends of rows are put in and padding is dropped: there only
    `len` of the features in `multi_modal_data` tells which images go together.

    Args:
        cache: to read from.
        keys: of the images.
        counts: allowed numbers of tokens, each at least 1.

    Returns:
        Keys by count, in the order given, largest count first; no empty bucket.

    Raises:
        KeyNotFoundError: no image of such a key.
        ValueError: no counts, one below 1, or an image with fewer tokens than the smallest.
    """
    allowed = sorted(set(counts), reverse=True)
    if not allowed or allowed[-1] < 1:
        raise ValueError(f"counts={list(counts)}: give at least one, all at least 1")
    buckets: dict[int, list[str]] = {count: [] for count in allowed}
    for place in cache.reader.find_many(list(keys)):
        stored = min(place.num_tokens, cache.keep_tokens or place.num_tokens)
        count = next((c for c in allowed if c <= stored), None)
        if count is None:
            raise ValueError(
                f"image {place.key!r} has {stored} tokens, fewer than the smallest count "
                f"{allowed[-1]}; allow a smaller one"
            )
        buckets[count].append(place.key)
    return {count: found for count, found in buckets.items() if found}


def vllm_model(config: Any) -> ServedModel:  # noqa: ANN401
    """Read a model's config, and raise ConfigError where vLLM cannot serve it from features."""
    model = served_model(config)
    check_served(model, FREE | GRIDDED, REFUSED)
    if model.tower == "pixtral":
        raise ConfigError(
            "models with a tower of type 'pixtral' cannot be served from cached tokens: vLLM 0.33 "
            "takes only pixels for them"
        )
    return model


def gridded_model(config: Any) -> ServedModel:  # noqa: ANN401
    """Read a model's config, and raise ConfigError where vLLM wants features in the request."""
    model = vllm_model(config)
    if model.model_type not in GRIDDED:
        raise ConfigError(
            f"vLLM 0.33 cannot size the prompt of a {model.model_type} without its features; send "
            "them in the request"
        )
    return model


def _grid(model: ServedModel, image: HasFeatures) -> list[int]:
    (placed,) = with_places([image])
    return list(declared_grid(placed, model.merge_size))


def _part(payload: str | dict[str, Any], uuid: str | None) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "image_embeds", "image_embeds": payload}
    return part if uuid is None else {**part, "uuid": uuid}


def _npy_base64(rows_TD: Tensor, dtype: torch.dtype) -> str:
    if dtype not in _NPY_DTYPES:
        raise ConfigError(f"dtype={dtype}: .npy can carry torch.float16 or torch.float32")
    sent = rows_TD.to(dtype)
    if not sent.isfinite().all():
        raise NonFiniteError(
            f"features up to {rows_TD.abs().max():g} do not fit into {dtype}; send torch.float32"
        )
    buffer = io.BytesIO()
    np.save(buffer, sent.numpy(), allow_pickle=False)
    return base64.b64encode(buffer.getbuffer()).decode("ascii")
