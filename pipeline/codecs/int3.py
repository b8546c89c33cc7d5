"""Store a token as 3-bit codes with one scale, after a rotation that makes it near to Gaussian.

Source: as codec int4: Gaussian levels of Lloyd (1982) and Max (1960) for rotated features, as in
Zandieh et al., "TurboQuant" (arXiv 2504.19874).
Differs: as codec int4.
Cost: as codec int4; 3 D / 8 + 4 bytes stored.

Typical relative error ||x' - x|| / ||x|| (D = 1024, synthetic): 0.19, with or without channels that
are 10 times larger. See `benchmarks/codecs.md`.

Stored as in codec int4, with the levels -88, -55, -31, -10, 10, 31, 55, 88.
"""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.codecs._rotated import RotatedCodec


@dataclass(frozen=True, kw_only=True)
class Int3(RotatedCodec):
    """Stores features as rotated 3-bit codes with a float32 scale per token; see `RotatedCodec`."""

    bits: ClassVar[int] = 3
    levels: ClassVar[tuple[int, ...]] = (10, 31, 55, 88)
    per_sigma: ClassVar[float] = 40.893

    @property
    def max_error(self) -> float:
        """0.4, whatever the width; Gaussian features stay near 0.2.

        By the proof of codec int4: levels of the plain form are at most 33 apart, so its error is
        at most (16.5 + 1/8) / 88 = 0.19 of the largest |value|.
        """
        return 0.4
