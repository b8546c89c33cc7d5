"""Store float32: every bit of what the encoder gave, 4 bytes a value.

Source: IEEE 754 binary32.

For reference and for measuring the others; nothing narrower than 64 bits changes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pipeline.codecs._cast import CastCodec


@dataclass(frozen=True, kw_only=True)
class Fp32(CastCodec):
    """Stores features as float32."""

    stored: ClassVar[torch.dtype] = torch.float32
    remedy: ClassVar[str] = "scale the features down"

    @property
    def max_error(self) -> float:
        """Zero: every float of up to 32 bits is a float32."""
        return 0.0
