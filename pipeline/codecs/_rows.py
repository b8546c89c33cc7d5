"""What every codec does at its border: check features on the way in and lengths on the way out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.codecs._base import Codec
from pipeline.errors import CacheFormatError, NonFiniteError
from pipeline.types import PackedTokens

_CPU_CHUNK = 1 << 17  # values worked on at once: more leave the CPU's cache (4x slower, measured)
_DEVICE_CHUNK = 1 << 25  # elsewhere: only bounds the memory of the steps between, 128 MiB each


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedRows:
    """The tokens of several images as bytes, image after image, on the CPU."""

    rows: Tensor  # (sum of K, T) uint8
    aux: bytearray
    counts: list[int]  # K of each image
    width: int  # D

    def images(self) -> Tensor:
        """Return the (sum of K,) number of each token's image."""
        counts = torch.tensor(self.counts)
        return torch.repeat_interleave(torch.arange(len(counts)), counts)


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


def chunks(rows_KD: Tensor) -> Iterator[slice]:
    """Cut the rows so that the steps on each part stay in cache, or within bounded memory."""
    values = _CPU_CHUNK if rows_KD.device.type == "cpu" else _DEVICE_CHUNK
    rows = max(1, values // rows_KD.shape[1])
    return (slice(start, start + rows) for start in range(0, len(rows_KD), rows))


def largest_per_token(features: Tensor, *, codec: Codec, limit: float) -> tuple[Tensor, Tensor]:
    """Return (K, D) float32 features, and the (K,) largest |value| of each token.

    Args:
        features: of one image.
        codec: named in the message.
        limit: the largest |value| the codec can store.

    Raises:
        ValueError, TypeError: as `float_rows` says.
        NonFiniteError: a value is NaN, or beyond `limit`.
    """
    rows_KD = float_rows(features)
    largest_K = rows_KD.abs().amax(dim=1)
    if not (largest_K <= limit).all():  # also where it is NaN
        name = type(codec).__module__.rpartition(".")[2]
        raise refuse(
            rows_KD,
            storable_KD=rows_KD.abs() <= limit,
            codec=name,
            remedy=f"its largest is {limit:.3g}: use codec fp32",
        )
    return rows_KD, largest_K


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
    return rows.cpu().flatten().view(torch.uint8).numpy().tobytes()


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
    _check_any(packed)
    widths = [_width(image, i, dtype.itemsize, aux_bytes) for i, image in enumerate(packed)]
    _check_widths(widths)
    codes = torch.frombuffer(_joined_tokens(packed), dtype=dtype)
    return codes.view(-1, widths[0]), bytearray().join(image.aux for image in packed)


def join_rows(
    codec: Codec,
    packed: Sequence[PackedTokens],
    *,
    width_of: Callable[[PackedTokens, int], int],
) -> JoinedRows:
    """Join the bytes of several images whose width stands in their heads.

    Args:
        codec: says how many bytes a token takes.
        packed: images of one width.
        width_of: gives the width of an image that has tokens, from it and its number; raises
            CacheFormatError where the head is damaged.

    Raises:
        CacheFormatError: as `Codec.unpack` says.
    """
    _check_any(packed)
    widths = []
    for index, image in enumerate(packed):
        _check_count(image, index)
        widths.append(width_of(image, index))
        expected = image.num_tokens * codec.token_bytes(widths[-1])
        if not expected or len(image.tokens) != expected:
            raise CacheFormatError(
                f"image {index} has {len(image.tokens)} bytes of codes for {image.num_tokens} "
                f"tokens, expected {expected}; the row is damaged or of another codec"
            )
        _check_aux(image, index, codec.aux_bytes)
    _check_widths(widths)
    joined = torch.frombuffer(_joined_tokens(packed), dtype=torch.uint8)
    counts = [image.num_tokens for image in packed]
    return JoinedRows(
        rows=joined.view(sum(counts), -1),
        aux=bytearray().join(image.aux for image in packed),
        counts=counts,
        width=widths[0],
    )


def _joined_tokens(packed: Sequence[PackedTokens]) -> bytearray | memoryview:
    """Return the codes of all images; those of one image that may be written to are not copied."""
    tokens = packed[0].tokens
    if len(packed) == 1 and isinstance(tokens, memoryview) and not tokens.readonly:
        return tokens
    # A bytearray, not bytes: torch warns about memory it must not write to.
    return bytearray().join(image.tokens for image in packed)


def check_finite(values: Tensor, what: str) -> None:
    """Refuse stored numbers that no image gives.

    Raises:
        CacheFormatError: one is infinite or NaN.
    """
    if not torch.isfinite(values).all():
        bad = values[~torch.isfinite(values)][0].item()
        raise CacheFormatError(
            f"{what} hold {bad}, expected finite numbers; the row is damaged or of another codec"
        )


def damaged_head(image: PackedTokens, index: int, expected: str) -> CacheFormatError:
    """Return the error about a head of a length that cannot be.

    Args:
        image: whose head it is.
        index: of the image among those unpacked together.
        expected: which bytes there should be.
    """
    return CacheFormatError(
        f"image {index} has a head of {len(image.head)} bytes, expected {expected}; "
        "the row is damaged or of another codec"
    )


def _check_any(packed: Sequence[PackedTokens]) -> None:
    if not packed:
        raise CacheFormatError("no images to unpack, so the width of a token is unknown")


def _check_count(image: PackedTokens, index: int) -> None:
    if image.num_tokens < 1:
        raise CacheFormatError(f"image {index} has {image.num_tokens} tokens, expected at least 1")


def _check_widths(widths: Sequence[int]) -> None:
    for index, width in enumerate(widths):
        if width != widths[0]:
            raise CacheFormatError(
                f"image {index} has {width} features per token and image 0 has {widths[0]}; "
                "unpack images of one width together"
            )


def _check_aux(image: PackedTokens, index: int, aux_bytes: int) -> None:
    expected = image.num_tokens * aux_bytes
    if len(image.aux) != expected:
        raise CacheFormatError(
            f"image {index} has {len(image.aux)} bytes beside the codes of {image.num_tokens} "
            f"tokens, expected {expected}; the row is damaged or of another codec"
        )


def _width(image: PackedTokens, index: int, itemsize: int, aux_bytes: int) -> int:
    _check_count(image, index)
    count = image.num_tokens
    width, rest = divmod(len(image.tokens), count * itemsize)
    if width < 1 or rest:
        raise CacheFormatError(
            f"image {index} has {len(image.tokens)} bytes of codes for {count} tokens, expected "
            f"a multiple of {count * itemsize}; the row is damaged or of another codec"
        )
    if image.head:
        raise damaged_head(image, index, "none")
    _check_aux(image, index, aux_bytes)
    return width
