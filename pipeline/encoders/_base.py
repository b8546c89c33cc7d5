"""What an encoder is: the owner of a model, from pixels to visual tokens and signals."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict

from pipeline.types import VisualTokens

Pixels = NDArray[np.uint8]
"""(H, W, 3) uint8, RGB."""


@dataclass(kw_only=True)
class Encoder(ABC):
    """Turns images into visual tokens and the signals carvers ask for.

    A subclass is a dataclass whose public fields are its options. Building one is cheap and
    touches no weights; it can be pickled until `load` has run.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    @abstractmethod
    def yields(self) -> frozenset[str]:
        """Names of the signals this encoder can give with these options."""

    @property
    @abstractmethod
    def width(self) -> int:
        """D of the features it gives with these options; read from the model's config."""

    @abstractmethod
    def describe(self, signals: frozenset[str] = frozenset()) -> Mapping[str, Any]:
        """Return what identifies the stored numbers: model, revision, weights digest, stage.

        JSON values only; enters the work fingerprint, so it holds all that changes the features
        or these signals, and nothing else. Reads configs, file headers and samples of weights.

        Args:
            signals: those the carver asks for. What only other signals depend on is left out;
                names that are not in `yields` are ignored.

        Raises:
            ConfigError: the model cannot be found or is not of this family.
        """

    @abstractmethod
    def load(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        signals: frozenset[str] = frozenset(),
    ) -> None:
        """Load the weights this stage and these signals need, and no others.

        Raises:
            MissingSignalError: a signal is not in `yields`.
            ConfigError: a needed tensor is missing from the checkpoint.
        """

    @abstractmethod
    def preprocess(self, image: Pixels) -> Pixels:
        """Resize and crop one image as the model's own image processor does, in uint8.

        Needs no weights and may run in several threads at once. Scaling to floats and
        normalising happen on the device, in `encode_pixels`.
        """

    @abstractmethod
    def encode_pixels(self, prepared: Sequence[Pixels]) -> list[VisualTokens]:
        """Encode preprocessed images.

        Args:
            prepared: results of `preprocess`, B in all.

        Returns:
            One `VisualTokens` per grid that occurs; `image_indices` says which of the B images
            each holds. Only the signals given to `load` are computed.
        """

    def encode(self, images: Sequence[Pixels]) -> list[VisualTokens]:
        """Preprocess and encode images given as (H, W, 3) uint8 RGB arrays of any size."""
        return self.encode_pixels([self.preprocess(image) for image in images])
