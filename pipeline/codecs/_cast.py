"""Codecs that store a token as floats of another type, without anything beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.codecs._base import Codec
from pipeline.codecs._rows import float_rows, join, refuse, to_bytes
from pipeline.types import PackedTokens


@dataclass(frozen=True, kw_only=True)
class CastCodec(Codec):
    """Rounds every value to the nearest one of `stored` (ties to even)."""

    stored: ClassVar[torch.dtype]
    """The type of the codes."""

    remedy: ClassVar[str]
    """What to do about a value beyond the range of that type."""

    def token_bytes(self, width: int) -> int:
        """Return the size of `width` floats of the stored type."""
        return width * self.stored.itemsize

    def pack(self, features: Tensor) -> PackedTokens:
        """Round one image's (K, D) features to the stored type; see `Codec.pack`."""
        rows_KD = float_rows(features)
        codes_KD = rows_KD.to(self.stored)
        storable_KD = torch.isfinite(codes_KD)
        if not storable_KD.all():
            name = type(self).__module__.rpartition(".")[2]
            raise refuse(rows_KD, storable_KD=storable_KD, codec=name, remedy=self.remedy)
        return PackedTokens(tokens=to_bytes(codes_KD), aux=b"", num_tokens=len(rows_KD))

    def unpack(
        self,
        packed: Sequence[PackedTokens],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Join the images' codes and convert them on `device`; see `Codec.unpack`."""
        codes, _ = join(packed, dtype=self.stored, aux_bytes=self.aux_bytes)
        return codes.to(device, non_blocking=True).to(dtype)
