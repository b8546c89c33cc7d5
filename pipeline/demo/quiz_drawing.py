"""Backgrounds, letters and shapes of the pictures with questions."""

import math
import random
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

EDGE = 168  # pixels; 12 x 12 patches of 14
SCALE = 2  # letters and shapes are drawn so much larger, then averaged down
COLORS = {
    "red": (205, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 220, 60),
    "green": (50, 150, 70),
    "blue": (45, 85, 200),
    "purple": (140, 60, 170),
    "white": (240, 240, 240),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring")
PATTERNS = ("plain", "striped", "dotted")

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Color = tuple[int, int, int]


def draw_background(rng: random.Random, photos: Sequence[Image.Image]) -> Image.Image:
    if photos and rng.random() < 0.5:
        image = _photo_crop(rng, rng.choice(photos))
    else:
        corners = [[rng.randint(40, 215) for _ in range(3)] for _ in range(4)]
        small = Image.fromarray(np.array(corners, dtype=np.uint8).reshape(2, 2, 3))
        image = small.resize((EDGE, EDGE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(6, 14)):
        x, y = rng.uniform(-20, EDGE), rng.uniform(-20, EDGE)
        color = tuple(rng.randint(50, 205) for _ in range(3))
        if rng.random() < 0.5:
            end = (x + rng.uniform(-70, 70), y + rng.uniform(-70, 70))
            draw.line((x, y, *end), fill=color, width=rng.randint(1, 2))
        else:
            draw.arc((x, y, x + rng.uniform(8, 60), y + rng.uniform(8, 60)), 0, 300, fill=color)
    draw_specks(image, rng, 120, spread=40)
    return image


def _photo_crop(rng: random.Random, photo: Image.Image) -> Image.Image:
    """Return a part of a photograph with less contrast, so that shapes stand out."""
    edge = min(photo.size) * rng.uniform(0.3, 1)
    left, top = rng.uniform(0, photo.width - edge), rng.uniform(0, photo.height - edge)
    crop = photo.resize((EDGE, EDGE), box=(left, top, left + edge, top + edge)).convert("RGB")
    return Image.blend(Image.new("RGB", crop.size, (128, 128, 128)), crop, rng.uniform(0.4, 0.7))


def draw_specks(image: Image.Image, rng: random.Random, number: int, *, spread: int) -> None:
    draw = ImageDraw.Draw(image)
    for _ in range(number):
        x, y = rng.randrange(EDGE), rng.randrange(EDGE)
        near = image.getpixel((x, y))
        if not isinstance(near, tuple):
            raise TypeError(f"a pixel of a picture of mode {image.mode}, expected RGB")
        color = tuple(min(255, max(0, value + rng.randint(-spread, spread))) for value in near)
        draw.rectangle((x, y, x + rng.randint(0, 2), y + rng.randint(0, 2)), fill=color)


def with_noise(image: Image.Image, rng: random.Random) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 4, (EDGE, EDGE, 1))
    pixels = np.asarray(image, dtype=np.float32) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def canvas() -> tuple[Image.Image, Image.Image]:
    """Return a picture to draw on, and its mask, both `SCALE` times as large."""
    size = (EDGE * SCALE, EDGE * SCALE)
    return Image.new("RGB", size), Image.new("L", size)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def draw_glyph(
    draw: ImageDraw.ImageDraw, char: str, center: tuple[float, float], size: float
) -> None:
    """Draw on a mask of `SCALE` times the size; thickened, or small text would be faint."""
    place = (center[0] * SCALE, center[1] * SCALE)
    font = _font(round(size * SCALE))
    draw.text(place, char, font=font, fill=255, anchor="mm", stroke_width=0.5)


def draw_outline(draw: ImageDraw.ImageDraw, shape: str, box: Box) -> None:
    left, top, right, bottom = (b * SCALE for b in box)
    x, y, half = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=255)
    elif shape == "square":
        inset = half * 0.14
        draw.rectangle((left + inset, top + inset, right - inset, bottom - inset), fill=255)
    elif shape == "ring":
        draw.ellipse((left, top, right, bottom), fill=255)
        hole = half * 0.45
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    elif shape == "cross":
        arm = half * 0.36
        draw.rectangle((left, y - arm, right, y + arm), fill=255)
        draw.rectangle((x - arm, top, x + arm, bottom), fill=255)
    else:
        draw.polygon(_corners(shape, (x, y), half), fill=255)


def _corners(shape: str, center: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    if shape == "triangle":
        places = [(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)]
    elif shape == "diamond":
        places = [(0.0, -1.0), (0.75, 0.0), (0.0, 1.0), (-0.75, 0.0)]
    elif shape == "star":
        turns = [(math.pi * i / 5, 1 if i % 2 == 0 else 0.42) for i in range(10)]
        places = [(math.sin(turn) * far, -math.cos(turn) * far) for turn, far in turns]
    else:
        raise ValueError(f"no shape {shape!r}; known: {', '.join(SHAPES)}")
    return [(center[0] + x * radius, center[1] + y * radius) for x, y in places]


def draw_pattern(draw: ImageDraw.ImageDraw, pattern: str, box: Box, paint: Color) -> None:
    """Draw stripes or dots in a shade far from the paint."""
    shade = tuple(value // 3 if sum(paint) > 300 else (value + 2 * 255) // 3 for value in paint)
    left, top, right, bottom = (b * SCALE for b in box)
    if pattern == "striped":
        y = top
        while y < bottom:
            draw.line((left, y, right, y), fill=shade, width=round(2.2 * SCALE))
            y += 6 * SCALE
        return
    y, radius = top + 2 * SCALE, 1.5 * SCALE
    while y < bottom:
        x = left + 2 * SCALE
        while x < right:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
            x += 6 * SCALE
        y += 6 * SCALE


def jitter(rng: random.Random, color: Color) -> Color:
    red, green, blue = (min(255, max(0, value + rng.randint(-12, 12))) for value in color)
    return red, green, blue
