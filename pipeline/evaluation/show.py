"""What carvers leave of images, to be drawn: freshly encoded, or as a cache holds it."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from pipeline import carvers, encoders
from pipeline.carved_cache import CachedImage, CarvedCache, open_cache
from pipeline.carvers import Carver
from pipeline.config import JobConfig
from pipeline.decode import decode_image
from pipeline.encoders import Encoder, Pixels
from pipeline.errors import ConfigError, MissingSignalError
from pipeline.evaluation.drawing import CELL, SeenImage, seen_image
from pipeline.evaluation.shown import Carving, ShownImage
from pipeline.evaluation.variants import BUDGET_OPTIONS, budget_option
from pipeline.job import decode_options
from pipeline.storage import read_input
from pipeline.types import CarvedTokens

Fit = Literal["model", "crop", "pad", "stretch"]
"""How an image comes under the grid of a stored row: as the model's own image processor does it, or
its middle, or padded to the shape of the grid, or stretched to it."""

_PADDING = (122, 116, 104)  # the mean of CLIP's pixels, which LLaVA pads with


def show_images(
    config: JobConfig,
    images: Sequence[str],
    *,
    names: Sequence[str] = (),
    keep: float | None = None,
    device: str | None = None,
    encoder: Encoder | None = None,
) -> list[ShownImage]:
    """Encode images and carve them.

    Args:
        config: of a run; its input and output are not used.
        images: URLs or paths of encoded images.
        names: of carvers; none for the one of the config. They take its budget, and the others of
            its options where it is the same carver.
        keep: share of the tokens to keep, in (0, 1], in place of the config's budget. Carvers
            that decide their own count still do.
        device: a torch device; None for a GPU where there is one.
        encoder: one made by the caller, which takes the place of `config.encoder`.

    Raises:
        ConfigError: a carver, the model or `keep` cannot be used, or tokens do not lie over the
            image.
        MissingSignalError: the encoder cannot give what a carver reads.
        SampleError: an image cannot be decoded or encoded.
        StorageError: an image cannot be read.
    """
    options = {name: _options(config, name, keep) for name in names or [config.carver.name]}
    chosen = {name: carvers.build(name, given) for name, given in options.items()}
    encoder = encoder or encoders.build(config.encoder.name, config.encoder.options)
    signals = _check_signals(config.encoder.name, encoder, chosen)
    limits = decode_options(config.input)
    prepared = [
        encoder.preprocess(decode_image(read_input(url), key=url, options=limits)) for url in images
    ]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoder.load(device=device, dtype=getattr(torch, config.runner.dtype), signals=signals)
    found = _carve(encoder, chosen, prepared, batch_size=config.runner.batch_size)
    return [
        ShownImage(
            name=url,
            note="",
            seen=seen,
            carvings=[_carving(n, _words(options[n]), tokens) for n, tokens in carved.items()],
        )
        for url, (seen, carved) in zip(images, found, strict=True)
    ]


def see_images(encoder: Encoder, prepared: Sequence[Pixels], *, batch_size: int) -> list[SeenImage]:
    """Return where the tokens of preprocessed images lie; `encoder` is loaded.

    Raises:
        ConfigError: tokens do not lie over the image.
    """
    return [seen for seen, _ in _carve(encoder, {}, prepared, batch_size=batch_size)]


def show_row(
    url: str,
    key: str,
    images: Sequence[str],
    *,
    keep: float | None = None,
    fit: Fit = "model",
) -> ShownImage:
    """Take what a cache holds of an image; no weights are loaded.

    Args:
        url: of the cache.
        key: of the row.
        images: URL or path of the encoded image the row was made from; of a clip, its frames.
        keep: share of the tokens to read, in (0, 1]; None for all that are stored.
        fit: how the image comes under the grid. `model` takes config and image processor of the
            model that filled the cache, and refuses another model.

    Raises:
        ConfigError: the image has another size than the stored one, `keep` is out of range, or the
            model is not to be had.
        KeyNotFoundError: no such key.
        CacheFormatError: there is no cache, or its bytes are damaged.
        SampleError: the image cannot be decoded.
        StorageError: the image cannot be read.
    """
    cache = open_cache(url)
    row = cache[key]
    if keep is not None:
        _check_keep(keep)
        row = cache.keeping(max(1, round(keep * row.grid[0] * row.grid[1] * row.grid[2])))[key]
    contents = [read_input(name) for name in images]
    pixels = [
        decode_image(content, key=name) for content, name in zip(contents, images, strict=True)
    ]
    _check_sizes(row, images, pixels)
    hashes = [hashlib.sha256(content).digest()[:16] for content in contents]
    same = len(images) > 1 or hashes == [cache.columns(key, ["content_hash"])["content_hash"]]
    settings = cache.identity["settings"]
    carving = _carving(
        settings["carver"]["name"],
        f"{_words(settings['carver']['options'])}; packed by {settings['codec']['name']}",
        row,
    )
    return ShownImage(
        name=key,
        note=f"{url}{'' if same else f'; {images[0]} is not the very file that was carved'}",
        seen=_under_grid(cache, row, pixels, fit),
        carvings=[carving],
    )


def _options(config: JobConfig, name: str, keep: float | None) -> Mapping[str, Any]:
    """Return the options of a carver: the config's own, with the budget that is asked for."""
    own = dict(config.carver.options)
    budget = {option: own.pop(option) for option in BUDGET_OPTIONS & own.keys()}
    given = own if name == config.carver.name else {}
    if keep is None:
        known = {field.name for field in dataclasses.fields(carvers.load(name))}
        return {**given, **{option: budget[option] for option in budget.keys() & known}}
    _check_keep(keep)
    option = budget_option(name)
    return given if option is None else {**given, option: keep}


