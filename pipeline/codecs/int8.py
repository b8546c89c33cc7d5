"""Store a token as 8-bit codes with one scale, after a rotation that spreads outliers.

Source: symmetric rounding with one scale per token; random signs and a Hadamard matrix before
it as in Chee et al., "QuIP" (arXiv 2307.13304) and Ashkboos et al., "QuaRot" (arXiv 2404.00456).
Differs: a token is rotated only where that makes its scale smaller, so no token is stored with a
larger scale than plain int8 would give it, and a constant one is stored almost exactly.
Cost: D * (1 + log2 of the block) additions per token each way; D + 4 bytes stored.

Typical relative error ||x' - x|| / ||x|| (D = 1024, synthetic): 0.0074 on Gaussian features,
0.0076 with six channels 10 times larger, where plain int8 has 0.03.

Stored per token: D int8 codes q, and a float32 s. If s > 0 the token is s * signs * (H q), with
`signs` and H of `_rotation.py`; if s < 0 it is |s| * q. H q is a sum of integers below 2^24 and
therefore exact in float32, in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.codecs._base import Codec
from pipeline.codecs._rotation import MAX_BLOCK, block_size, hadamard, signs
from pipeline.codecs._rows import chunks, join, largest_per_token, to_bytes
from pipeline.errors import CacheFormatError
from pipeline.types import PackedTokens

_LEVELS = 127
_LARGEST = 2.0**117  # the sums of a block of 1024 stay within float32


@dataclass(frozen=True, kw_only=True)
class Int8(Codec):
    """Stores features as rotated int8 with a float32 scale per token.

    Attributes:
        seed: of the random signs; caches of different seeds cannot be mixed.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = field(default=0)

    aux_bytes: ClassVar[int] = 4
    smallest: ClassVar[float] = 2.0**-100

    @property
    def max_error(self) -> float:
        """0.127, whatever the width; the root mean square over a token stays below 0.004.

        Let m be the largest |value|. The step t between codes, in units of the plain or rotated
        values, is at most m / 127, and rounding moves each of the D values by at most t / 2. A
        rotation keeps lengths, so the root mean square error is at most t / 2 <= m / 254, and in
        one block of b features the error has at most the length sqrt(b) * t / 2: no single value
        is off by more than sqrt(b) / 254 * m. With b <= 1024 that is 0.126 m, reached only if all
        roundings of a block conspire; Gaussian features stay near 0.01 m. Float32 adds less than
        a hundredth: ten additions of relative error 2^-24 move a rotated value by at most
        10 * 2^-24 * sqrt(b) * m = 0.005 * m / 254.
        """
        return 1.01 * MAX_BLOCK**0.5 / (2 * _LEVELS)

    def token_bytes(self, width: int) -> int:
        """Return one byte per feature."""
        return width

    def pack(self, features: Tensor) -> PackedTokens:
        """Rotate and round one image's (K, D) features; see `Codec.pack`."""
        rows_KD, largest_K = largest_per_token(features, codec=self, limit=_LARGEST)
        codes_KD = torch.empty(rows_KD.shape, dtype=torch.int8, device=rows_KD.device)
        scale_K = torch.empty_like(largest_K)
        for part in chunks(rows_KD):
            codes_DK, scale_K[part] = self._round(rows_KD[part], largest_K[part])
            codes_KD[part] = codes_DK.t()
        return PackedTokens(
            tokens=to_bytes(codes_KD), aux=to_bytes(scale_K), num_tokens=len(rows_KD)
        )

    def _round(self, rows_KD: Tensor, largest_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return (D, K) codes, as whole float32 numbers, and (K,) scales of some tokens."""
        block = block_size(rows_KD.shape[1])
        plain_DK = rows_KD.t().contiguous()
        rotated_DK = hadamard(plain_DK * self._signs(rows_KD), block)
        spread_K = rotated_DK.abs().amax(dim=0)
        # The matrix stretches by sqrt(block): undone here, to compare as plain values.
        rotate_K = (spread_K * block**-0.5).clamp(min=self.smallest) < largest_K
        # By a product: on a GPU, division by a constant rounds differently than on a CPU.
        plain_step_K = largest_K.clamp(min=self.smallest) * (1 / _LEVELS)
        step_K = torch.where(rotate_K, spread_K * (1 / _LEVELS), plain_step_K)
        codes_DK = (torch.where(rotate_K, rotated_DK, plain_DK) / step_K).round_()
        return codes_DK, torch.where(rotate_K, step_K * (1 / block), -step_K)

    def unpack(
        self,
        packed: Sequence[PackedTokens],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Join the images' codes, and scale and rotate back on `device`; see `Codec.unpack`.

        Raises:
            CacheFormatError: also if a scale is zero, infinite or NaN.
        """
        codes_KD, aux = join(packed, dtype=torch.int8, aux_bytes=self.aux_bytes)
        scale_K = torch.frombuffer(aux, dtype=torch.float32)
        _check_scales(scale_K)
        codes_KD, scale_K = codes_KD.to(device, non_blocking=True), scale_K.to(device)
        features_KD = torch.empty(codes_KD.shape, dtype=dtype, device=codes_KD.device)
        for part in chunks(codes_KD):
            features_KD[part] = self._restore(codes_KD[part], scale_K[part]).t()
        return features_KD

    def _restore(self, codes_KD: Tensor, scale_K: Tensor) -> Tensor:
        """Return the (D, K) float32 features of some codes."""
        plain_DK = codes_KD.t().to(torch.float32, memory_format=torch.contiguous_format)
        rotated_DK = hadamard(plain_DK, block_size(codes_KD.shape[1])) * self._signs(codes_KD)
        return torch.where(scale_K > 0, rotated_DK, plain_DK).mul_(scale_K.abs())

    def _signs(self, rows_KD: Tensor) -> Tensor:
        return signs(self.seed, rows_KD.shape[1]).to(rows_KD.device)


def _check_scales(scale_K: Tensor) -> None:
    good_K = torch.isfinite(scale_K) & (scale_K != 0)
    if not good_K.all():
        token = int((~good_K).nonzero()[0])
        raise CacheFormatError(
            f"the scale of token {token} (of {len(scale_K)} joined) is {scale_K[token].item()}, "
            "expected a finite number other than 0; the row is damaged or of another codec"
        )
