"""What a codec is: a way to store each token on its own in few bytes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from pipeline.types import PackedTokens


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """Packs (K, D) features so that any prefix of tokens can be unpacked alone.

    A subclass is a frozen dataclass whose fields are its options, every one with a default.
    Numbers are stored little-endian. What a token unpacks to depends on its own bytes in `tokens`
    and `aux`, the `head` of its image and the options only, so any cut of `tokens` and `aux` at a
    whole token, with the whole head, unpacks to the same values.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    aux_bytes: ClassVar[int] = 0
    """Bytes per token beside the codes (a scale, say)."""

    whole_image: ClassVar[bool] = False
    """Whether what is stored for a token depends on the other tokens of its image too. Where it
    does not, the head depends on the width alone. Where it does, a prefix equals what carving to
    fewer tokens would have stored within the error of the codec, not bit for bit."""

    error_of: ClassVar[Literal["token", "image", "image_rms"]] = "token"
    """What `max_error` bounds. `token`: each |unpacked - original|, relative to the largest |value|
    of its token. `image`: the same, relative to the largest |value| of its image. `image_rms`: the
    root mean square of unpacked - original over an image, relative to its largest |value|."""

    smallest: ClassVar[float] = 0.0
    """Where the stored type runs out: in `max_error`, a token or image whose largest |value| is
    below this counts as one of this size."""

    @property
    @abstractmethod
    def max_error(self) -> float:
        """Largest error of the kind that `error_of` names.

        A guarantee for all features that `pack` takes, not a typical value; how it is proven
        stands with each codec. Features of 64 bits are rounded to float32 first, and the error is
        counted from there.
        """

    @abstractmethod
    def token_bytes(self, width: int) -> int:
        """Return the bytes of `tokens` that one token of `width` features takes."""

    @abstractmethod
    def pack(self, features: Tensor) -> PackedTokens:
        """Pack the tokens of one image in the order given.

        Args:
            features: (K, D), K and D at least 1, most important token first, any float dtype,
                any device, finite.

        Raises:
            NonFiniteError: a value is NaN or infinite, or does not fit the stored type.
            ValueError: `features` is not (K, D) or holds nothing.
            TypeError: `features` are not floats.
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
            packed: images of one width, each whole or cut to a prefix of its tokens.
            device: where the result is wanted; the codes travel, not the floats.
            dtype: of the result; a value beyond its range becomes infinite.

        Returns:
            (sum of K, D) features, image after image. Damaged bytes of the right length give other
            values, even infinite ones: it is the checksums of a cache's rows that find damage.

        Raises:
            CacheFormatError: no images, an image without tokens, lengths that do not fit the
                number of tokens, a damaged head, or images of different widths.
        """
