"""Does a carver keep the same tokens of an image that only a computer could tell apart?

Each disturbance is made of the pixels the model sees, so that it weighs the same for images of any
size. Source of the three: the stability probe proposed after Less Is More Until It Breaks (arXiv
2601.12042), which shows that rankings of tokens turn over under small noise.
"""

import hashlib
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.types import CarvedTokens

DISTURBANCES = ("jpeg", "shift", "noise")
"""JPEG of quality 95; one pixel to the right, the first column doubled; Gaussian noise of 2/255."""

_JPEG_QUALITY = 95
_NOISE = 2.0  # standard deviation in levels of 255

Pixels = NDArray[np.uint8]


def disturbed(pixels: Pixels, kind: str, *, key: str, seed: int) -> Pixels:
    """Return a disturbed copy of a preprocessed image.

    Args:
        pixels: (H, W, 3) uint8.
        kind: one of `DISTURBANCES`.
        key: of the image; decides its noise, together with the seed.
        seed: of the evaluation.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: no such kind.
    """
    if kind == "jpeg":
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "JPEG", quality=_JPEG_QUALITY)
        with Image.open(sink) as image:
            return np.array(image.convert("RGB"))
    if kind == "shift":
        return np.concatenate([pixels[:, :1], pixels[:, :-1]], axis=1)
    if kind == "noise":
        digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        noisy = pixels + generator.normal(0.0, _NOISE, pixels.shape)
        return np.rint(noisy).clip(0, 255).astype(np.uint8)
    raise ValueError(f"no disturbance {kind!r}; known: {', '.join(DISTURBANCES)}")


def overlap(kept: CarvedTokens, other: CarvedTokens, *, first: int) -> float:
    """Return the Jaccard index of what was kept of an image and of its disturbed copy.

    Args:
        kept: of the image.
        other: of the copy.
        first: only the tokens of ranks below this count.

    Returns:
        Kept in both / kept in either, in (0, 1] or 0.
    """
    left, right = (set(c.positions[c.ranks < first].tolist()) for c in (kept, other))
    return len(left & right) / len(left | right)
