"""What encoders of single images share: pixels in, batches of one shape, tokens and signals out."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.encoders._base import Pixels
from pipeline.encoders._checkpoint_encoder import CheckpointEncoder
from pipeline.encoders._preprocess import Preprocessor, read_preprocessor
from pipeline.encoders._resize import Backend
from pipeline.encoders._signals import SHALLOW_SIGNALS
from pipeline.encoders._tower_plan import TowerPlan
from pipeline.errors import EncodeError
from pipeline.types import VisualTokens


class LoadedModel(Protocol):
    """The weights of an encoder and how to run them."""

    def __call__(self, pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (B, N, D) features and the signals asked for."""


@dataclass(kw_only=True)
class ImageEncoder(CheckpointEncoder[LoadedModel]):
    """An encoder with one vision tower that takes one image at a time.

    Attributes:
        resize: backend of transformers' image processors whose pixels the model is given.
            `torchvision` is what transformers takes wherever that package is installed; it is
            not needed here. `pillow` is what it takes elsewhere, and what its `*Pil` classes do.
        shallow_layer: index from 0 of the tower layer that `shallow_attention` and `shallow_keys`
            are taken from, at most that of the selected features; None for three eighths of the
            tower, the tenth of 24 layers, and then a tower cut shorter than that gives neither.
    """

    resize: Backend = "torchvision"
    shallow_layer: int | None = None

    @abstractmethod
    def _read_plan(self) -> TowerPlan:
        """Read from the config alone what of the tower is wanted, and check it."""

    @abstractmethod
    def _describe_numbers(self, signals: frozenset[str]) -> Mapping[str, Any]:
        """Return the options of a family that change the numbers."""

    def _describe_options(self, signals: frozenset[str]) -> Mapping[str, Any]:
        shallow = {"shallow_layer": self._plan.shallow_block} if signals & SHALLOW_SIGNALS else {}
        return {"resize": self.resize, **self._describe_numbers(signals), **shallow}

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the grid of the tokens of an image of this size."""
        return self._plan.grid(height, width)

    @cached_property
    def _plan(self) -> TowerPlan:
        return self._read_plan()

    @cached_property
    def _preprocessor(self) -> Preprocessor:
        return read_preprocessor(self._checkpoint.processor, model=self.model, backend=self.resize)

    def _check_model(self) -> None:
        self._plan.check_size(self._preprocessor.output_size, model=self.model)

    def preprocess(self, image: Pixels) -> Pixels:
        """Resize and crop one image; see `Encoder`.

        Raises:
            EncodeError: the image is too elongated, or smaller than a patch and not enlarged.
        """
        prepared = self._preprocessor.prepare(image)
        if 0 in self._plan.grid(*prepared.shape[:2]):
            raise EncodeError(
                f"image of {prepared.shape[0]} x {prepared.shape[1]} pixels is smaller than one "
                f"patch of {self._plan.patch_size}",
                key="",
                reason="too_small",
            )
        return prepared

    def encode_pixels(self, prepared: Sequence[Pixels]) -> list[VisualTokens]:
        """Encode preprocessed images; see `Encoder`.

        Raises:
            NotLoadedError: before `load`.
        """
        loaded = self._weights
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(prepared):
            groups.setdefault(self._plan.trim(*image.shape[:2]), []).append(index)
        return [
            self._encode_group(loaded, [prepared[i] for i in indices], size, tuple(indices))
            for size, indices in groups.items()
        ]

    def _encode_group(
        self,
        loaded: LoadedModel,
        images: Sequence[Pixels],
        size: tuple[int, int],
        indices: tuple[int, ...],
    ) -> VisualTokens:
        height, width = size
        on_gpu = self._device.type == "cuda"
        pixels_BHWC = torch.empty(
            (len(images), height, width, 3), dtype=torch.uint8, pin_memory=on_gpu
        )
        rows = pixels_BHWC.numpy()
        for place, image in enumerate(images):
            rows[place] = image[:height, :width]
        with torch.inference_mode():
            moved_BHWC = pixels_BHWC.to(self._device, non_blocking=True)
            pixels_BCHW = self._preprocessor.normalise(moved_BHWC).to(self._dtype)
            features_BND, signals = loaded(pixels_BCHW)
        return VisualTokens(
            features=features_BND,
            grid=self._grid(height, width),
            signals=signals,
            image_indices=indices,
        )
