import io
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from pipeline.decode import DecodeOptions, decode_image
from pipeline.errors import ConfigError, DecodeError


def pixels(height=24, width=32, channels=3):
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [(rows * 7 + columns * 5 * (c + 1)) % 256 for c in range(channels)]
    return np.stack(planes, axis=-1).astype(np.uint8).squeeze()


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_transformers_loads_it(data):
    """The steps of `transformers.image_utils.load_image`."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def pixels_or_reason(data):
    try:
        image = decode_image(data, key="k")
    except DecodeError as err:
        return err.reason
    return image.tobytes()


def png_header(width, height, depth=8, color=2):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    pixels_chunk = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + header + pixels_chunk + chunk(b"IEND", b"")


RGB = Image.fromarray(pixels())
JPEG = encode(RGB, "JPEG", quality=90)
PROGRESSIVE = encode(RGB, "JPEG", progressive=True)
PNG = encode(RGB, "PNG")
WEBP = encode(RGB, "WEBP", quality=80)
LOSSLESS = encode(RGB, "WEBP", lossless=True)


@pytest.mark.parametrize("data", [PNG, LOSSLESS], ids=["png", "webp"])
def test_a_lossless_image_comes_back_exactly(data):
    image = decode_image(data, key="k")

    assert image.dtype == np.uint8
    assert image.flags.c_contiguous and image.flags.writeable
    np.testing.assert_array_equal(image, pixels())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_png_mode_gives_the_pixels_transformers_would_load(mode):
    channels = 4 if "A" in mode else 3
    data = encode(Image.fromarray(pixels(channels=channels)).convert(mode), "PNG")

    np.testing.assert_array_equal(decode_image(data, key="k"), as_transformers_loads_it(data))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_jpeg_mode_gives_the_pixels_transformers_would_load(mode, progressive):
    data = encode(RGB.convert(mode), "JPEG", progressive=progressive)

    np.testing.assert_array_equal(decode_image(data, key="k"), as_transformers_loads_it(data))


def test_alpha_is_dropped_and_not_blended():
    data = encode(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "PNG")

    assert (decode_image(data, key="k") == (10, 20, 30)).all()


def test_a_palette_with_transparency_gives_its_colours_without_a_warning():
    palette = RGB.quantize(16)
    data = encode(palette, "PNG", transparency=bytes([0, 128] + [255] * 14))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode_image(data, key="k")

    np.testing.assert_array_equal(image, np.asarray(palette.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    data = encode(Image.fromarray(values), "PNG")

    image = decode_image(data, key="k")

    np.testing.assert_array_equal(image[:, :, 0], np.arange(256).reshape(16, 16))
    np.testing.assert_array_equal(image[:, :, 0], image[:, :, 2])


def test_a_large_picture_of_sixteen_bit_grey_takes_no_more_memory_than_one_of_colours():
    values = np.zeros((2000, 2000), np.uint16)
    data = encode(Image.fromarray(values), "PNG")
    tracemalloc.start()  # knows of NumPy's memory, not of Pillow's

    decode_image(data, key="k")

    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 12 * values.size


def test_a_machine_without_memory_is_no_fault_of_the_image(monkeypatch):
    def refuse(_):
        raise MemoryError

    monkeypatch.setattr("pipeline.decode._to_rgb", refuse)

    with pytest.raises(MemoryError):
        decode_image(encode(Image.new("RGB", (8, 8)), "PNG"), key="k")


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"save_all": True, "append_images": frames[1:]}

    webp = decode_image(encode(frames[0], "WEBP", lossless=True, **options), key="k")
    png = decode_image(encode(frames[0], "PNG", **options), key="k")

    assert (webp == (255, 0, 0)).all()
    assert (png == (255, 0, 0)).all()


def test_a_jpeg_with_a_second_picture_inside_gives_the_first():
    data = encode(RGB, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])

    np.testing.assert_array_equal(decode_image(data, key="k"), as_transformers_loads_it(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied_as_transformers_does(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Software] = "a longer entry"
    data = encode(RGB, kind, exif=exif)

    np.testing.assert_array_equal(decode_image(data, key="k"), as_transformers_loads_it(data))


@pytest.mark.parametrize("order", ["II", "MM"])
def test_both_byte_orders_of_exif_are_read(order):
    mark = "<" if order == "II" else ">"
    entry = struct.pack(f"{mark}HHIHH", 0x0112, 3, 1, 6, 0)
    body = struct.pack(f"{mark}H", 1) + entry + struct.pack(f"{mark}I", 0)
    exif = b"Exif\0\0" + order.encode() + struct.pack(f"{mark}HI", 42, 8) + body

    assert decode_image(encode(RGB, "JPEG", exif=exif), key="k").shape == (32, 24, 3)


def test_an_orientation_in_xmp_alone_is_applied_as_transformers_does():
    data = encode(RGB, "JPEG", xmp=b'<x tiff:Orientation="6"/>')

    assert decode_image(data, key="k").shape == (32, 24, 3)
    np.testing.assert_array_equal(decode_image(data, key="k"), as_transformers_loads_it(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff" + b"\1" * 9,
        b"II*\0\x08\0\0\0\x01\0\x1a\x01\x05\0\xff\xff\xff\xff\xff\xff\xff\xff",
    ],
)
def test_damaged_exif_costs_nothing_and_warns_of_nothing(kind, exif):
    data = encode(RGB, kind, exif=b"Exif\0\0" + exif)

    assert decode_image(data, key="k").shape == (24, 32, 3)


def test_no_bytes_are_an_empty_image():
    with pytest.raises(DecodeError, match="k1: image has no bytes") as caught:
        decode_image(b"", key="k1")

    assert (caught.value.key, caught.value.reason) == ("k1", "empty_image")


@pytest.mark.parametrize(
    "data",
    [
        b"this is text named .jpg",
        b"<svg/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"\0",
        encode(RGB, "GIF"),
        encode(RGB, "TIFF"),
        encode(RGB, "BMP"),
        encode(RGB, "PPM"),
    ],
)
def test_anything_else_than_jpeg_png_or_webp_is_refused_by_its_first_bytes(data):
    with pytest.raises(DecodeError, match="not a JPEG, PNG or WebP image") as caught:
        decode_image(data, key="k")

    assert caught.value.reason == "not_an_image"


@pytest.mark.parametrize(
    "data",
    [JPEG, PROGRESSIVE, PNG, WEBP, LOSSLESS],
    ids=["jpeg", "progressive", "png", "webp", "vp8l"],
)
def test_a_cut_off_image_is_corrupt_and_never_half_grey(data):
    whole = decode_image(data, key="k").tobytes()

    outcomes = {pixels_or_reason(data[:end]) for end in range(16, len(data))}

    # A PNG that lacks nothing but its trailer still holds every pixel.
    assert outcomes - {whole} == {"corrupt_image"}


@pytest.mark.parametrize("magic", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 "])
@pytest.mark.parametrize("rest", [b"", b"\0" * 100, b"\xff" * 100])
def test_a_magic_number_followed_by_nonsense_is_corrupt(magic, rest):
    with pytest.raises(DecodeError) as caught:
        decode_image(magic + rest, key="k")

    assert caught.value.reason == "corrupt_image"


def webp_header(width, height):
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_header(width, height):
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


@pytest.mark.parametrize(
    "data", [png_header(50_000, 50_000), jpeg_header(50_000, 50_000), webp_header(16_000, 16_000)]
)
def test_a_bomb_is_refused_by_its_header(data):
    with pytest.raises(DecodeError) as caught:
        decode_image(data, key="bomb")

    assert caught.value.reason == "too_many_pixels"


def test_the_pixel_cap_is_an_option_and_its_edge_is_allowed():
    assert decode_image(PNG, key="k", options=DecodeOptions(max_pixels=24 * 32)).shape[0] == 24
    with pytest.raises(DecodeError, match="exceeds max_pixels=767") as caught:
        decode_image(PNG, key="k", options=DecodeOptions(max_pixels=24 * 32 - 1))

    assert caught.value.reason == "too_many_pixels"


def test_a_cap_above_pillows_own_lets_larger_images_through(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)

    assert decode_image(PNG, key="k").shape == (24, 32, 3)
    assert decode_image(JPEG, key="k").shape == (24, 32, 3)


def test_a_cap_below_one_pixel_is_a_configuration_error():
    with pytest.raises(ConfigError, match="max_pixels must be at least 1"):
        DecodeOptions(max_pixels=0)


@pytest.mark.parametrize(("width", "height"), [(0, 10), (10, 0), (0, 0)])
def test_an_image_without_extent_is_corrupt(width, height):
    with pytest.raises(DecodeError) as caught:
        decode_image(png_header(width, height), key="k")

    assert caught.value.reason == "corrupt_image"


@settings(max_examples=400, deadline=None)
@given(
    original=st.sampled_from([JPEG, PROGRESSIVE, PNG, WEBP, LOSSLESS]),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=8),
    kept=st.floats(0.02, 1),
)
def test_damaged_bytes_give_an_image_or_a_decode_error(original, flips, kept):
    data = bytearray(original)
    for place, mask in flips:
        data[int(place * len(data))] ^= mask

    outcome = pixels_or_reason(bytes(data[: int(kept * len(data))]))

    assert isinstance(outcome, bytes) or outcome in {
        "empty_image",
        "not_an_image",
        "too_many_pixels",
        "corrupt_image",
    }


def test_many_threads_decode_the_same_pixels():
    originals = [JPEG, PNG, WEBP, LOSSLESS] * 25

    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda data: decode_image(data, key="k"), originals))

    for data, image in zip(originals, images, strict=True):
        np.testing.assert_array_equal(image, as_transformers_loads_it(data))
