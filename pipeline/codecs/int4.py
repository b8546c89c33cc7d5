"""Store a token as 4-bit codes with one scale, after a rotation that makes it near to Gaussian.

Source: Gaussian levels of Lloyd (1982) and Max (1960) for rotated features, as in Zandieh et al.,
"TurboQuant" (arXiv 2504.19874); random signs and a Hadamard matrix as in codec int8.
Differs: levels are whole numbers, so that reading is exact in any order; a token is rotated only
where that is better; its scale is the one of least squared error, not the variance.
Cost: D * 2 * (1 + log2 of the block) additions per token to pack, half of that to unpack; D / 2 + 4
bytes stored.

Typical relative error ||x' - x|| / ||x|| (D = 1024, synthetic): 0.097 on Gaussian features, with
or without channels that are 10 times larger; plain int4 has 0.14 and 0.46. See
`benchmarks/codecs.md`.

Stored per token: D codes q of 4 bits, and a float32 s. Code q stands for the level L[q]: the 16
numbers -104, -79, -62, -48, -36, -25, -15, -5, 5, 15, ... 104. If s > 0 the token is
s * signs * (H L[q]), with `signs` and H of `_rotation.py`; if s <= 0 it is |s| * L[q].
"""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.codecs._rotated import RotatedCodec


@dataclass(frozen=True, kw_only=True)
class Int4(RotatedCodec):
    """Stores features as rotated 4-bit codes with a float32 scale per token; see `RotatedCodec`."""

    bits: ClassVar[int] = 4
    levels: ClassVar[tuple[int, ...]] = (5, 15, 25, 36, 48, 62, 79, 104)
    per_sigma: ClassVar[float] = 38.135

    @property
    def max_error(self) -> float:
        """0.25, whatever the width; Gaussian features stay near 0.1.

        A guarantee by construction. Let m be the largest |value|. The plain form has levels up to
        104 for m, at most 25 apart; an eighth is added where borders between levels are rounded:
        at most (12.5 + 1/8) / 104 = 0.122 m. Packing unpacks the rotated form too, and takes it
        only where no value is off by more than 0.99 * 0.25 m; float32 adds less than 0.001 m.
        """
        return 0.25
