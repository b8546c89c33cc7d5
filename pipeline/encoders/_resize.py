"""Resizing (H, W, 3) uint8 images as either backend of transformers' image processors does.

Source: `TorchvisionBackend.resize` and `PilBackend.resize` of transformers 5.23. The first calls
    `torch.nn.functional.interpolate` by way of torchvision, the second `Image.resize` of Pillow;
    here both are called directly, so that torchvision need not be installed.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image

from pipeline.encoders._base import Pixels
from pipeline.errors import EncodeError

Backend: TypeAlias = Literal["torchvision", "pillow"]
Size: TypeAlias = tuple[int, int]  # rows, columns
Resizer: TypeAlias = Callable[[Pixels, Size, int, Size | None], Pixels]

# What torchvision calls Pillow's filters; for box (4) and Hamming (5) torch has no kernel.
TORCH_FILTERS: Mapping[int, str] = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# Beyond this many times the cropped area, Pillow resizes the cropped part only.
_MAX_WASTE = 4
_MAX_PIXELS = 2**27  # of one intermediate image: 384 MiB in torch, 512 MiB in Pillow


def check_pixels(height: int, width: int, image: Pixels, *, remedy: str = "") -> None:
    """Refuse an image of which an intermediate of this size would be made.

    Raises:
        EncodeError: the intermediate has more than 2**27 pixels.
    """
    if height * width > _MAX_PIXELS:
        raise EncodeError(
            f"image of {image.shape[0]} x {image.shape[1]} pixels is too elongated: it would be "
            f"{height} x {width} on its way to the model{remedy}",
            key="",
            reason="too_elongated",
        )


def _resize_by_torch(image: Pixels, target: Size, resample: int, crop: Size | None) -> Pixels:
    """Resize to `target`, always in full: torch cannot start between two pixels.

    The results were the same bit for bit with torch's kernels for AVX-512, AVX2 and any CPU.
    """
    height, width = target
    # As Pillow, torch resizes the columns of all rows first.
    check_pixels(
        max(height, image.shape[0]),
        width,
        image,
        remedy="; 'resize: pillow' resizes only what the crop keeps" if crop else "",
    )
    # The batch is added before the axes move: then torch sees channels last, which its fast kernel
    # reads and writes without repacking. A read-only array would make torch warn.
    rows = np.require(image, requirements=["C", "W"])
    pixels_BCHW = torch.from_numpy(rows)[None].permute(0, 3, 1, 2)
    mode = TORCH_FILTERS[resample]
    resized_BCHW = torch.nn.functional.interpolate(
        pixels_BCHW, size=target, mode=mode, antialias=mode != "nearest-exact"
    )
    return resized_BCHW[0].permute(1, 2, 0).numpy()


def _resize_by_pillow(image: Pixels, target: Size, resample: int, crop: Size | None) -> Pixels:
    """Resize to `target`, or to the part of it that the crop keeps."""
    height, width = target
    if crop is None or crop[0] > height or crop[1] > width:
        crop = None
    elif math.prod(target) > _MAX_WASTE * math.prod(crop):
        return _resize_part(image, target, resample, crop)
    check_pixels(max(height, image.shape[0]), width, image)  # Pillow resizes columns first
    resized = Image.fromarray(image).resize((width, height), resample)
    if crop is not None:
        top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
        resized = resized.crop((left, top, left + crop[1], top + crop[0]))
    return np.asarray(resized)


def _resize_part(image: Pixels, target: Size, resample: int, crop: Size) -> Pixels:
    """Resize as if to `target` and crop, but compute only what the crop keeps.

    In two steps, columns then rows, because that is the order of Pillow's own two passes.
    """
    rows, columns = crop
    x_scale, y_scale = image.shape[1] / target[1], image.shape[0] / target[0]
    left, top = (target[1] - columns) // 2 * x_scale, (target[0] - rows) // 2 * y_scale
    right, bottom = left + columns * x_scale, top + rows * y_scale
    # Rows beyond the part that the widest filter (Lanczos, 3) still reaches.
    margin = math.ceil(3 * max(1.0, y_scale)) + 1
    first = max(0, math.floor(top) - margin)
    last = min(image.shape[0], math.ceil(bottom) + margin)
    check_pixels(last - first, columns, image)
    strip = Image.fromarray(image[first:last])
    strip = strip.resize((columns, last - first), resample, box=(left, 0, right, last - first))
    part = strip.resize((columns, rows), resample, box=(0, top - first, columns, bottom - first))
    return np.asarray(part)


# Each takes an image, the size to resize to, Pillow's number of the filter and the crop that
# follows or None, and returns the whole resized image or what the crop keeps of it.
RESIZERS: Mapping[Backend, Resizer] = {
    "torchvision": _resize_by_torch,
    "pillow": _resize_by_pillow,
}
