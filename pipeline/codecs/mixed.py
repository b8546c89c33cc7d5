"""Store the more important tokens with more bits, after a scale per channel.

Source: He et al., "ZipCache" (arXiv 2405.14256), its mixed precision of values;
github.com/ThisisBillhe/ZipCache @ b6932b9 (MIT). With `scales: float32` codes, minima, steps and
scales equal the published ones.
Differs: importance is the carver's ranking, not attention scores; otherwise as `int4_channel`.
Cost: as `int4_channel`; D * low_bits / 8 + 8 bytes a token, D * (high_bits - low_bits) / 8 more of
each important token: 3.2 bits a value with the defaults, and the scales of the channels.

All tokens of a row have one length, so the bits that only important tokens have lie in the head,
which every prefix needs: a reader of the first few tokens fetches those of all important ones.

Stored: head = uint32 D, uint32 S (how many tokens are important), D channel scales c, then of each
of the first S tokens the high bits of its codes, packed as in `_bits.py`. Per token the low
`low_bits` bits of D codes q, and float32 minimum m and step t beside them. The value is
(q * t + m) * c, in float32, in that order.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.codecs._affine import DTYPES, affine_codes
from pipeline.codecs._base import Codec
from pipeline.codecs._bits import pack_codes, packed_bytes, unpack_codes
from pipeline.codecs._channel import (
    LARGEST,
    channel_scales,
    divide_channels,
    restore,
    token_numbers,
)
from pipeline.codecs._rows import (
    check_finite,
    chunks,
    damaged_head,
    join_rows,
    largest_per_token,
    to_bytes,
)
from pipeline.types import PackedTokens

_LENGTHS = struct.Struct("<II")


@dataclass(frozen=True, kw_only=True)
class Mixed(Codec):
    """Stores the first tokens of an image with `high_bits` and the rest with `low_bits`.

    Attributes:
        low_share: of the tokens, the least important ones, that get `low_bits`; rounded down.
        high_bits: of a code of an important token.
        low_bits: of a code of the others; less than `high_bits`.
        scales: type of the channel scales, as in `int4_channel`.
    """

    low_share: Annotated[float, Field(ge=0, le=1)] = field(default=0.4)
    high_bits: Literal[4, 8] = field(default=4)
    low_bits: Literal[2, 4] = field(default=2)
    scales: Literal["bfloat16", "float32"] = field(default="bfloat16")

    aux_bytes: ClassVar[int] = 8
    whole_image: ClassVar[bool] = True
    error_of: ClassVar[Literal["token", "image", "image_rms"]] = "image"
    smallest: ClassVar[float] = 2.0**-100

    def __post_init__(self) -> None:
        """Refuse a mix of nothing."""
        if self.high_bits <= self.low_bits:
            raise ValueError(
                f"high_bits={self.high_bits} must be more than low_bits={self.low_bits}; "
                f"for one number of bits use codec int{self.low_bits}_channel"
            )

    @property
    def max_error(self) -> float:
        """1.01 / (2^low_bits - 1); of an important token 1.01 / (2^high_bits - 1).

        Both by the proof of `ChannelCodec.max_error`, which holds token by token.
        """
        return 1.01 / (2**self.low_bits - 1)

    def token_bytes(self, width: int) -> int:
        """Return the bytes of the low bits of `width` codes, filled up to a whole byte."""
        return packed_bytes(width, self.low_bits)

    def pack(self, features: Tensor) -> PackedTokens:
        """Scale and round one image's (K, D) features, most important first; see `Codec.pack`."""
        rows_KD, _ = largest_per_token(features, codec=self, limit=LARGEST)
        count, width = rows_KD.shape
        important = count - int(self.low_share * count)
        scale_D = channel_scales(rows_KD).to(DTYPES[self.scales])
        scaled_KD = divide_channels(rows_KD, scale_D)
        codes_KD, minimum_K1, step_K1 = self._round(scaled_KD, important)
        low_KD = codes_KD & (2**self.low_bits - 1)
        high_SD = codes_KD[:important] >> self.low_bits
        return PackedTokens(
            tokens=to_bytes(pack_codes(low_KD, self.low_bits)),
            aux=to_bytes(torch.cat([minimum_K1, step_K1], dim=1)),
            num_tokens=count,
            head=_LENGTHS.pack(width, important)
            + to_bytes(scale_D)
            + to_bytes(pack_codes(high_SD, self.high_bits - self.low_bits)),
        )

    def _round(self, scaled_KD: Tensor, important: int) -> tuple[Tensor, ...]:
        """Return (K, D) codes, (K, 1) minima and (K, 1) steps."""
        classes = (
            (scaled_KD[:important], self.high_bits),
            (scaled_KD[important:], self.low_bits),
        )
        parts = [affine_codes(rows, steps=2**bits - 1) for rows, bits in classes if len(rows)]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def unpack(
        self,
        packed: Sequence[PackedTokens],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Join low and high bits of the images' codes, and scale them back; see `Codec.unpack`.

        Raises:
            CacheFormatError: also if a scale, minimum or step is infinite or NaN.
        """
        joined = join_rows(self, packed, width_of=self._width_of)
        width = joined.width
        scale_BD = self._scales_of(packed).to(device).float()
        high_ST, before = self._high_bits_of(packed, width)
        affine_K2, image_K = token_numbers(joined, device)
        rows_KT, high_ST = joined.rows.to(device, non_blocking=True), high_ST.to(device)
        features_KD = torch.empty((len(rows_KT), width), dtype=dtype, device=rows_KT.device)
        for part in chunks(features_KD):
            codes_KD = unpack_codes(rows_KT[part], self.low_bits, width=width)
            marks = before[part.start : part.stop + 1]
            high_SD = unpack_codes(
                high_ST[marks[0] : marks[-1]], self.high_bits - self.low_bits, width=width
            )
            places_S = marks.diff().nonzero().squeeze(1).to(device)
            both_SD = codes_KD.index_select(0, places_S) | (high_SD << self.low_bits)
            codes_KD = codes_KD.index_copy(0, places_S, both_SD)
            features_KD[part] = restore(codes_KD, affine_K2[part], scale_BD[image_K[part]])
        return features_KD

    def _width_of(self, image: PackedTokens, index: int) -> int:
        if len(image.head) < _LENGTHS.size:
            raise damaged_head(image, index, f"at least {_LENGTHS.size}")
        width, important = _LENGTHS.unpack_from(image.head)
        expected = self._high_start(width) + important * self._high_bytes(width)
        if not width or len(image.head) != expected:
            raise damaged_head(image, index, f"{expected} for {important} of {width} features")
        return int(width)

    def _high_start(self, width: int) -> int:
        return _LENGTHS.size + width * DTYPES[self.scales].itemsize

    def _high_bytes(self, width: int) -> int:
        return packed_bytes(width, self.high_bits - self.low_bits)

    def _scales_of(self, packed: Sequence[PackedTokens]) -> Tensor:
        """Return the (B, D) channel scales."""
        width, _ = _LENGTHS.unpack_from(packed[0].head)
        stop = self._high_start(width)
        scales = bytearray().join(image.head[_LENGTHS.size : stop] for image in packed)
        scale_BD = torch.frombuffer(scales, dtype=DTYPES[self.scales]).view(len(packed), -1)
        check_finite(scale_BD, "the scales of channels")
        return scale_BD

    def _high_bits_of(self, packed: Sequence[PackedTokens], width: int) -> tuple[Tensor, Tensor]:
        """Return the high bits of all important tokens here, and how many lie before each token.

        Returns:
            (S, T) bytes, and (sum of K + 1,) counts on the CPU, rising by 1 at important tokens.
        """
        start, size = self._high_start(width), self._high_bytes(width)
        found, important = bytearray(), []
        for image in packed:
            here = min(image.num_tokens, _LENGTHS.unpack_from(image.head)[1])
            found += image.head[start : start + here * size]
            important.append(torch.arange(image.num_tokens) < here)
        before = torch.nn.functional.pad(torch.cat(important).cumsum(0), (1, 0))
        if not found:
            return torch.empty((0, size), dtype=torch.uint8), before
        return torch.frombuffer(found, dtype=torch.uint8).view(-1, size), before
