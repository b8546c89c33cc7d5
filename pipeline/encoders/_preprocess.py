"""From an image of any size to the pixels a tower takes, as the model's own processor makes them.

The geometry (pad, resize, crop) happens in uint8 on the CPU, the arithmetic (rescale, normalise) in
torch on the device: a prepared image is a quarter of the size of its floats. Which defaults hold
for a setting that a checkpoint leaves out is asked of the processor classes of transformers.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.encoders._base import Pixels
from pipeline.encoders._normalisation import Normalisation, triple
from pipeline.encoders._resize import RESIZERS, TORCH_FILTERS, Backend, check_pixels
from pipeline.errors import ConfigError

_PROCESSORS: Mapping[str, str] = {
    "BitImageProcessor": "bit",
    "CLIPImageProcessor": "clip",
    "LlavaImageProcessor": "llava",
    "SiglipImageProcessor": "siglip",
    "ViTImageProcessor": "vit",
}
_HANDLED = frozenset(
    [
        "do_resize",
        "size",
        "resample",
        "default_to_square",
        "do_center_crop",
        "crop_size",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
        "do_pad",
    ]
)
# These say nothing about the pixels of one RGB image given as (H, W, 3).
_WITHOUT_EFFECT = frozenset(
    [
        "image_processor_type",
        "feature_extractor_type",
        "processor_class",
        "do_convert_rgb",
        "device",
        "return_tensors",
        "disable_grouping",
        "image_seq_length",
        "_valid_processor_keys",
        "transformers_version",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """What an image processor does to one RGB image: pad, resize, crop, rescale, normalise.

    Sizes are (rows, columns). A step that is None is left out.
    """

    backend: Backend  # of transformers, whose pixels these are
    pad_color: tuple[int, int, int] | None  # pad to a square first
    shortest_edge: int | None  # resize to this, keeping the proportions; or
    size: tuple[int, int] | None  # resize to exactly this
    resample: int  # Pillow's number of the filter
    crop: tuple[int, int] | None  # around the centre; zeros where the image is smaller
    normalise: Normalisation  # (B, H, W, 3) uint8 on any device to (B, 3, H, W) float32

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Rows and columns of every result; None if they depend on the image."""
        if self.crop is None and self.pad_color is not None and self.shortest_edge is not None:
            return (self.shortest_edge, self.shortest_edge)
        return self.crop or self.size

    def prepare(self, image: Pixels) -> Pixels:
        """Pad, resize and crop one (H, W, 3) uint8 image; may run in several threads at once.

        The result equals that of the backend of transformers before it rescales, with two
        exceptions. On an x86 CPU without AVX2 torchvision resizes bilinearly by way of floats;
        here the pixels are the same on every CPU. With Pillow an image so elongated that more
        than three quarters of the resized image would be cut off is resized in the cropped part
        only, in two calls. Photographs then differ by 1 of 255 at most; on pixel noise in images
        taller than four times their width up to 31 of 255 were seen.

        Raises:
            EncodeError: the image is so elongated that it would fill memory on the way.
        """
        if self.pad_color is not None:
            image = _pad_to_square(image, self.pad_color)
        target = self._resized(*image.shape[:2])
        if target is not None and target != image.shape[:2]:
            image = RESIZERS[self.backend](image, target, self.resample, self.crop)
        if self.crop is not None and self.crop != image.shape[:2]:
            image = _center_crop(image, self.crop, self.backend)
        return np.ascontiguousarray(image)

    def _resized(self, height: int, width: int) -> tuple[int, int] | None:
        if self.shortest_edge is None:
            return self.size
        short, long = min(height, width), max(height, width)
        edges = (self.shortest_edge, int(self.shortest_edge * long / short))
        return edges if height <= width else edges[::-1]


