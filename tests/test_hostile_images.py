"""Images built to cost memory or time, or to be taken for something else."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import decode
from pipeline.decode import DecodeOptions, decode_image
from pipeline.errors import DecodeError

RGB = Image.fromarray(np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes, size: tuple[int, int] = (4, 4)) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def zeros(num_bytes: int, level: int = 9) -> bytes:
    """Return a zlib stream of many zeros, made piece by piece."""
    packer, piece = zlib.compressobj(level), bytes(1 << 20)
    pieces = [packer.compress(piece) for _ in range(num_bytes >> 20)]
    return b"".join(pieces) + packer.flush()


PIXELS = chunk(b"IDAT", zlib.compress(bytes(4 * (1 + 12))))
BOMB = zeros(150 << 20)


def outcome(data: bytes) -> str:
    try:
        return str(decode_image(data, key="k").shape)
    except DecodeError as err:
        return err.reason


MEASURE = """
import resource, sys
from pathlib import Path
from tests.test_hostile_images import outcome

outcome(Path(sys.argv[1]).read_bytes())  # a good image: all that is loaded once
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), used + int(sys.argv[2])))
for path in sys.argv[3:]:
    sys.stdout.write(outcome(Path(path).read_bytes()) + "\\n")
"""


def outcomes_in(tmp_path: Path, images: list[bytes], *, memory: int) -> list[str]:
    """Decode in a process that may take no more memory than this above what it has."""
    paths = [tmp_path / f"{number}.bin" for number in range(len(images) + 1)]
    for path, data in zip(paths, [encode(RGB, "PNG"), *images], strict=True):
        path.write_bytes(data)
    first, *others = map(str, paths)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, first, str(memory), *others],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\n")[:-1]


def test_what_unpacks_to_hundreds_of_megabytes_takes_no_such_memory(tmp_path: Path) -> None:
    images = {
        "more pixels than the header says": png(chunk(b"IDAT", BOMB)),
        "compressed text": png(chunk(b"zTXt", b"k\0\0" + BOMB), PIXELS),
        "compressed international text": png(chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB), PIXELS),
        "XMP": png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB), PIXELS),
        "a colour profile": png(chunk(b"iCCP", b"k\0\0" + BOMB), PIXELS),
        "text behind the pixels": png(PIXELS, chunk(b"zTXt", b"k\0\0" + BOMB)),
        "a header of 2^31 x 2^31": png(PIXELS, size=(2**31 - 1, 2**31 - 1)),
        "many texts": png(*[chunk(b"zTXt", b"k\0\0" + zeros(1 << 20))] * 150, PIXELS),
    }

    found = dict(
        zip(images, outcomes_in(tmp_path, [*images.values()], memory=96 << 20), strict=True)
    )

    assert found.pop("more pixels than the header says") == "(4, 4, 3)"
    assert found.pop("a header of 2^31 x 2^31") == "too_many_pixels"
    assert set(found.values()) <= {"corrupt_image", "(4, 4, 3)"}


def progressive(size: int, num_scans: int) -> bytes:
    """Return a progressive JPEG whose last scan, of a few bytes, is repeated."""
    data = encode(Image.new("L", (size, size), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    return data[:-2] + scan * num_scans + data[-2:]


def test_a_jpeg_of_thousands_of_scans_is_refused_before_one_is_drawn() -> None:
    data = progressive(4000, 50_000)  # a minute and more, if all were drawn

    with pytest.raises(DecodeError, match="4000 x 4000 pixels in 500") as caught:
        decode_image(data, key="k")

    assert caught.value.reason == "too_many_pieces"


def test_as_many_scans_as_encoders_write_are_drawn() -> None:
    assert outcome(progressive(64, 90)) == "(64, 64, 3)"
    assert outcome(progressive(64, 120)) == "too_many_pieces"


def test_large_images_may_have_fewer_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 64)
    options = DecodeOptions(max_pixels=64 * 64)

    assert decode_image(progressive(64, 8), key="k", options=options).shape == (64, 64, 3)
    with pytest.raises(DecodeError, match="scans"):
        decode_image(progressive(64, 12), key="k", options=options)


def test_bytes_like_scans_behind_the_image_or_in_its_metadata_are_none() -> None:
    marks = b"\xff\xda" * 500

    assert outcome(encode(RGB, "JPEG") + marks) == "(24, 32, 3)"
    assert outcome(encode(RGB, "JPEG", comment=marks)) == "(24, 32, 3)"


@pytest.mark.parametrize(
    "data",
    [
        png(*[chunk(b"abCd", b"")] * 70_000, PIXELS),
        png(PIXELS, *[chunk(b"IDAT", b"")] * 70_000),
        b"\xff\xd8" + b"\xff\xfe\0\2" * 70_000 + encode(RGB, "JPEG")[2:],
        b"\xff\xd8" + b"\xff" * 70_000 + encode(RGB, "JPEG")[2:],
        b"\xff\xd8\xff" + b"\0" * 200_000 + encode(RGB, "JPEG")[2:],
        b"\xff\xd8\xff\xe0\0\2" + b"junk" * 70_000 + encode(RGB, "JPEG")[2:],
    ],
    ids=["chunks", "no pixels", "comments", "padding", "zeros", "junk"],
)
def test_many_small_pieces_are_refused_unwalked(data: bytes) -> None:
    assert outcome(data) == "too_many_pieces"


def test_a_profile_in_hundreds_of_segments_is_fine() -> None:
    data = encode(RGB, "JPEG", icc_profile=os.urandom(4 << 20))

    assert outcome(data) == "(24, 32, 3)"


@pytest.mark.parametrize("num_frames", [1, 300])
def test_of_animations_only_the_first_frame_costs_anything(num_frames: int) -> None:
    frames = [Image.new("RGB", (64, 64), (n % 256, 0, 0)) for n in range(1, num_frames)]
    first = Image.new("RGB", (64, 64), (0, 9, 0))

    for kind in ("PNG", "WEBP"):
        data = encode(first, kind, save_all=True, append_images=frames, lossless=True)
        assert (decode_image(data, key="k") == (0, 9, 0)).all()


def test_an_animation_that_claims_a_billion_frames_gives_its_first() -> None:
    frames = {"save_all": True, "append_images": [RGB.rotate(90)]}
    data = encode(RGB, "PNG", **frames)
    at = data.index(b"acTL")
    body = struct.pack(">II", 10**9, 0)
    data = data[: at - 4] + chunk(b"acTL", body) + data[at + 16 :]

    np.testing.assert_array_equal(decode_image(data, key="k"), np.asarray(RGB))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (
            "svg",
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        ),
        ("svg with a mark", b'\xef\xbb\xbf<?xml version="1.0"?><svg/>'),
        ("gif", encode(RGB, "GIF", save_all=True, append_images=[RGB])),
        ("tiff", encode(RGB, "TIFF", compression="tiff_deflate")),
        ("big tiff", b"II+\0\x08\0\0\0" + bytes(100)),
        ("postscript", b"%!PS-Adobe-3.0\n(/etc/passwd) (r) file"),
        ("pdf", b"%PDF-1.7\n"),
        ("icon", encode(RGB, "ICO")),
        ("heif", b"\0\0\0\x18ftypheic" + bytes(100)),
        ("jpeg 2000", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100)),
        ("a pickle", b"\x80\x04\x95" + bytes(100)),
        ("gzip", b"\x1f\x8b\x08" + bytes(100)),
        ("zip", b"PK\3\4" + bytes(100)),
        ("webp in name only", b"RIFF\0\0\0\0WAVE" + bytes(100)),
    ],
)
def test_other_kinds_of_files_are_never_opened(name: str, data: bytes) -> None:
    assert outcome(data) == "not_an_image"


def test_exif_of_many_entries_or_of_itself_costs_nothing() -> None:
    entries = struct.pack("<H", 65_535) + struct.pack("<HHII", 1, 4, 1, 8) * 5000
    loop = struct.pack("<H", 1) + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<I", 8)

    for body in (entries, loop):
        exif = b"Exif\0\0II*\0\x08\0\0\0" + body
        assert outcome(encode(RGB, "JPEG", exif=exif[:65_000])) == "(24, 32, 3)"
        assert outcome(encode(RGB, "WEBP", exif=exif)) == "(24, 32, 3)"
