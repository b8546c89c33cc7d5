"""Drawn pictures with questions whose answers need fine detail, and where each detail stands.

Five families of questions: `read` (a short text by the colour or the place of its plate),
`attribute` (colour or pattern of a shape), `count`, `relation` (where one shape is, seen from
another) and `page` (a small number in a line of a document). Objects cover 5 to 40 % of a
cluttered picture of 168 x 168 pixels, so that throwing away the wrong tokens shows. The model of
the demo and of `benchmarks/yardstick` is trained on these pictures.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

EDGE = 168  # pixels; 12 x 12 patches of 14
FAMILIES = ("read", "attribute", "count", "relation", "page")
GLYPHS = "ABCDEFGHJKLMNPRTUVXYZ23456789"  # none that another looks like (0 O Q, 1 I, 5 S, W)
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
PLACES = ("top left", "top right", "bottom left", "bottom right")
SIDES = ("left", "right", "above", "below")
MAX_COUNT = 4

_SCALE = 2  # everything is drawn so much larger, then averaged down
_LETTERS, _DIGITS = GLYPHS[:21], GLYPHS[21:]
_CLEARLY_FARTHER = 1.4  # of one direction than of the other, for a relation to be asked
_MIN_COLOR_DISTANCE = 140  # of a shape to what is behind it, so that it can be seen

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Color = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Glyph:
    """One letter or digit that a question may ask for."""

    char: str
    center: tuple[float, float]
    index: int  # in its word or number, from 0; -1 for the letter that names a line
    line: str = ""  # the letter that names its line, on a page


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One shape or plate."""

    kind: str  # a shape, or "plate"
    color: str
    pattern: str  # "" for a plate
    box: Box
    glyphs: tuple[Glyph, ...] = ()

    @property
    def center(self) -> tuple[float, float]:
        """Of its box, in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def text(self) -> str:
        """As it is answered: glyphs with spaces between."""
        return " ".join(glyph.char for glyph in self.glyphs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about one picture, and its only right answer."""

    family: str
    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Quiz:
    """A picture, its questions, and where what they ask for stands."""

    image: Image.Image  # RGB, EDGE x EDGE
    items: tuple[Item, ...]
    lines: tuple[tuple[Glyph, ...], ...]  # of a page: its letter, then its digits
    questions: tuple[Question, ...]


def draw_quiz(rng: random.Random, photos: Sequence[Image.Image] = ()) -> Quiz:
    """Draw a scene, or in one of three cases a page.

    Args:
        rng: decides everything.
        photos: RGB pictures whose crops serve as backgrounds; none: drawn ones only.
    """
    return draw_page(rng) if rng.random() < 1 / 3 else draw_scene(rng, photos)


def draw_scene(rng: random.Random, photos: Sequence[Image.Image] = ()) -> Quiz:
    """Draw two plates with text, and five to eight shapes, over clutter."""
    image = _background(rng, photos)
    items: list[Item] = []
    for color in rng.sample(sorted(COLORS), 2):
        _add_plate(image, rng, items, color)
    for shape in _choose_shapes(rng):
        _add_shape(image, rng, items, shape)
    return Quiz(
        image=_with_noise(image, rng),
        items=tuple(items),
        lines=(),
        questions=tuple(_scene_questions(items)),
    )


def draw_page(rng: random.Random) -> Quiz:
    """Draw five or six lines, each a letter and a number, between words that do not matter."""
    paper = tuple(rng.randint(205, 252) for _ in range(3))
    image = Image.new("RGB", (EDGE, EDGE), paper)
    _draw_specks(image, rng, 60, spread=14)
    layer, mask = _canvas()
    draw, ink = ImageDraw.Draw(mask), tuple(rng.randint(10, 70) for _ in range(3))
    keys = rng.sample(_LETTERS, rng.choice((5, 6)))
    pitch = rng.uniform(23, 26)
    top = rng.uniform(8, EDGE - pitch * (len(keys) - 1) - 18)
    lines = []
    for number, key in enumerate(keys):
        lines.append(_draw_line(draw, rng, key, top + number * pitch))
    layer.paste(ink, (0, 0, *layer.size))
    image.paste(layer.reduce(_SCALE), (0, 0), mask.reduce(_SCALE))
    questions = tuple(
        Question(
            family="page",
            prompt=f"what number is in line {line[0].char}",
            answer=" ".join(glyph.char for glyph in line[1:]),
        )
        for line in lines
    )
    return Quiz(image=_with_noise(image, rng), items=(), lines=tuple(lines), questions=questions)


def _choose_shapes(rng: random.Random) -> list[str]:
    """Return the shapes to draw: three of one each, one or two of several."""
    kinds = rng.sample(SHAPES, rng.choice((4, 5)))
    counts = [1, 1, 1, rng.randint(1, MAX_COUNT), rng.randint(1, 2)]
    return [kind for kind, count in zip(kinds, counts, strict=False) for _ in range(count)]


