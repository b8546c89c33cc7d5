"""Images drawn from nothing: simple scenes and pages of text, each with its caption."""

import random
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Draw = Callable[[ImageDraw.ImageDraw, random.Random, int, int], str]

_SKIES: dict[str, tuple[Color, Color]] = {  # from the top to the horizon
    "a clear sky": ((64, 132, 214), (205, 228, 246)),
    "an evening sky": ((52, 41, 88), (246, 165, 98)),
    "a grey sky": ((138, 148, 160), (214, 218, 222)),
    "a night sky": ((8, 12, 36), (44, 52, 96)),
}
_PAINTS: dict[str, Color] = {
    "red": (190, 52, 44),
    "yellow": (232, 196, 72),
    "white": (240, 238, 230),
    "blue": (58, 98, 168),
    "green": (66, 132, 84),
    "orange": (226, 128, 52),
}
_COUNTS = ("no", "one", "two", "three", "four", "five", "six")
_GOODS = ("bread", "milk", "apples", "rice", "tea", "honey", "paper", "candles", "soap", "cheese")
_SUBJECTS = ("the harbour", "the library", "a small engine", "the night train", "the garden")
_VERBS = (
    "opens at noon",
    "was painted again",
    "is closed on monday",
    "waits for rain",
    "runs late",
)
_ENDINGS = ("so bring a coat", "and nobody minds", "as it did last year", "until the bell rings")
_SIGNS = ("EXIT", "OPEN", "PLATFORM 4", "NO PARKING", "LIBRARY", "TICKETS", "GATE 12", "CAFE")


def draw_scene(rng: random.Random, width: int, height: int) -> tuple[Image.Image, str]:
    """Draw houses, trees and a sun or moon in a landscape.

    Args:
        rng: decides everything.
        width: of the image, in pixels.
        height: of the image, in pixels.

    Returns:
        The RGB image and a caption that says what is in it.
    """
    sky = rng.choice(sorted(_SKIES))
    horizon = round(height * rng.uniform(0.5, 0.7))
    image = _gradient(width, height, *_SKIES[sky])
    draw = ImageDraw.Draw(image)
    unit = min(width, height) / 10
    _draw_light(draw, rng, sky, width, horizon, unit)
    _draw_hills(draw, rng, width, height, horizon)
    paint = rng.choice(sorted(_PAINTS))
    num_houses, num_trees = rng.randint(1, 3), rng.randint(0, 6)
    for _ in range(num_trees):
        _draw_tree(draw, rng, width, height, horizon)
    for _ in range(num_houses):
        _draw_house(draw, rng, _PAINTS[paint], (width, height, horizon))
    houses = "house" if num_houses == 1 else "houses"
    trees = "tree" if num_trees == 1 else "trees"
    caption = f"{_COUNTS[num_houses]} {paint} {houses} and {_COUNTS[num_trees]} {trees} under {sky}"
    return image, caption


def draw_text(rng: random.Random, width: int, height: int) -> tuple[Image.Image, str]:
    """Draw a page of prose, a receipt or a sign.

    Args:
        rng: decides everything.
        width: of the image, in pixels.
        height: of the image, in pixels.

    Returns:
        The RGB image and a caption.
    """
    drawings: tuple[Draw, ...] = (_draw_page, _draw_receipt, _draw_sign)
    image = Image.new("RGB", (width, height), rng.choice([(252, 250, 244), (255, 255, 255)]))
    caption = rng.choice(drawings)(ImageDraw.Draw(image), rng, width, height)
    return image, caption


def _gradient(width: int, height: int, top: Color, bottom: Color) -> Image.Image:
    """Return an image that fades from one colour to another."""
    strip = Image.new("RGB", (1, 2))
    strip.putpixel((0, 0), top)
    strip.putpixel((0, 1), bottom)
    return strip.resize((width, height), Image.Resampling.BILINEAR)


def _draw_light(
    draw: ImageDraw.ImageDraw,
    rng: random.Random,
    sky: str,
    width: int,
    horizon: int,
    unit: float,
) -> None:
    """Draw sun or moon, and stars at night."""
    is_night = sky == "a night sky"
    if is_night:
        for _ in range(60):
            x, y = rng.uniform(0, width), rng.uniform(0, horizon)
            draw.ellipse((x, y, x + unit / 18, y + unit / 18), fill=(230, 230, 210))
    x, y = rng.uniform(unit, width - unit), rng.uniform(unit, horizon / 2 + unit)
    fill = (226, 226, 214) if is_night else (255, 240, 180)
    draw.ellipse((x - unit * 0.8, y - unit * 0.8, x + unit * 0.8, y + unit * 0.8), fill=fill)


def _draw_hills(
    draw: ImageDraw.ImageDraw, rng: random.Random, width: int, height: int, horizon: int
) -> None:
    for layer in range(3):
        base = horizon + (height - horizon) * layer / 5
        points = [(0.0, float(height))]
        points += [
            (width * step / 8, base - rng.uniform(0, height / (9 + 6 * layer))) for step in range(9)
        ]
        shade = 104 + 22 * layer
        draw.polygon([*points, (width, height)], fill=(shade - 40, shade + 18, shade - 58))


