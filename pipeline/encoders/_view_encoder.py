"""What encoders share whose images are seen in views: a thumbnail and tiles, or the image alone."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.encoders._base import Pixels
from pipeline.encoders._checkpoint_encoder import CheckpointEncoder
from pipeline.encoders._own_processor import OwnProcessor, Views
from pipeline.encoders._resize import Backend
from pipeline.errors import EncodeError
from pipeline.types import TileLayout, VisualTokens


class LoadedViews(Protocol):
    """The weights of an encoder and how to run them on views of one size."""

    def __call__(self, pixels_VCHW: Tensor, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (V, n, D) features of n tokens a view, and the signals asked for."""


@dataclass(kw_only=True)
class ViewEncoder(CheckpointEncoder[LoadedViews]):
    """An encoder that prepares images by the rules of the family's own image processor.

    Attributes:
        resize: backend of transformers' image processors whose pixels the model is given; see
            the encoder `llava`.
    """

    resize: Backend = "torchvision"

    processors: ClassVar[tuple[str, ...]]
    """Names of the image processors of the family."""

    @abstractmethod
    def _views(self, image: Pixels) -> tuple[list[Pixels], TileLayout | None]:
        """Return the (rows, columns, 3) views of an image, a thumbnail first, and how they lie."""

    @abstractmethod
    def _view_grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the grid of tokens of a view of this size in pixels."""

    def _arrange(self, features_BVnD: Tensor, tiles: TileLayout | None) -> Tensor:
        """Return (B, N, D) tokens of images, view after view."""
        return features_BVnD.flatten(1, 2)

    @cached_property
    def _processor(self) -> OwnProcessor:
        return OwnProcessor(
            self._checkpoint.processor,
            model=self.model,
            backend=self.resize,
            kinds=self.processors,
        )

    def preprocess(self, image: Pixels) -> Pixels:
        """Resize, cut and pad one image; see `Encoder`.

        Returns:
            `Views`: all views one below the other, the thumbnail first.

        Raises:
            EncodeError: the image is too elongated, or the processor refuses it.
        """
        views, tiles = self._views(image)
        if 0 in self._view_grid(*views[0].shape[:2]):
            raise EncodeError(
                f"image of {image.shape[0]} x {image.shape[1]} pixels becomes one of "
                f"{views[0].shape[0]} x {views[0].shape[1]}, smaller than a token",
                key="",
                reason="too_small",
            )
        return Views.of(views, tiles)

    def encode_pixels(self, prepared: Sequence[Pixels]) -> list[VisualTokens]:
        """Encode preprocessed images; see `Encoder`.

        Raises:
            NotLoadedError: before `load`.
        """
        loaded = self._weights
        groups: dict[tuple[tuple[int, ...], int, TileLayout | None], list[int]] = {}
        for index, image in enumerate(prepared):
            assert isinstance(image, Views), "not the result of preprocess"
            groups.setdefault((image.shape, image.num_views, image.tiles), []).append(index)
        return [
            self._encode_group(loaded, [prepared[i] for i in indices], num_views, tiles, indices)
            for (_, num_views, tiles), indices in groups.items()
        ]

    def _encode_group(
        self,
        loaded: LoadedViews,
        images: Sequence[Pixels],
        num_views: int,
        tiles: TileLayout | None,
        indices: Sequence[int],
    ) -> VisualTokens:
        joined_VHWC = torch.from_numpy(
            np.stack(images)
            .view(np.ndarray)
            .reshape(len(images) * num_views, -1, *images[0].shape[1:])
        )
        grid = self._view_grid(*joined_VHWC.shape[1:3])
        with torch.inference_mode():
            moved_VHWC = joined_VHWC.to(self._device, non_blocking=True)
            pixels_VCHW = self._processor.normalise(moved_VHWC).to(self._dtype)
            features_VnD, signals = loaded(pixels_VCHW)
            features_BND = self._arrange(_by_image(features_VnD, num_views), tiles)
            signals = {
                name: self._arrange_signal(_by_image(signal, num_views), tiles)
                for name, signal in signals.items()
            }
        if tiles is not None and tiles.canvas is not None:
            grid, num_views = (1, features_BND.shape[1]), 1
        return VisualTokens(
            features=features_BND.contiguous(),
            grid=grid,
            signals=signals,
            image_indices=tuple(indices),
            num_views=num_views,
            tiles=tiles,
        )

    def _arrange_signal(self, signal_BVnX: Tensor, tiles: TileLayout | None) -> Tensor:
        """Do to a signal, of any number of axes behind the tokens, what is done to features."""
        if signal_BVnX.ndim == 3:
            return self._arrange(signal_BVnX[..., None], tiles)[..., 0]
        return self._arrange(signal_BVnX, tiles)


def _by_image(values_VnX: Tensor, num_views: int) -> Tensor:
    """Return (B, num_views, n, ...) of (B * num_views, n, ...)."""
    return values_VnX.reshape(-1, num_views, *values_VnX.shape[1:])
