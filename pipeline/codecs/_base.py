"""What a codec is: a way to store each token on its own in few bytes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from pipeline.types import PackedTokens


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """Packs (K, D) features so that any prefix of tokens can be unpacked alone.

    A subclass is a frozen dataclass whose fields are its options, every one with a default.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    aux_bytes: ClassVar[int] = 0
    """Bytes per token beside the codes (a scale, say)."""

    @property
    @abstractmethod
    def max_error(self) -> float:
        """Largest |unpacked - original| of a token, relative to its largest |value|."""

    @abstractmethod
    def token_bytes(self, width: int) -> int:
        """Return the bytes that the codes of one token of `width` features take."""

    @abstractmethod
    def pack(self, features: Tensor) -> PackedTokens:
        """Pack the tokens of one image in the order given.

        Args:
            features: (K, D), any float dtype, any device, finite.

        Raises:
            NonFiniteError: a value is NaN or infinite, or does not fit the stored type.
        """

    @abstractmethod
    def unpack(
        self,
        packed: Sequence[PackedTokens],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Unpack the tokens of several images at once.

        Args:
            packed: images, each whole or cut to a prefix of its tokens.
            device: where the result is wanted; the codes travel, not the floats.
            dtype: of the result.

        Returns:
            (sum of K, D) features, image after image.
        """