def read_preprocessor(settings: Mapping[str, Any], *, model: str, backend: Backend) -> Preprocessor:
    """Read an image processor's settings as a checkpoint holds them.

    Args:
        settings: content of `preprocessor_config.json`.
        model: named in messages.
        backend: of transformers, whose pixels are wanted.

    Raises:
        ConfigError: a setting is not supported; it is named.
    """
    kind = _kind(settings, model)
    _reject_unknown(settings, kind, model)
    module = importlib.import_module(
        f"transformers.models.{_PROCESSORS[kind]}.image_processing_pil_{_PROCESSORS[kind]}"
    )
    given = {name: value for name, value in settings.items() if name in _HANDLED}
    try:
        own = getattr(module, f"{kind}Pil")(**given)
    except (TypeError, ValueError) as err:
        reason = " ".join(str(err).split())
        raise ConfigError(
            f"image processor of model {model!r}: {reason}; correct its settings {given}"
        ) from err
    shortest_edge, size = _resize_target(own, model) if own.do_resize else (None, None)
    resample = _resample(own.resample, model)
    if own.do_resize and backend == "torchvision" and resample not in TORCH_FILTERS:
        remedy = "torch has no such filter, set the encoder's option 'resize: pillow'"
        raise _unsupported("resample", resample, model, remedy)
    pads = bool(own.do_pad) and kind == "LlavaImageProcessor"
    return Preprocessor(
        backend=backend,
        pad_color=_pad_color(own.image_mean) if pads else None,
        shortest_edge=shortest_edge,
        size=size,
        resample=resample,
        crop=(own.crop_size.height, own.crop_size.width) if own.do_center_crop else None,
        normalise=Normalisation.of(own),
    )


def _kind(settings: Mapping[str, Any], model: str) -> str:
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    kind = str(name).replace("FeatureExtractor", "ImageProcessor")
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    if kind not in _PROCESSORS:
        raise _unsupported("image_processor_type", name, model, f"known: {', '.join(_PROCESSORS)}")
    return kind


def _reject_unknown(settings: Mapping[str, Any], kind: str, model: str) -> None:
    for name, value in settings.items():
        if name in _WITHOUT_EFFECT or value is None or value is False:
            continue
        if name == "do_pad" and kind != "LlavaImageProcessor":
            raise _unsupported(name, value, model, "only LlavaImageProcessor pads each image")
        if name == "data_format" and value in ("channels_first", "ChannelDimension.FIRST"):
            continue
        if name not in _HANDLED:
            raise _unsupported(name, value, model, "remove it if it has no effect on pixels")


def _resize_target(own: Any, model: str) -> tuple[int | None, tuple[int, int] | None]:  # noqa: ANN401
    given = {name: value for name, value in dict(own.size).items() if value}
    if set(given) == {"shortest_edge"}:
        return int(given["shortest_edge"]), None
    if set(given) == {"height", "width"}:
        return None, (int(given["height"]), int(given["width"]))
    raise _unsupported("size", given, model, "known: shortest_edge alone, or height and width")


def _resample(value: object, model: str) -> int:
    if value is None:
        return int(Image.Resampling.BILINEAR)
    try:
        return int(Image.Resampling(int(value)))  # type: ignore[call-overload]
    except (TypeError, ValueError) as err:
        raise _unsupported("resample", value, model, "known: Pillow's numbers 0 to 5") from err


def _unsupported(name: str, value: object, model: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"image processor of model {model!r}: setting {name!r} = {value!r} is not supported; "
        f"{remedy}"
    )


def _pad_color(mean: Any) -> tuple[int, int, int]:  # noqa: ANN401
    first, second, third = (int(number * 255) for number in triple(mean))
    return first, second, third


def _pad_to_square(image: Pixels, color: tuple[int, int, int]) -> Pixels:
    height, width = image.shape[:2]
    if height == width:
        return image
    edge = max(height, width)
    check_pixels(edge, edge, image)
    padded = np.empty((edge, edge, 3), dtype=np.uint8)
    padded[:] = color
    top, left = (edge - height) // 2, (edge - width) // 2
    padded[top : top + height, left : left + width] = image
    return padded


def _center_crop(image: Pixels, crop: tuple[int, int], backend: Backend) -> Pixels:
    (height, width), (rows, columns) = image.shape[:2], crop
    top, left = (height - rows) // 2, (width - columns) // 2
    if top < 0 or left < 0:
        # Where the missing part is odd, the backends put its larger half on opposite sides.
        half_up = 1 if backend == "pillow" else 0
        above = (max(0, rows - height) + half_up) // 2
        before = (max(0, columns - width) + half_up) // 2
        canvas = np.zeros((max(height, rows), max(width, columns), 3), dtype=np.uint8)
        canvas[above : above + height, before : before + width] = image
        image, top, left = canvas, max(0, top + above), max(0, left + before)
    return image[top : top + rows, left : left + columns]
