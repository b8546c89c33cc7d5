"""Encoded image bytes -> RGB pixels, or a `DecodeError` that names the sample.

Pixels are what `transformers.image_utils.load_image` gives: EXIF orientation applied, then
Pillow's `convert("RGB")`, which drops alpha instead of blending it. One difference: 16-bit grey is
scaled to 8 bits by its high byte, where Pillow would clip every value above 255 to white.

Safe for bytes from anywhere: only JPEG, PNG and WebP are opened, by their first bytes and never
by name; the pixel count is checked before a pixel is decoded; and no global of Pillow is read for
a decision or changed, so many threads may decode at once (Pillow releases the GIL).
"""

import io
import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.errors import ConfigError, DecodeError

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB at 3 bytes per pixel

# What Pillow is known to raise on damaged files: its parsers index and unpack without checks.
# UserWarning is here for callers that turn warnings into errors.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    NotImplementedError,
    UserWarning,
    struct.error,
    zlib.error,
)

_TRANSPOSITIONS = {  # by EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
_XMP_ORIENTATION = re.compile(r'tiff:Orientation(?:="|>)([0-9])')


MAX_SCANS = 100  # of a JPEG; encoders write 10 or so
LARGE_SCANS = 16  # of one at the limit of pixels; a scan of few bytes costs as much as any
MAX_PIECES = 1 << 16  # chunks of a PNG, segments and bytes of padding of a JPEG

_SCAN = b"\xff\xda"
_PADDING = re.compile(rb"\xff+")
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in coded data; no stuffing, no restart


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """How images are decoded.

    Attributes:
        max_pixels: images of more pixels (width * height) are rejected before decoding. Pillow
            itself refuses WebP above 178,956,970.
    """

    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ConfigError(f"max_pixels must be at least 1, is {self.max_pixels}")


def decode_image(
    data: bytes, *, key: str, options: DecodeOptions | None = None
) -> NDArray[np.uint8]:
    """Decode one image to RGB.

    Args:
        data: a whole JPEG, PNG or WebP file. Of an animation, the first frame is taken.
        key: the sample's key, for messages.
        options: limits; the defaults if not given.

    Returns:
        (H, W, 3) uint8, C-contiguous, writable, upright.

    Raises:
        DecodeError: with `reason` `empty_image` (no bytes), `not_an_image` (another format, or
            no image), `too_many_pixels`, `too_many_pieces` (built to keep a decoder busy), or
            `corrupt_image` (damaged or cut off). A JPEG whose bytes are altered but complete may
            pass: the format holds no checksum.
    """
    limits = options or DecodeOptions()
    if not data:
        raise DecodeError(f"{key}: image has no bytes", key=key, reason="empty_image")
    try:
        _check_pieces(data, key)
        with _open(data, key) as image:
            _check_size(image, key=key, max_pixels=limits.max_pixels)
            _check_scans(data, image.size, key=key, max_pixels=limits.max_pixels)
            image.load()
            return np.array(_upright(_to_rgb(image), _orientation(image)), dtype=np.uint8)
    except Image.DecompressionBombError as err:  # the WebP plug-in's own limit
        raise DecodeError(f"{key}: {_line(err)}", key=key, reason="too_many_pixels") from err
    except DecodeError:
        raise
    except _PILLOW_ERRORS as err:
        message = f"{key}: image of {len(data)} bytes is damaged: {_line(err)}"
        raise DecodeError(message, key=key, reason="corrupt_image") from err


class _Jpeg(JpegImageFile):
    """A JPEG whose EXIF Pillow leaves alone.

    Opening a JPEG reads its resolution from EXIF, and damaged EXIF makes that raise warnings,
    which cannot be silenced for one thread alone.
    """

    def getexif(self) -> Image.Exif:
        return Image.Exif()


def _open(data: bytes, key: str) -> ImageFile:
    """Open by first bytes. Not by `Image.open`, whose bomb check warns and has a global limit."""
    if data.startswith(b"\xff\xd8\xff"):
        return _Jpeg(io.BytesIO(data))
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile(io.BytesIO(data))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile(io.BytesIO(data))
    message = f"{key}: not a JPEG, PNG or WebP image (it starts with {data[:12]!r})"
    raise DecodeError(message, key=key, reason="not_an_image")


def _check_size(image: Image.Image, *, key: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        message = f"{key}: image of {width} x {height} pixels"
        raise DecodeError(message, key=key, reason="corrupt_image")
    if width * height > max_pixels:
        message = f"{key}: image of {width} x {height} pixels exceeds max_pixels={max_pixels}"
        raise DecodeError(message, key=key, reason="too_many_pixels")


def _check_pieces(data: bytes, key: str) -> None:
    """Refuse what has so many small pieces that walking through them takes long."""
    if data.startswith(b"\xff\xd8\xff"):
        num_pieces = _count_segments(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        num_pieces = _count_chunks(data)
    else:
        return
    if num_pieces > MAX_PIECES:
        message = f"{key}: image of more than {MAX_PIECES} chunks or segments"
        raise DecodeError(message, key=key, reason="too_many_pieces")


def _count_chunks(data: bytes) -> int:
    """Return the number of chunks of a PNG, or one that is too many."""
    place, count = 8, 0
    while place + 8 <= len(data) and count <= MAX_PIECES:
        place += 12 + int.from_bytes(data[place : place + 4], "big")
        count += 1
    return count


def _count_segments(data: bytes) -> int:
    """Return the number of segments of a JPEG before its first scan, and of its padding bytes."""
    place, count = 2, 0
    while place + 4 <= len(data) and count <= MAX_PIECES:
        padding = _PADDING.match(data, place)
        if padding is None:
            place, count = place + 1, count + 1
            continue
        count += padding.end() - place
        place = padding.end()
        marker = data[place : place + 1]
        if marker == b"\xda":
            break
        is_alone = marker in (b"\x00", b"\x01", b"\xd8") or b"\xd0" <= marker <= b"\xd7"
        place += 1 if is_alone else 1 + int.from_bytes(data[place + 1 : place + 3], "big")
    return count


def _check_scans(data: bytes, size: tuple[int, int], *, key: str, max_pixels: int) -> None:
    """Refuse a JPEG that is drawn over and over: each scan goes through all pixels."""
    allowed = min(MAX_SCANS, LARGE_SCANS * max(MAX_PIXELS, max_pixels) // (size[0] * size[1]))
    # Counted properly only where it may matter: a search for two bytes costs nothing.
    if not data.startswith(b"\xff\xd8\xff") or data.count(_SCAN) <= allowed:
        return
    num_scans = _count_scans(data)
    if num_scans > allowed:
        width, height = size
        message = f"{key}: image of {width} x {height} pixels in {num_scans} scans"
        raise DecodeError(message, key=key, reason="too_many_pieces")


def _count_scans(data: bytes) -> int:
    """Return the number of scans up to the end of the first image in a JPEG."""
    count, place = 0, 2
    while (found := _MARKER.search(data, place)) and found.group() != b"\xff\xd9":
        count += found.group() == _SCAN
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return count


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; the high byte, as Pillow takes it for 16-bit RGB
        high = np.asarray(image) >> 8
        return Image.fromarray(high.clip(0, 255, out=high).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # same colours; straight to RGB would warn
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    method = _TRANSPOSITIONS.get(orientation)
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, else the one in XMP, else 1.

    Read here and not by Pillow, which warns about damaged EXIF; damage means 1.
    """
    found = _exif_orientation(_exif(image))
    if found is not None:
        return found
    xmp = image.info.get("xmp", image.info.get("XML:com.adobe.xmp", ""))
    text = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp)
    match = _XMP_ORIENTATION.search(text)
    return int(match.group(1)) if match else 1


def _exif(image: Image.Image) -> bytes:
    exif = image.info.get("exif")
    if isinstance(exif, bytes):
        return exif
    profile = image.info.get("Raw profile type exif")  # PNG text by ImageMagick, in hexadecimal
    try:
        return bytes.fromhex("".join(profile.split("\n")[3:])) if isinstance(profile, str) else b""
    except ValueError:
        return b""


def _exif_orientation(exif: bytes) -> int | None:
    tiff = exif.removeprefix(b"Exif\x00\x00")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, start)
        for place in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, place)
            if tag == _ORIENTATION_TAG:
                width = "H" if kind == 3 else "I"  # SHORT or LONG
                (value,) = struct.unpack_from(f"{order}{width}", tiff, place + 8)
                return int(value)
    except struct.error:  # cut off or pointing outside
        return None
    return None


def _line(err: BaseException) -> str:
    """Return an error's own text in one line."""
    return " ".join(str(err).split()) or type(err).__name__