def _scene_questions(items: Sequence[Item]) -> list[Question]:
    plates = [item for item in items if item.kind == "plate"]
    shapes = [item for item in items if item.kind != "plate"]
    counts = Counter(shape.kind for shape in shapes)
    single = [shape for shape in shapes if counts[shape.kind] == 1]
    asked = [("read", f"read the {plate.color} plate", plate.text) for plate in plates]
    places = [_place(plate.center) for plate in plates]
    for plate, place in zip(plates, places, strict=True):
        if place is not None and places.count(place) == 1:
            asked.append(("read", f"read the plate at the {place}", plate.text))
    for shape in single:
        asked.append(("attribute", f"what color is the {shape.kind}", shape.color))
        asked.append(("attribute", f"what pattern is on the {shape.kind}", shape.pattern))
    for kind in sorted(counts):
        asked.append(("count", f"how many {kind} shapes", str(counts[kind])))
    for one in single:
        for other in single:
            side = _side(one.center, other.center) if one is not other else None
            if side is not None:
                prompt = f"where is the {one.kind} from the {other.kind}"
                asked.append(("relation", prompt, side))
    return [Question(family=f, prompt=p, answer=a) for f, p, a in asked]


def _place(center: tuple[float, float]) -> str | None:
    """Return the corner of the picture that a point is clearly in."""
    x, y = center
    if min(abs(x - EDGE / 2), abs(y - EDGE / 2)) < EDGE / 12:
        return None
    return f"{'top' if y < EDGE / 2 else 'bottom'} {'left' if x < EDGE / 2 else 'right'}"


def _side(center: tuple[float, float], seen_from: tuple[float, float]) -> str | None:
    """Return where a point is, seen from another, if one direction is clearly the main one."""
    x, y = center[0] - seen_from[0], center[1] - seen_from[1]
    if abs(x) > _CLEARLY_FARTHER * abs(y):
        return "left" if x < 0 else "right"
    if abs(y) > _CLEARLY_FARTHER * abs(x):
        return "above" if y < 0 else "below"
    return None


def _background(rng: random.Random, photos: Sequence[Image.Image]) -> Image.Image:
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
    _draw_specks(image, rng, 120, spread=40)
    return image


def _photo_crop(rng: random.Random, photo: Image.Image) -> Image.Image:
    """Return a part of a photograph with less contrast, so that shapes stand out."""
    edge = min(photo.size) * rng.uniform(0.3, 1)
    left, top = rng.uniform(0, photo.width - edge), rng.uniform(0, photo.height - edge)
    crop = photo.resize((EDGE, EDGE), box=(left, top, left + edge, top + edge))
    return Image.blend(Image.new("RGB", crop.size, (128, 128, 128)), crop, rng.uniform(0.4, 0.7))


def _draw_specks(image: Image.Image, rng: random.Random, number: int, *, spread: int) -> None:
    draw = ImageDraw.Draw(image)
    for _ in range(number):
        x, y = rng.randrange(EDGE), rng.randrange(EDGE)
        near = image.getpixel((x, y))
        if not isinstance(near, tuple):
            raise TypeError(f"a pixel of a picture of mode {image.mode}, expected RGB")
        color = tuple(min(255, max(0, value + rng.randint(-spread, spread))) for value in near)
        draw.rectangle((x, y, x + rng.randint(0, 2), y + rng.randint(0, 2)), fill=color)


def _with_noise(image: Image.Image, rng: random.Random) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 4, (EDGE, EDGE, 1))
    pixels = np.asarray(image, dtype=np.float32) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _canvas() -> tuple[Image.Image, Image.Image]:
    """Return a picture to draw on, and its mask, both `_SCALE` times as large."""
    size = (EDGE * _SCALE, EDGE * _SCALE)
    return Image.new("RGB", size), Image.new("L", size)


def _free_box(rng: random.Random, items: Sequence[Item], width: float, height: float) -> Box | None:
    """Return a box that touches no item, or None where no room was found."""
    for _ in range(60):
        left, top = rng.uniform(2, EDGE - 2 - width), rng.uniform(2, EDGE - 2 - height)
        box = (left, top, left + width, top + height)
        if not any(_touch(box, item.box) for item in items):
            return box
    return None


def _touch(one: Box, other: Box, gap: float = 4) -> bool:
    return (
        one[0] < other[2] + gap
        and other[0] < one[2] + gap
        and one[1] < other[3] + gap
        and other[1] < one[3] + gap
    )


def _add_plate(image: Image.Image, rng: random.Random, items: list[Item], color: str) -> None:
    size = rng.uniform(17, 21)
    pitch = size * rng.uniform(0.85, 0.95)
    box = _free_box(rng, items, 3 * pitch + 8, size * 1.35)
    if box is None:
        return
    paint = _jitter(rng, COLORS[color])
    is_light = 0.3 * paint[0] + 0.59 * paint[1] + 0.11 * paint[2] > 115
    ink = (15, 15, 20) if is_light else (245, 245, 245)
    draw = ImageDraw.Draw(image)
    draw.rectangle(box, fill=paint, outline=ink if rng.random() < 0.5 else None)
    layer, mask = _canvas()
    middle = (box[1] + box[3]) / 2
    glyphs = []
    for index, char in enumerate(rng.choices(GLYPHS, k=3)):
        center = (box[0] + 4 + pitch * (index + 0.5), middle)
        _draw_glyph(ImageDraw.Draw(mask), char, center, size)
        glyphs.append(Glyph(char=char, center=center, index=index))
    layer.paste(ink, (0, 0, *layer.size))
    image.paste(layer.reduce(_SCALE), (0, 0), mask.reduce(_SCALE))
    items.append(Item(kind="plate", color=color, pattern="", box=box, glyphs=tuple(glyphs)))


