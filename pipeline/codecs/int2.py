"""Store a token as 2-bit codes with one scale, after a rotation that makes it near to Gaussian.

Source: as codec int4: Gaussian levels of Lloyd (1982) and Max (1960) for rotated features, as in
Zandieh et al., "TurboQuant" (arXiv 2504.19874).
Differs: as codec int4.
Cost: as codec int4; D / 4 + 4 bytes stored.

Typical relative error ||x' - x|| / ||x|| (D = 1024, synthetic): 0.34, with or without channels that
are 10 times larger. See `benchmarks/codecs.md`.

Stored as in codec int4, with the levels -10, -3, 3, 10.
"""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.codecs._rotated import RotatedCodec


@dataclass(frozen=True, kw_only=True)
class Int2(RotatedCodec):
    """Stores features as rotated 2-bit codes with a float32 scale per token; see `RotatedCodec`."""

    bits: ClassVar[int] = 2
    levels: ClassVar[tuple[int, ...]] = (3, 10)
    per_sigma: ClassVar[float] = 6.6207

    @property
    def max_error(self) -> float:
        """0.7, whatever the width; Gaussian features stay near 0.35.

        By the proof of codec int4: levels of the plain form are at most 7 apart, so its error is
        at most (3.5 + 1/8) / 10 = 0.37 of the largest |value|.
        """
        return 0.7