def _draw_tree(
    draw: ImageDraw.ImageDraw, rng: random.Random, width: int, height: int, horizon: int
) -> None:
    x, foot = rng.uniform(0, width), rng.uniform(horizon, height * 0.92)
    size = height * rng.uniform(0.09, 0.2)
    draw.rectangle((x - size / 14, foot - size / 3, x + size / 14, foot), fill=(92, 66, 44))
    green = (34 + rng.randint(0, 24), 84 + rng.randint(0, 40), 50)
    if rng.random() < 0.5:
        draw.ellipse((x - size / 2.6, foot - size, x + size / 2.6, foot - size / 4), fill=green)
    else:
        top = [(x, foot - size * 1.3), (x - size / 3, foot - size / 4)]
        draw.polygon([*top, (x + size / 3, foot - size / 4)], fill=green)


def _draw_house(
    draw: ImageDraw.ImageDraw,
    rng: random.Random,
    paint: Color,
    canvas: tuple[int, int, int],  # width, height, horizon
) -> None:
    width, height, horizon = canvas
    wide, tall = width * rng.uniform(0.12, 0.24), height * rng.uniform(0.1, 0.18)
    left, foot = rng.uniform(0, width - wide), rng.uniform(horizon + tall / 3, height * 0.95)
    draw.rectangle((left, foot - tall, left + wide, foot), fill=paint, outline=(60, 50, 46))
    roof = [(left - wide / 10, foot - tall), (left + wide * 1.1, foot - tall)]
    draw.polygon([*roof, (left + wide / 2, foot - tall * 1.7)], fill=(98, 58, 48))
    draw.rectangle(
        (left + wide * 0.42, foot - tall * 0.5, left + wide * 0.58, foot), fill=(70, 48, 38)
    )
    for place in (0.12, 0.7):
        x, y = left + wide * place, foot - tall * 0.72
        draw.rectangle((x, y, x + wide * 0.18, y + tall * 0.3), fill=(250, 232, 150))


def _draw_page(draw: ImageDraw.ImageDraw, rng: random.Random, width: int, height: int) -> str:
    size = max(12, min(width, height) // 22)
    font = ImageFont.load_default(size=size)
    subject = rng.choice(_SUBJECTS)
    y = float(size)
    while y < height - 2 * size:
        line = f"{subject} {rng.choice(_VERBS)}, {rng.choice(_ENDINGS)}."
        for part in _wrapped(line.capitalize(), font, width - 2 * size):
            draw.text((size, y), part, font=font, fill=(28, 28, 32))
            y += size * 1.35
        subject = rng.choice(_SUBJECTS)
        y += size * 0.5
    return "a page of printed text"


def _wrapped(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> list[str]:
    parts = [""]
    for word in line.split():
        longer = f"{parts[-1]} {word}".strip()
        if font.getlength(longer) > room and parts[-1]:
            parts.append(word)
        else:
            parts[-1] = longer
    return parts


def _draw_receipt(draw: ImageDraw.ImageDraw, rng: random.Random, width: int, height: int) -> str:
    size = max(13, min(width, height) // 18)
    font = ImageFont.load_default(size=size)
    goods = rng.sample(_GOODS, k=min(7, max(3, int(height / size / 2.2) - 3)))
    draw.text((size, size), "CORNER SHOP", font=font, fill=(20, 20, 24))
    y, total = size * 3.0, 0
    for name in goods:
        cents = rng.randint(49, 1999)
        total += cents
        _draw_price(draw, font, name, cents, (size, y, width - size))
        y += size * 1.6
    draw.line((size, y, width - size, y), fill=(60, 60, 66), width=max(1, size // 12))
    _draw_price(draw, font, "total", total, (size, y + size * 0.5, width - size))
    return f"a receipt for {', '.join(goods[:-1])} and {goods[-1]}"


def _draw_price(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    name: str,
    cents: int,
    place: tuple[float, float, float],  # left, top, right
) -> None:
    left, top, right = place
    price = f"{cents // 100}.{cents % 100:02d}"
    draw.text((left, top), name, font=font, fill=(20, 20, 24))
    draw.text((right - font.getlength(price), top), price, font=font, fill=(20, 20, 24))


def _draw_sign(draw: ImageDraw.ImageDraw, rng: random.Random, width: int, height: int) -> str:
    words = rng.choice(_SIGNS)
    paint = rng.choice(sorted(set(_PAINTS) - {"white", "yellow"}))
    draw.rectangle((0, 0, width, height), fill=(176, 178, 180))
    left, top = width * rng.uniform(0.05, 0.15), height * rng.uniform(0.15, 0.35)
    right, bottom = width - left, top + height * rng.uniform(0.3, 0.45)
    edge = max(3, min(width, height) // 60)
    draw.rounded_rectangle(
        (left, top, right, bottom),
        radius=edge * 4,
        fill=_PAINTS[paint],
        outline=(245, 245, 245),
        width=edge,
    )
    draw.rectangle((width / 2 - edge * 2, bottom, width / 2 + edge * 2, height), fill=(90, 92, 96))
    size = 100.0
    size *= 0.8 * (right - left) / ImageFont.load_default(size=size).getlength(words)
    font = ImageFont.load_default(size=min(size, (bottom - top) * 0.6))
    middle = ((left + right) / 2, (top + bottom) / 2)
    draw.text(middle, words, font=font, fill=(250, 250, 250), anchor="mm")
    return f"a {paint} sign that says {words.lower()}"
