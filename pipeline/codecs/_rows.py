"""What every codec does at its border: check features on the way in and lengths on the way out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.errors import CacheFormatError, NonFiniteError
from pipeline.types import PackedTokens


def float_rows(features: Tensor) -> Tensor:
    """Return (K, D) float32 features, detached, on their device; a view where they are float32.

    Raises:
        ValueError: not two-dimensional, or empty.
        TypeError: not floats.
    """
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"features have the shape {tuple(features.shape)}, expected (K, D)")
    if not features.is_floating_point():
        raise TypeError(f"features are {features.dtype}, expected a float dtype")
    return features.detach().to(torch.float32)


def refuse(features_KD: Tensor, *, storable_KD: Tensor, codec: str, remedy: str) -> NonFiniteError:
    """Return the error about the first value that cannot be stored.

    Args:
        features_KD: float32 features, at least one of them not storable.
        storable_KD: bool, False where a value cannot be stored.
        codec: name of the codec.
        remedy: what to do about a value that is finite but too large.
    """
    token, feature = (~storable_KD).nonzero()[0].tolist()
    value = features_KD[token, feature].item()
    place = f"token {token}, feature {feature} is {value}"
    if torch.isfinite(features_KD[token, feature]):
        return NonFiniteError(f"{place}, too large for codec {codec!r}; {remedy}")
    return NonFiniteError(
        f"{place}, but only finite values are stored; check the image, or encode in float32"
    )


def to_bytes(rows: Tensor) -> bytes:
    """Return the raw bytes of a tensor in row-major order, wherever it lives."""
    # Through uint8, because NumPy has no bfloat16.
    return rows.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def join(
    packed: Sequence[PackedTokens], *, dtype: torch.dtype, aux_bytes: int
) -> tuple[Tensor, bytearray]:
    """Join the codes of several images, and what lies beside them.

    Args:
        packed: images of one width.
        dtype: of the codes.
        aux_bytes: bytes per token beside the codes.

    Returns:
        (sum of K, D) codes on the CPU, and the joined `aux`.

    Raises:
        CacheFormatError: as `Codec.unpack` says.
    """
    if not packed:
        raise CacheFormatError("no images to unpack, so the width of a token is unknown")
    widths = [_width(image, i, dtype.itemsize, aux_bytes) for i, image in enumerate(packed)]
    for index, width in enumerate(widths):
        if width != widths[0]:
            raise CacheFormatError(
                f"image {index} has {width} features per token and image 0 has {widths[0]}; "
                "unpack images of one width together"
            )
    # A bytearray, not bytes: torch warns about memory it must not write to.
    codes = torch.frombuffer(bytearray().join(image.tokens for image in packed), dtype=dtype)
    return codes.view(-1, widths[0]), bytearray().join(image.aux for image in packed)


def _width(image: PackedTokens, index: int, itemsize: int, aux_bytes: int) -> int:
    count = image.num_tokens
    if count < 1:
        raise CacheFormatError(f"image {index} has {count} tokens, expected at least 1")
    width, rest = divmod(len(image.tokens), count * itemsize)
    if width < 1 or rest:
        raise CacheFormatError(
            f"image {index} has {len(image.tokens)} bytes of codes for {count} tokens, expected "
            f"a multiple of {count * itemsize}; the row is damaged or of another codec"
        )
    if image.head:
        raise CacheFormatError(
            f"image {index} has a head of {len(image.head)} bytes, expected none; "
            "the row is of another codec"
        )
    if len(image.aux) != count * aux_bytes:
        raise CacheFormatError(
            f"image {index} has {len(image.aux)} bytes beside the codes of {count} tokens, "
            f"expected {count * aux_bytes}; the row is damaged or of another codec"
        )
    return width