def _draw_line(
    draw: ImageDraw.ImageDraw, rng: random.Random, key: str, top: float
) -> tuple[Glyph, ...]:
    """Draw a letter, a word, and a number of two digits; return the glyphs."""
    size = rng.uniform(11, 12.5)
    y = top + size / 2
    x = rng.uniform(8, 14)
    glyphs = [Glyph(char=key, center=(x, y), index=-1, line=key)]
    x += rng.uniform(16, 26)
    for _ in range(rng.randint(2, 4)):  # a word that only looks like one
        wide = rng.uniform(4, 9)
        draw.line([p * _SCALE for p in (x, y + 2, x + wide, y + 2)], fill=150, width=_SCALE)
        draw.line([p * _SCALE for p in (x, y - 2, x + wide - 2, y - 2)], fill=110, width=_SCALE)
        x += wide + 3
    x += rng.uniform(10, EDGE - x - 28)
    for index, char in enumerate(rng.choices(_DIGITS, k=2)):
        center = (x + index * size * 0.68, y)
        glyphs.append(Glyph(char=char, center=center, index=index, line=key))
    for glyph in glyphs:
        _draw_glyph(draw, glyph.char, glyph.center, size)
    return tuple(glyphs)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _draw_glyph(
    draw: ImageDraw.ImageDraw, char: str, center: tuple[float, float], size: float
) -> None:
    """Draw on a mask of `_SCALE` times the size; thickened, or small text would be faint."""
    place = (center[0] * _SCALE, center[1] * _SCALE)
    font = _font(round(size * _SCALE))
    draw.text(place, char, font=font, fill=255, anchor="mm", stroke_width=0.5)


def _add_shape(image: Image.Image, rng: random.Random, items: list[Item], shape: str) -> None:
    edge = rng.uniform(19, 27)
    box = _free_box(rng, items, edge, edge)
    if box is None:
        return
    behind = np.asarray(image.crop(tuple(round(b) for b in box))).reshape(-1, 3).mean(0)
    visible = [
        name
        for name, paint in sorted(COLORS.items())
        if np.abs(behind - paint).sum() > _MIN_COLOR_DISTANCE
    ]
    color, pattern = rng.choice(visible), rng.choice(PATTERNS)
    paint = _jitter(rng, COLORS[color])
    layer, mask = _canvas()
    _draw_outline(ImageDraw.Draw(mask), shape, box)
    layer.paste(paint, (0, 0, *layer.size))
    if pattern != "plain":
        _draw_pattern(ImageDraw.Draw(layer), pattern, box, paint)
    region = tuple(math.floor(b) - 1 + 2 * (i > 1) for i, b in enumerate(box))
    large = tuple(b * _SCALE for b in region)
    image.paste(layer.crop(large).reduce(_SCALE), region[:2], mask.crop(large).reduce(_SCALE))
    items.append(Item(kind=shape, color=color, pattern=pattern, box=box))


def _draw_outline(draw: ImageDraw.ImageDraw, shape: str, box: Box) -> None:
    left, top, right, bottom = (b * _SCALE for b in box)
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
        places = [(0, -1.0), (1, 0.9), (-1, 0.9)]
    elif shape == "diamond":
        places = [(0, -1.0), (0.75, 0), (0, 1), (-0.75, 0)]
    elif shape == "star":
        turns = [(math.pi * i / 5, 1 if i % 2 == 0 else 0.42) for i in range(10)]
        places = [(math.sin(turn) * far, -math.cos(turn) * far) for turn, far in turns]
    else:
        raise ValueError(f"no shape {shape!r}; known: {', '.join(SHAPES)}")
    return [(center[0] + x * radius, center[1] + y * radius) for x, y in places]


def _draw_pattern(draw: ImageDraw.ImageDraw, pattern: str, box: Box, paint: Color) -> None:
    """Draw stripes or dots in a shade far from the paint."""
    shade = tuple(value // 3 if sum(paint) > 300 else (value + 2 * 255) // 3 for value in paint)
    left, top, right, bottom = (b * _SCALE for b in box)
    if pattern == "striped":
        y = top
        while y < bottom:
            draw.line((left, y, right, y), fill=shade, width=round(2.2 * _SCALE))
            y += 6 * _SCALE
        return
    y, radius = top + 2 * _SCALE, 1.5 * _SCALE
    while y < bottom:
        x = left + 2 * _SCALE
        while x < right:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
            x += 6 * _SCALE
        y += 6 * _SCALE


def _jitter(rng: random.Random, color: Color) -> Color:
    red, green, blue = (min(255, max(0, value + rng.randint(-12, 12))) for value in color)
    return red, green, blue
