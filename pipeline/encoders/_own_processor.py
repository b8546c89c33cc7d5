"""The image processor of a checkpoint as the class that transformers has for it.

Families that cut an image into tiles have rules of their own for it; those are theirs to run, on
uint8. What the class would do last, rescaling and normalising, happens on the device instead
(`_normalisation.py`): a prepared image is a quarter of the size of its floats.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers.image_processing_backends import PilBackend

from pipeline.encoders._base import Pixels
from pipeline.encoders._normalisation import Normalisation
from pipeline.encoders._resize import RESIZERS, TORCH_FILTERS, Backend
from pipeline.errors import ConfigError, EncodeError
from pipeline.types import TileLayout

_MODULES: Mapping[str, str] = {
    "BlipImageProcessor": "blip",
    "CLIPImageProcessor": "clip",
    "Gemma3ImageProcessor": "gemma3",
    "GotOcr2ImageProcessor": "got_ocr2",
    "Idefics3ImageProcessor": "idefics3",
    "LlavaNextImageProcessor": "llava_next",
    "LlavaOnevisionImageProcessor": "llava_onevision",
    "Qwen2VLImageProcessor": "qwen2_vl",
    "Siglip2ImageProcessor": "siglip2",
    "SiglipImageProcessor": "siglip",
    "SmolVLMImageProcessor": "smolvlm",
    "ViTImageProcessor": "vit",
}
KNOWN_PROCESSORS = tuple(_MODULES)


class Views(np.ndarray):
    """A prepared image of several views: (V * rows, columns, 3) uint8, one below the other.

    Attributes:
        num_views: V.
        tiles: how the views behind the first lie; None where there are none.
    """

    num_views: int
    tiles: TileLayout | None

    @classmethod
    def of(cls, views: Sequence[Pixels], tiles: TileLayout | None) -> "Views":
        """Join (rows, columns, 3) views of one size."""
        joined = np.concatenate(views).view(cls)
        joined.num_views, joined.tiles = len(views), tiles
        return joined


class OwnProcessor:
    """An image processor that leaves the arithmetic out.

    Args:
        settings: content of `preprocessor_config.json`.
        model: named in messages.
        backend: of transformers, whose pixels are wanted.
        kinds: names of the classes that the family uses.
        overrides: settings to change.

    Raises:
        ConfigError: another class, or a setting that it does not take.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        model: str,
        backend: Backend,
        kinds: Sequence[str],
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
        kind = name.removesuffix("Fast").removesuffix("Pil")
        if kind not in kinds:
            raise ConfigError(
                f"image processor of model {model!r} is {name!r}; known for this family: "
                f"{', '.join(kinds)}"
            )
        folder = f"transformers.models.{_MODULES[kind]}"
        module = importlib.import_module(f"{folder}.image_processing_pil_{_MODULES[kind]}")
        wanted = getattr(module, f"{kind}Pil")
        wanted = type(f"{kind}Uint8", (wanted, _Resizing), {"pixels_of": backend})
        try:
            self.own = wanted(**{**settings, **(overrides or {})})
        except (TypeError, ValueError) as err:
            reason = " ".join(str(err).split())
            raise ConfigError(f"image processor of model {model!r}: {reason}") from err
        if backend == "torchvision" and int(self.own.resample) not in TORCH_FILTERS:
            raise ConfigError(
                f"image processor of model {model!r}: torch has no filter {self.own.resample}; set "
                "the encoder's option 'resize: pillow'"
            )
        self.normalise = Normalisation.of(self.own)

    def __call__(self, image: Pixels, **options: Any) -> Any:  # noqa: ANN401
        """Return the processor's outputs for one (H, W, 3) image, pixels still 0 to 255.

        Raises:
            EncodeError: it refuses the image.
        """
        try:
            return self.own(
                images=image,
                do_rescale=False,
                do_normalize=False,
                input_data_format="channels_last",
                **options,
            )
        except ValueError as err:
            reason = " ".join(str(err).split())
            raise EncodeError(
                f"image of {image.shape[0]} x {image.shape[1]} pixels: {reason}",
                key="",
                reason="refused_by_processor",
            ) from err


def views_of(pixels: Any, *, model: str) -> list[Pixels]:  # noqa: ANN401
    """Return (V, 3, rows, columns) pixels of a processor as (rows, columns, 3) uint8 views.

    Raises:
        ConfigError: they are no whole numbers from 0 to 255: the processor did more to them.
    """
    values = np.stack([np.asarray(view) for view in pixels])
    whole = values.astype(np.uint8)
    if values.dtype != np.uint8 and not np.array_equal(whole, values):
        raise ConfigError(
            f"image processor of model {model!r} gives pixels that are no whole numbers from 0 to "
            "255 before it rescales; correct preprocessor_config.json"
        )
    return [np.ascontiguousarray(view.transpose(1, 2, 0)) for view in whole]


class _Resizing(PilBackend):  # type: ignore[misc]
    """Between a processor and its backend: resizes as either backend of transformers does."""

    pixels_of: Backend

    def resize(
        self,
        image: NDArray[np.uint8],
        size: Any,  # noqa: ANN401
        resample: int | None = None,
        **_: object,
    ) -> NDArray[np.uint8]:
        """Resize a (3, H, W) image."""
        height, width = image.shape[1:]
        if size.height and size.width:
            target = int(size.height), int(size.width)
        elif size.shortest_edge and not size.longest_edge:
            short, long = min(height, width), max(height, width)
            edges = int(size.shortest_edge), int(size.shortest_edge * long / short)
            target = edges if height <= width else edges[::-1]
        else:
            raise ValueError(
                f"size {size} is not supported: known are height and width, or shortest_edge alone"
            )
        if target == (height, width):
            return image
        pixels_HWC = np.ascontiguousarray(image.transpose(1, 2, 0))
        chosen = int(resample) if resample is not None else int(Image.Resampling.BILINEAR)
        resized = RESIZERS[self.pixels_of](pixels_HWC, target, chosen, None)
        return np.ascontiguousarray(resized.transpose(2, 0, 1))
