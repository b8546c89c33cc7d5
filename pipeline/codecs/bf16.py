"""Store bfloat16: the range of float32 with 8 significant bits, 2 bytes a value.

Source: the upper half of IEEE 754 binary32.

Lossless for encoders that run in bfloat16. Never out of range, so the safe 2-byte choice.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pipeline.codecs._cast import CastCodec


@dataclass(frozen=True, kw_only=True)
class Bf16(CastCodec):
    """Stores features as bfloat16."""

    stored: ClassVar[torch.dtype] = torch.bfloat16
    remedy: ClassVar[str] = "use codec fp32"

    smallest: ClassVar[float] = 2.0**-126  # smallest normal number

    @property
    def max_error(self) -> float:
        """2^-8, about 0.4 %.

        A value in [2^e, 2^(e+1)) has neighbours 2^(e-7) apart, so rounding to the nearest moves
        it by at most 2^(e-8), that is by 2^-8 of itself, and of the largest. Below 2^-126 they
        stay 2^-133 apart: at most 2^-134 = 2^-8 * `smallest`.
        """
        return 2.0**-8