def _check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ConfigError(f"--keep {keep}: must be a share of the tokens, above 0 and at most 1")


def _check_signals(name: str, encoder: Encoder, chosen: Mapping[str, Carver]) -> frozenset[str]:
    """Return the signals that all carvers read together."""
    for title, carver in chosen.items():
        if missing := carver.needs - encoder.yields:
            raise MissingSignalError(
                f"carver {title!r} needs {', '.join(sorted(missing))}, which encoder {name!r} "
                "cannot give: leave it out of --carvers"
            )
    return frozenset[str]().union(*(carver.needs for carver in chosen.values()))


def _carve(
    encoder: Encoder, chosen: Mapping[str, Carver], prepared: Sequence[Pixels], *, batch_size: int
) -> Iterator[tuple[SeenImage, dict[str, CarvedTokens]]]:
    """Yield what the model saw of each image, and what each carver left of it, in order."""
    for start in range(0, len(prepared), batch_size):
        batch = prepared[start : start + batch_size]
        results: dict[int, tuple[SeenImage, dict[str, CarvedTokens]]] = {}
        for group in encoder.encode_pixels(batch):
            carved = {name: carver.carve(group) for name, carver in chosen.items()}
            for row, index in enumerate(group.image_indices or range(len(batch))):
                seen = seen_image(
                    batch[index], group.grid, num_views=group.num_views, tiles=group.tiles
                )
                results[index] = seen, {name: tokens[row] for name, tokens in carved.items()}
        yield from (results[index] for index in range(len(batch)))


def _carving(name: str, note: str, tokens: CarvedTokens | CachedImage) -> Carving:
    return Carving(
        name=name, note=note, positions=tokens.positions.tolist(), sizes=tokens.sizes.tolist()
    )


def _words(options: Mapping[str, Any]) -> str:
    given = {name: value for name, value in options.items() if value is not None}
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in sorted(given.items()))


def _check_sizes(row: CachedImage, images: Sequence[str], pixels: Sequence[Pixels]) -> None:
    if len(images) not in (1, row.grid[0]):
        raise ConfigError(
            f"{row.key}: {len(images)} images for a row of {row.grid[0]} views; give one --image, "
            "or one for each frame"
        )
    for name, image in zip(images, pixels, strict=True):
        height, width = image.shape[:2]
        if (width, height) != (row.width, row.height):
            raise ConfigError(
                f"{name} has {width} x {height} pixels and the image of {row.key!r} had "
                f"{row.width} x {row.height}: give the file that was carved"
            )


def _under_grid(
    cache: CarvedCache, row: CachedImage, pixels: Sequence[Pixels], fit: Fit
) -> SeenImage:
    """Bring images under the grid of a row."""
    num_views, *grid = row.grid
    rows, columns = grid
    if fit == "model":
        encoder = _same_encoder(cache)
        prepared = [encoder.preprocess(image) for image in pixels]
    elif len(pixels) == num_views:
        size = (columns * CELL, rows * CELL)
        prepared = [np.asarray(_fitted(Image.fromarray(image), size, fit)) for image in pixels]
    else:
        raise ConfigError(
            f"--fit {fit}: one image cannot be cut into the {num_views} views of {row.key!r}; give "
            "one --image for each, or --fit model"
        )
    return seen_image(np.concatenate(prepared), (rows, columns), num_views=num_views)


def _fitted(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    if fit == "crop":
        return ImageOps.fit(image, size)
    if fit == "pad":
        return ImageOps.pad(image, size, color=_PADDING)
    return image.resize(size, Image.Resampling.BICUBIC)


def _same_encoder(cache: CarvedCache) -> Encoder:
    """Build the encoder that filled a cache, without weights, and check that it is the same."""
    config, settings = cache.identity["config"], cache.identity["settings"]["encoder"]
    remedy = "give --fit crop, --fit pad or --fit stretch if you know which the model does"
    try:
        carver = carvers.build(config["carver"]["name"], config["carver"]["options"])
        encoder = encoders.build(config["encoder"]["name"], config["encoder"]["options"])
        described = encoder.describe(carver.needs)
    except ConfigError as err:
        raise ConfigError(
            f"the model that filled the cache is not to be had ({err}); {remedy}"
        ) from err
    changed = sorted(
        name for name in settings if name != "name" and _differs(name, settings, described)
    )
    if changed:
        raise ConfigError(
            f"the model found is not the one that filled the cache (other {', '.join(changed)}); "
            f"{remedy}"
        )
    return encoder


def _differs(name: str, settings: Mapping[str, Any], described: Mapping[str, Any]) -> bool:
    return json.dumps(settings[name]) != json.dumps(described.get(name))
