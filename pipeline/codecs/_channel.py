"""Codecs that divide every channel by a scale of the image before they round each token.

Source: He et al., "ZipCache" (arXiv 2405.14256), its channel-separable token-wise quantizer of
values; github.com/ThisisBillhe/ZipCache @ b6932b9.

D features, also called channels; K tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.codecs._affine import DTYPES, affine_codes
from pipeline.codecs._base import Codec
from pipeline.codecs._bits import pack_codes, packed_bytes, unpack_codes
from pipeline.codecs._rows import (
    JoinedRows,
    check_finite,
    chunks,
    damaged_head,
    join_rows,
    largest_per_token,
    to_bytes,
)
from pipeline.types import PackedTokens

LARGEST = 2.0**127  # rounding up must not make it infinite


@dataclass(frozen=True, kw_only=True)
class ChannelCodec(Codec):
    """Stores `value / scale of its channel` between the smallest and largest of each token.

    Attributes:
        scales: type of the channel scales. They only bring channels to a like size, so a short
            type with the range of float32 costs no accuracy; float32 gives the published codes.
    """

    scales: Literal["bfloat16", "float32"] = field(default="bfloat16")

    aux_bytes: ClassVar[int] = 8
    whole_image: ClassVar[bool] = True
    error_of: ClassVar[Literal["token", "image", "image_rms"]] = "image"
    smallest: ClassVar[float] = 2.0**-100

    bits: ClassVar[int]
    """Of a code."""

    @property
    def max_error(self) -> float:
        """1.01 / (2^bits - 1): 0.4 % of the image's largest |value| for 8 bits, 6.7 % for 4.

        Let m be that value and m_c the largest |value| of channel c, so its scale is sqrt(m_c) and
        no scaled value is above sqrt(m_c) <= sqrt(m). The scaled values of a token span at most
        2 sqrt(m), so a step is at most 2 sqrt(m) / (2^bits - 1), rounding moves a scaled value by
        half a step, and scaling back multiplies that by sqrt(m_c): at most m / (2^bits - 1). A
        bfloat16 scale is off by at most 2^-9 of itself, which cancels but where two channels are
        off in opposite ways: 0.4 %. Float32 adds less than 0.01 %.
        """
        return 1.01 / (2**self.bits - 1)

    def token_bytes(self, width: int) -> int:
        """Return the bytes of `width` codes, filled up to a whole byte."""
        return packed_bytes(width, self.bits)

    def pack(self, features: Tensor) -> PackedTokens:
        """Scale and round one image's (K, D) features; see `Codec.pack`."""
        rows_KD, _ = largest_per_token(features, codec=self, limit=LARGEST)
        scale_D = channel_scales(rows_KD).to(DTYPES[self.scales])
        scaled_KD = divide_channels(rows_KD, scale_D)
        codes_KD, minimum_K1, step_K1 = affine_codes(scaled_KD, steps=2**self.bits - 1)
        return PackedTokens(
            tokens=to_bytes(pack_codes(codes_KD, self.bits)),
            aux=to_bytes(torch.cat([minimum_K1, step_K1], dim=1)),
            num_tokens=len(rows_KD),
            head=to_bytes(scale_D),
        )

    def unpack(
        self,
        packed: Sequence[PackedTokens],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Join the images' codes, and scale them back on `device`; see `Codec.unpack`.

        Raises:
            CacheFormatError: also if a scale, minimum or step is infinite or NaN.
        """
        joined = join_rows(self, packed, width_of=self._width_of)
        heads = bytearray().join(image.head for image in packed)
        scale_BD = torch.frombuffer(heads, dtype=DTYPES[self.scales]).view(len(packed), -1)
        check_finite(scale_BD, "the scales of channels")
        scale_BD = scale_BD.to(device).float()
        affine_K2, image_K = token_numbers(joined, device)
        rows_KT = joined.rows.to(device, non_blocking=True)
        features_KD = torch.empty((len(rows_KT), joined.width), dtype=dtype, device=rows_KT.device)
        for part in chunks(features_KD):
            codes_KD = unpack_codes(rows_KT[part], self.bits, width=joined.width)
            features_KD[part] = restore(codes_KD, affine_K2[part], scale_BD[image_K[part]])
        return features_KD

    def _width_of(self, image: PackedTokens, index: int) -> int:
        itemsize = DTYPES[self.scales].itemsize
        if not image.head or len(image.head) % itemsize:
            raise damaged_head(image, index, f"{itemsize} for each feature")
        return len(image.head) // itemsize


def channel_scales(rows_KD: Tensor) -> Tensor:
    """Return the (D,) square roots of each channel's largest |value| over the image."""
    return rows_KD.abs().amax(dim=0).sqrt_()


def divide_channels(rows_KD: Tensor, scale_D: Tensor) -> Tensor:
    """Return the scaled values; those of a channel whose scale is 0 are 0."""
    scale_D = scale_D.float()
    return rows_KD / torch.where(scale_D > 0, scale_D, 1)


def token_numbers(joined: JoinedRows, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return (K, 2) minimum and step of each token, and the (K,) number of its image."""
    affine_K2 = torch.frombuffer(joined.aux, dtype=torch.float32).view(-1, 2)
    check_finite(affine_K2, "minima and steps")
    return affine_K2.to(device), joined.images().to(device)


def restore(codes_KD: Tensor, affine_K2: Tensor, scale_KD: Tensor) -> Tensor:
    """Return the (K, D) features of some codes."""
    # Three steps, not a fused one: the same bits on every device.
    return codes_KD.float().mul_(affine_K2[:, 1:]).add_(affine_K2[:, :1]).mul_(scale_KD)
