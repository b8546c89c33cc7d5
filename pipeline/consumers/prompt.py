"""What a family's processor writes in place of an image in a prompt, around its tokens.

Source: the processors of transformers 5.23 (`replace_image_token`). Here each unbroken run of image
tokens is written as one; how many it stands for is known from the image.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.errors import ConfigError
from pipeline.types import TileLayout

_FAKE, _GLOBAL, _IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"


def image_marker(kind: str, tokenizer: Any) -> str | None:  # noqa: ANN401  (untyped)
    """Return what a user writes for an image; None where that is the image token, and no more.

    Args:
        kind: `model_type` of the model.
        tokenizer: of the model.

    Raises:
        ConfigError: the tokenizer lacks the token.
    """
    if kind == "gemma3":
        return _own(tokenizer, "boi_token")
    if kind == "internvl":
        return _own(tokenizer, "context_image_token", "<IMG_CONTEXT>")
    if kind in ("idefics3", "smolvlm", "paligemma"):
        return _IMAGE
    return None


def write_images(
    kind: str,
    tokenizer: Any,  # noqa: ANN401
    text: str,
    tiles: Sequence[TileLayout | None],
) -> str:
    """Return a prompt with each image written out.

    Args:
        kind: `model_type` of the model, one with a marker.
        tokenizer: of the model.
        text: with one marker for each image.
        tiles: of each image.
    """
    marker = image_marker(kind, tokenizer)
    assert marker is not None, kind
    first, *rest = text.split(marker)
    written = first + "".join(
        _written(kind, tokenizer, own) + after for own, after in zip(tiles, rest, strict=True)
    )
    if kind != "paligemma":
        return written
    # Its text begins behind the last image, with a token for it, and ends with a new line.
    end = written.rfind(_IMAGE) + len(_IMAGE) if rest else 0
    return f"{written[:end]}{tokenizer.bos_token}{written[end:]}\n"


def _written(kind: str, tokenizer: Any, tiles: TileLayout | None) -> str:  # noqa: ANN401
    if kind == "gemma3":
        begin, end = _own(tokenizer, "boi_token"), _own(tokenizer, "eoi_token")
        return f"\n\n{begin}{_own(tokenizer, 'image_token')}{end}\n\n"
    if kind == "internvl":
        begin, end = (
            _own(tokenizer, f"{name}_image_token", default)
            for name, default in (("start", "<img>"), ("end", "</img>"))
        )
        return f"{begin}{image_marker(kind, tokenizer)}{end}"
    if kind == "paligemma":
        return _IMAGE
    rows, columns = (0, 0) if tiles is None else (tiles.rows, tiles.columns)
    lines = [
        "".join(f"{_FAKE}<row_{row + 1}_col_{column + 1}>{_IMAGE}" for column in range(columns))
        for row in range(rows)
    ]
    # Of a tiled image the lines end, and an empty one stands before the whole.
    before = "".join(f"{line}\n" for line in lines) + ("\n" if lines else "")
    return f"{before}{_FAKE}{_GLOBAL}{_IMAGE}{_FAKE}"


def _own(tokenizer: Any, name: str, default: str | None = None) -> str:  # noqa: ANN401
    found = getattr(tokenizer, name, None) or default
    if found is None:
        raise ConfigError(
            f"the tokenizer has no {name}: it is not that of the model; load the model's processor"
        )
    return str(found)
