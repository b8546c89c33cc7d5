"""The image decoder, from the first byte on."""

import io
import struct
import zlib
from random import Random

import numpy as np
from PIL import ExifTags, Image

from pipeline.decode import DecodeOptions, decode_image
from pipeline.errors import DecodeError
from tests.fuzz.mutation import damage
from tests.fuzz.target import BrokenPromiseError, Target

MAX_PIXELS = 1 << 22
_PNG = b"\x89PNG\r\n\x1a\n"


class ImageTarget(Target):
    name = "image"

    def __init__(self) -> None:
        self.seeds = _seeds()

    def mutated(self, random: Random) -> bytes:
        data = random.choice(self.seeds)
        if random.random() < 0.5:
            for _ in range(random.choice((1, 1, 2))):
                data = _by_structure(data, random)
            if random.random() < 0.2:
                data = damage(data, random, others=self.seeds)
            return data
        return damage(data, random, others=self.seeds)

    def check(self, made: bytes) -> str:
        try:
            pixels = decode_image(made, key="k", options=DecodeOptions(max_pixels=MAX_PIXELS))
        except DecodeError as err:
            if "\n" in str(err) or err.key != "k":
                raise BrokenPromiseError(f"message of a rejected image: {err}") from err
            return err.reason
        height, width, channels = pixels.shape
        if channels != 3 or pixels.dtype != np.uint8 or not 0 < height * width <= MAX_PIXELS:
            raise BrokenPromiseError(f"an image of {pixels.shape} {pixels.dtype}")
        return "decoded"


def _seeds() -> list[bytes]:
    rows, columns = np.mgrid[0:40, 0:56]
    planes = [(rows * 5 + columns * 3 * (c + 1)) % 256 for c in range(4)]
    rgba = Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))
    rgb = rgba.convert("RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Software] = "something longer than four bytes"
    grey16 = Image.fromarray((np.arange(40 * 56, dtype=np.uint16) * 29).reshape(40, 56))
    others = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    made: list[tuple[Image.Image, str, dict]] = [
        (rgb, "JPEG", {"exif": exif, "icc_profile": b"profile" * 40, "comment": b"hello"}),
        (rgb, "JPEG", {"progressive": True, "subsampling": 0}),
        (rgb.convert("L"), "JPEG", {"restart_marker_blocks": 2}),
        (rgb.convert("CMYK"), "JPEG", {"xmp": b'<x tiff:Orientation="3"/>'}),
        (rgb, "MPO", others),
        *((rgba.convert(mode), "PNG", {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        (grey16, "PNG", {}),
        (rgb, "PNG", {"exif": exif, "icc_profile": b"profile" * 40}),
        (rgb, "PNG", others),
        (rgb, "WEBP", {"quality": 60, "exif": exif, "icc_profile": b"profile" * 40}),
        (rgba, "WEBP", {"lossless": True}),
        (rgba, "WEBP", {"quality": 50, **others}),
    ]
    seeds = []
    for image, kind, options in made:
        sink = io.BytesIO()
        image.save(sink, kind, **options)
        seeds.append(sink.getvalue())
    return seeds


def _by_structure(data: bytes, random: Random) -> bytes:
    if data.startswith(_PNG):
        return _change_png(data, random)
    if data.startswith(b"RIFF"):
        return _change_riff(data, random)
    return _change_jpeg(data, random)


def _change_png(data: bytes, random: Random) -> bytes:
    """Change the chunks of a PNG, their checksums made anew."""
    chunks, at = [], len(_PNG)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return damage(data, random)
    place = random.randrange(len(chunks))
    kind, body = chunks[place]
    choice = random.randrange(6)
    if choice == 0 and kind == b"IHDR" and len(body) == 13:
        chunks[place] = kind, _png_header(body, random)
    elif choice == 1:
        chunks[place] = random.choice(_PNG_KINDS), body
    elif choice == 2:
        chunks.insert(random.randrange(len(chunks) + 1), chunks[place])
    elif choice == 3:
        del chunks[place]
    elif choice == 4:
        chunks.insert(random.randrange(1, len(chunks) + 1), _odd_chunk(random))
    else:
        chunks[place] = kind, damage(body, random) if body else random.randbytes(8)
    return _PNG + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


_PNG_KINDS = (
    *(b"IDAT", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"zTXt", b"iTXt", b"tEXt"),
    *(b"eXIf", b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"IEND", b"IHDR", b"\xff\xfe\0\1"),
)


def _png_header(body: bytes, random: Random) -> bytes:
    width, height, *rest = struct.unpack(">IIBBBBB", body)
    sizes = (0, 1, 2, width, height, 1023, 65_535, 1 << 20, (1 << 31) - 1, (1 << 32) - 1)
    rest = [random.choice((value, value, random.randrange(256))) for value in rest]
    if random.random() < 0.3:
        rest[4] = 1  # interlaced
    return struct.pack(">IIBBBBB", random.choice(sizes), random.choice(sizes), *rest)


def _odd_chunk(random: Random) -> tuple[bytes, bytes]:
    bomb = zlib.compress(bytes(random.choice((100, 1 << 16, 3 << 20))))
    return random.choice(
        (
            (b"zTXt", b"k\0\0" + bomb),
            (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb),
            (b"iCCP", b"k\0\0" + bomb),
            (b"tEXt", b"Raw profile type exif\0\nexif\n  8\n4949zz"),
            (b"acTL", struct.pack(">II", random.choice((0, 1, 1 << 31)), 0)),
            (b"fcTL", random.randbytes(26)),
            (b"tRNS", random.randbytes(random.choice((1, 2, 6, 256)))),
            (b"PLTE", random.randbytes(random.choice((0, 3, 7, 768, 900)))),
            (b"eXIf", b"II*\0\x08\0\0\0" + random.randbytes(30)),
        )
    )


def _change_riff(data: bytes, random: Random) -> bytes:
    """Change the chunks of a WebP, their lengths mostly right."""
    chunks, at = [], 12
    while at + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, at + 4)
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    if not chunks:
        return damage(data, random)
    place = random.randrange(len(chunks))
    kind, body = chunks[place]
    choice = random.randrange(4)
    if choice == 0:
        chunks[place] = random.choice((b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH")), body
    elif choice == 1:
        chunks.insert(random.randrange(len(chunks) + 1), chunks[place])
    elif choice == 2:
        del chunks[place]
    else:
        chunks[place] = kind, damage(body, random) if body else b""
    content = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
        for kind, body in chunks
    )
    return b"RIFF" + struct.pack("<I", len(content)) + content


def _change_jpeg(data: bytes, random: Random) -> bytes:
    """Change the segments of a JPEG: repeat, drop, retype, resize, or damage one."""
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = 2 + struct.unpack_from(">H", data, at + 2)[0]
        segments.append(data[at : at + length])
        at += length
    rest = data[at:]
    if not segments:
        return damage(data, random)
    place = random.randrange(len(segments))
    chosen = segments[place]
    choice = random.randrange(6)
    if choice == 0:
        segments.insert(random.randrange(len(segments) + 1), chosen)
    elif choice == 1:
        del segments[place]
    elif choice == 2:
        marker = random.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xFE))
        segments[place] = chosen[:1] + bytes([marker]) + chosen[2:]
    elif choice == 3:
        segments[place] = chosen[:4] + damage(chosen[4:], random)
    elif choice == 4:
        body = damage(chosen[4:], random)[:65_533]
        segments[place] = chosen[:2] + struct.pack(">H", len(body) + 2) + body
    else:
        rest = rest[: -2 or None] + rest * random.choice((1, 3, 20))
    return data[:2] + b"".join(segments) + rest
