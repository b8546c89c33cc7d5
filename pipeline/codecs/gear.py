"""Store codes of few bits by groups of features, the outliers, and a low-rank part of the error.

Source: Kang et al., "GEAR" (arXiv 2403.05527), its path of values with one head;
github.com/opengear-project/GEAR @ efe0bfe (MIT). With `numbers: float32` what is stored before the
low-rank part equals the published.
Differs: the low-rank part is a truncated singular value decomposition, not three power loops from a
random start; groups of equal values give no NaN; a last group may be shorter; `steps: corrected`
uses all 2^bits levels.
Cost: six rounds of subspace iteration an image; with the defaults and D = 1024 a token takes 4 bits
a value for codes, 0.5 for groups, 0.6 for outliers and 0.06 for its low-rank part, and an image
4 D more numbers: 1 bit a value with 64 tokens, 0.1 with 576.

Stored, with N for `numbers`, G = ceil(D / group), O = 2 int(D * outlier_share / 2), R = rank:
head = uint32 D, then N right[R][D]. Per token D codes q packed as in `_bits.py`, N minimum[G],
N step[G], uint16 place[O], N outlier[O], N left[R]. A value is q * step + minimum of its group, or
its outlier where it has one; added to it is left[0] * right[0], then left[1] * right[1], and so on,
in float32.
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
from pipeline.codecs._low_rank import directions
from pipeline.codecs._rows import (
    JoinedRows,
    check_finite,
    chunks,
    damaged_head,
    join_rows,
    largest_per_token,
    to_bytes,
)
from pipeline.codecs._sums import sum_rows
from pipeline.errors import CacheFormatError
from pipeline.types import PackedTokens

_LARGEST = {"float16": 65504.0, "float32": 1e30}  # products of the low-rank part stay finite
_WIDEST = 65536  # places of outliers have 16 bits
_WIDTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class Gear(Codec):
    """Stores features as quantised groups, outliers and a low-rank correction.

    Attributes:
        bits: of a code.
        group: features that share a minimum and a step.
        outlier_share: of a token's features, half of them the smallest, half the largest, that are
            stored as they are.
        rank: of the correction; 0 for none.
        steps: `corrected` spreads 2^bits levels over a group, `published` bits^2, as the code
            does: the same for 2 and 4 bits, 64 of 256 levels for 8.
        numbers: type of everything that is not a code.
    """

    bits: Literal[2, 4, 8] = field(default=4)
    group: Annotated[int, Field(ge=2, le=65536)] = field(default=64)
    outlier_share: Annotated[float, Field(ge=0, le=0.5)] = field(default=0.02)
    rank: Annotated[int, Field(ge=0, le=64)] = field(default=4)
    steps: Literal["corrected", "published"] = field(default="corrected")
    numbers: Literal["float16", "float32"] = field(default="float16")

    whole_image: ClassVar[bool] = True
    error_of: ClassVar[Literal["token", "image", "image_rms"]] = "image_rms"
    smallest: ClassVar[float] = 2.0**-10

    @property
    def max_error(self) -> float:
        """1.02 / number of steps: 0.068 for 4 bits.

        Let m be the image's largest |value|. A token's filled values span at most 2 m, and so does
        a group; a step, rounded up to float16, is at most 1.002 * 2 m / steps, and rounding to a
        level moves a value by at most half of it: m / steps. An outlier moves by 2^-11 of itself.
        So the root mean square of this error is at most 1.002 m / steps. The low-rank part is
        its projection on a subspace: to take it away makes no error longer. Its factors are
        rounded to float16, which adds at most 2^-11 (1 + 2 sqrt(rank)) <= 0.83 % of the error.
        """
        return 1.02 / self._num_steps

    @property
    def _num_steps(self) -> int:
        return self.bits**2 - 1 if self.steps == "published" else 2**self.bits - 1

    def token_bytes(self, width: int) -> int:
        """Return the bytes of codes, groups, outliers and left factor of one token."""
        return sum(self._parts(width))

    def _parts(self, width: int) -> tuple[int, ...]:
        """Return the bytes of codes, minima, steps, places, outliers and left factor."""
        size = DTYPES[self.numbers].itemsize
        groups, outliers = -(-width // self.group), 2 * self._outliers_each_side(width)
        codes = packed_bytes(width, self.bits)
        return codes, groups * size, groups * size, 2 * outliers, outliers * size, self.rank * size

    def _outliers_each_side(self, width: int) -> int:
        return int(width * self.outlier_share / 2)

    def pack(self, features: Tensor) -> PackedTokens:
        """Store one image's (K, D) features; see `Codec.pack`.

        Raises:
            ValueError: also if D or K is above 65536.
        """
        limit = _LARGEST[self.numbers]
        rows_KD, _ = largest_per_token(features, codec=self, limit=limit)
        count, width = rows_KD.shape
        if max(count, width) > _WIDEST:
            raise ValueError(f"features are {count} x {width}; codec gear takes up to {_WIDEST}")
        numbers = DTYPES[self.numbers]
        places_KO = self._outlier_places(rows_KD)
        outliers_KO = rows_KD.gather(1, places_KO)
        mean_K1 = (sum_rows(rows_KD.t()) * (1 / width)).unsqueeze(1).expand_as(outliers_KO)
        filled_KD = rows_KD.scatter(1, places_KO, mean_K1)
        codes_KD, minimum_KG, step_KG = self._round_groups(filled_KD)

        stored_KO = outliers_KO.to(numbers)
        error_KD = rows_KD - self._restore(codes_KD, minimum_KG, step_KG, places_KO, stored_KO)
        left_KR, right_RD = self._low_rank(error_KD)
        return PackedTokens(
            tokens=_side_by_side(
                pack_codes(codes_KD, self.bits),
                minimum_KG,
                step_KG,
                places_KO.to(torch.int16),  # those from 32768 up wrap, and are unwrapped
                stored_KO,
                left_KR,
            ),
            aux=b"",
            num_tokens=count,
            head=_WIDTH.pack(width) + to_bytes(right_RD),
        )

    def _outlier_places(self, rows_KD: Tensor) -> Tensor:
        """Return (K, O) places of the smallest and the largest values of each token."""
        each = self._outliers_each_side(rows_KD.shape[1])
        # Whole numbers that sort as the values do, with the place below: no ties, so that topk,
        # four times faster than a stable sort, has no choice. Adding 0 makes -0 one with 0.
        bits_KD = (rows_KD + 0.0).view(torch.int32)
        rising_KD = (bits_KD ^ ((bits_KD >> 31) & 0x7FFFFFFF)).long()
        keys_KD = (rising_KD << 16) | torch.arange(rows_KD.shape[1], device=rows_KD.device)
        ends = [keys_KD.topk(each, dim=1, largest=largest).indices for largest in (False, True)]
        return torch.cat(ends, dim=1)

    def _round_groups(self, filled_KD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (K, D) codes, and (K, G) minima and steps as they are stored."""
        count, width = filled_KD.shape
        # The last group is filled up with its last value, which moves neither of its ends.
        missing = -width % self.group
        padded_KD = torch.cat([filled_KD, filled_KD[:, -1:].expand(-1, missing)], dim=1)
        codes, minimum, step = affine_codes(
            padded_KD.reshape(-1, self.group),
            steps=self._num_steps,
            numbers=DTYPES[self.numbers],
        )
        codes_KD = codes.view(count, -1)[:, :width]
        return codes_KD, minimum.view(count, -1), step.view(count, -1)

    def _restore(
        self,
        codes_KD: Tensor,
        minimum_KG: Tensor,
        step_KG: Tensor,
        places_KO: Tensor,
        outliers_KO: Tensor,
    ) -> Tensor:
        """Return the (K, D) features without their low-rank part."""
        count, width = codes_KD.shape
        padded_KD = torch.nn.functional.pad(codes_KD, (0, -width % self.group)).float()
        values = padded_KD.view(count, -1, self.group)
        values = values.mul_(step_KG.float().unsqueeze(2)).add_(minimum_KG.float().unsqueeze(2))
        values_KD = values.view(count, -1)[:, :width]
        return values_KD.scatter_(1, places_KO, outliers_KO.float())

    def _low_rank(self, error_KD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (K, R) left and (R, D) right factors of the error, as they are stored."""
        numbers, (count, width) = DTYPES[self.numbers], error_KD.shape
        if not self.rank:
            return torch.empty((count, 0)), torch.empty((0, width))
        # Right factors near 1, so that left ones are no larger than the error.
        right_RD = (directions(error_KD, self.rank) * width**0.5).to(numbers)
        left_KR = torch.zeros((count, self.rank), dtype=numbers, device=error_KD.device)
        for place in range(self.rank):
            right_D = right_RD[place].to(error_KD.device).float()
            left_KR[:, place] = (sum_rows((error_KD * right_D).t()) * (1 / width)).to(numbers)
        return left_KR, right_RD

    def unpack(
        self,
        packed: Sequence[PackedTokens],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Join the images' tokens and restore them on `device`; see `Codec.unpack`.

        Raises:
            CacheFormatError: also if a stored number is infinite or NaN, or an outlier has no
                place.
        """
        joined = join_rows(self, packed, width_of=self._width_of)
        right_BRD = self._right_factors(packed, joined.width).to(device).float()
        self._check_tokens(joined)
        rows_KT, image_K = joined.rows.to(device, non_blocking=True), joined.images().to(device)
        features_KD = torch.empty((len(rows_KT), joined.width), dtype=dtype, device=rows_KT.device)
        for part in chunks(features_KD):
            *plain, left_KR = self._split(rows_KT[part], joined.width)
            values_KD = self._restore(*plain)
            for place in range(self.rank):
                right_KD = right_BRD[:, place].index_select(0, image_K[part])
                # Two steps, not a fused one: the same bits on every device.
                values_KD += right_KD.mul_(left_KR[:, place : place + 1].float())
            features_KD[part] = values_KD
        return features_KD

    def _width_of(self, image: PackedTokens, index: int) -> int:
        if len(image.head) < _WIDTH.size:
            raise damaged_head(image, index, f"at least {_WIDTH.size}")
        (width,) = _WIDTH.unpack_from(image.head)
        expected = _WIDTH.size + self.rank * width * DTYPES[self.numbers].itemsize
        if not 0 < width <= _WIDEST or len(image.head) != expected:
            raise damaged_head(image, index, f"{expected} for {width} features")
        return int(width)

    def _right_factors(self, packed: Sequence[PackedTokens], width: int) -> Tensor:
        numbers = bytearray().join(image.head[_WIDTH.size :] for image in packed)
        if not numbers:
            return torch.empty((len(packed), 0, width))
        factors = torch.frombuffer(numbers, dtype=DTYPES[self.numbers])
        check_finite(factors, "right factors")
        return factors.view(len(packed), self.rank, width)

    def _check_tokens(self, joined: JoinedRows) -> None:
        """Refuse what would index or count wrongly; on the CPU, before anything travels."""
        _, minimum, step, places, outliers, left = self._split(joined.rows, joined.width)
        for values in (minimum, step, outliers, left):
            check_finite(values, "minima, steps, outliers and left factors")
        if (places >= joined.width).any():
            raise CacheFormatError(
                f"an outlier has place {int(places.max())}, expected less than {joined.width}; "
                "the row is damaged or of another codec"
            )

    def _split(self, rows_KT: Tensor, width: int) -> tuple[Tensor, ...]:
        """Return codes, minima, steps, places, outliers and left factors of some tokens."""
        numbers = DTYPES[self.numbers]
        codes, minimum, step, places, outliers, left = torch.split(
            rows_KT, list(self._parts(width)), dim=1
        )
        return (
            unpack_codes(codes, self.bits, width=width),
            _view(minimum, numbers),
            _view(step, numbers),
            _view(places, torch.int16).to(torch.int64) & 0xFFFF,
            _view(outliers, numbers),
            _view(left, numbers),
        )


def _view(bytes_KT: Tensor, dtype: torch.dtype) -> Tensor:
    count, size = bytes_KT.shape
    # A copy, because a view would have to start at a multiple of the size of its numbers.
    numbers = bytes_KT.clone(memory_format=torch.contiguous_format).flatten().view(dtype)
    return numbers.view(count, size // dtype.itemsize)


def _side_by_side(*columns: Tensor) -> bytes:
    """Return the bytes of all columns, token by token."""
    parts = [column.contiguous().view(torch.uint8) for column in columns if column.shape[1]]
    return to_bytes(torch.cat(parts, dim=1))
