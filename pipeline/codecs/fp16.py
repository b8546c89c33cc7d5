"""Store float16: 11 significant bits in a narrow range, 2 bytes a value.

Source: IEEE 754 binary16.

Lossless for encoders that run in float16. Values of 65520 and more are refused, since they would
become infinite.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pipeline.codecs._cast import CastCodec


@dataclass(frozen=True, kw_only=True)
class Fp16(CastCodec):
    """Stores features as float16."""

    stored: ClassVar[torch.dtype] = torch.float16
    remedy: ClassVar[str] = "its largest is 65504: use codec bf16 or int8"

    smallest: ClassVar[float] = 2.0**-14  # smallest normal number, 6.1e-5

    @property
    def max_error(self) -> float:
        """2^-11, about 0.05 %.

        A value in [2^e, 2^(e+1)) has neighbours 2^(e-10) apart, so rounding to the nearest moves
        it by at most 2^(e-11), that is by 2^-11 of itself, and of the largest. Below 2^-14 they
        stay 2^-24 apart: at most 2^-25 = 2^-11 * `smallest`, so values far below 6e-5 vanish.
        """
        return 2.0**-11
