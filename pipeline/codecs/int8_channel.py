"""Store a token as 8-bit codes between its smallest and largest value, after a scale per channel.

Source: He et al., "ZipCache" (arXiv 2405.14256), its channel-separable token-wise quantizer;
github.com/ThisisBillhe/ZipCache @ b6932b9 (MIT). With `scales: float32` codes, minima, steps and
scales equal the published ones.
Differs: a channel of zeros comes back as zeros (published: the whole image becomes NaN).
Cost: two passes over the image; D + 8 bytes a token, and 2 D an image: with 64 tokens 0.25 bits
a value, twice that with `scales: float32`.

Stored: head = D channel scales c. Per token D codes q, one byte each,
and float32 minimum m and step t beside them. The value is (q * t + m) * c, in float32, in that
order.
"""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.codecs._channel import ChannelCodec


@dataclass(frozen=True, kw_only=True)
class Int8Channel(ChannelCodec):
    """Stores features as 8-bit codes of scaled channels; see `ChannelCodec`."""

    bits: ClassVar[int] = 8
