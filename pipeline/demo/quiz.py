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

import numpy as np
from PIL import Image, ImageDraw

from pipeline.demo.quiz_drawing import (
    COLORS,
    EDGE,
    PATTERNS,
    SCALE,
    SHAPES,
    Box,
    canvas,
    draw_background,
    draw_glyph,
    draw_outline,
    draw_pattern,
    draw_specks,
    jitter,
    with_noise,
)

FAMILIES = ("read", "attribute", "count", "relation", "page")
GLYPHS = "ABCDEFGHJKLMNPRTUVXYZ23456789"  # none that another looks like (0 O Q, 1 I, 5 S, W)
PLACES = ("top left", "top right", "bottom left", "bottom right")
SIDES = ("left", "right", "above", "below")
MAX_COUNT = 4

_LETTERS, _DIGITS = GLYPHS[:21], GLYPHS[21:]
_CLEARLY_FARTHER = 1.4  # of one direction than of the other, for a relation to be asked
_MIN_COLOR_DISTANCE = 140  # of a shape to what is behind it, so that it can be seen


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
        photos: grey or RGB, whose crops serve as backgrounds; none: drawn ones only.
    """
    return draw_page(rng) if rng.random() < 1 / 3 else draw_scene(rng, photos)


def draw_scene(rng: random.Random, photos: Sequence[Image.Image] = ()) -> Quiz:
    """Draw two plates with text, and five to eight shapes, over clutter."""
    image = draw_background(rng, photos)
    items: list[Item] = []
    for color in rng.sample(sorted(COLORS), 2):
        _add_plate(image, rng, items, color)
    for shape in _choose_shapes(rng):
        _add_shape(image, rng, items, shape)
    return Quiz(
        image=with_noise(image, rng),
        items=tuple(items),
        lines=(),
        questions=tuple(_scene_questions(items)),
    )


def draw_page(rng: random.Random) -> Quiz:
    """Draw five or six lines, each a letter and a number, between words that do not matter."""
    paper = tuple(rng.randint(205, 252) for _ in range(3))
    image = Image.new("RGB", (EDGE, EDGE), paper)
    draw_specks(image, rng, 60, spread=14)
    layer, mask = canvas()
    draw, ink = ImageDraw.Draw(mask), tuple(rng.randint(10, 70) for _ in range(3))
    keys = rng.sample(_LETTERS, rng.choice((5, 6)))
    pitch = rng.uniform(23, 26)
    top = rng.uniform(8, EDGE - pitch * (len(keys) - 1) - 18)
    lines = []
    for number, key in enumerate(keys):
        lines.append(_draw_line(draw, rng, key, top + number * pitch))
    layer.paste(ink, (0, 0, *layer.size))
    image.paste(layer.reduce(SCALE), (0, 0), mask.reduce(SCALE))
    questions = tuple(
        Question(
            family="page",
            prompt=f"what number is in line {line[0].char}",
            answer=" ".join(glyph.char for glyph in line[1:]),
        )
        for line in lines
    )
    return Quiz(image=with_noise(image, rng), items=(), lines=tuple(lines), questions=questions)


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
    asked = [("read", f"read the plate that is {plate.color}", plate.text) for plate in plates]
    places = [_place(plate.center) for plate in plates]
    for plate, place in zip(plates, places, strict=True):
        if place is not None and places.count(place) == 1:
            asked.append(("read", f"read the plate at the {place}", plate.text))
    for shape in single:
        asked.append(("attribute", f"what color is the {shape.kind}", shape.color))
        asked.append(("attribute", f"what pattern is on the {shape.kind}", shape.pattern))
    # One kind that is there once, the first drawn, so any of them; and all that are there more
    # often. Were all asked that are there once, 1 would be a good guess.
    once = [shape.kind for shape in single[:1]]
    for kind in sorted([*once, *(kind for kind in counts if counts[kind] > 1)]):
        asked.append(("count", f"count every {kind}", str(counts[kind])))
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
    paint = jitter(rng, COLORS[color])
    is_light = 0.3 * paint[0] + 0.59 * paint[1] + 0.11 * paint[2] > 115
    ink = (15, 15, 20) if is_light else (245, 245, 245)
    draw = ImageDraw.Draw(image)
    draw.rectangle(box, fill=paint, outline=ink if rng.random() < 0.5 else None)
    layer, mask = canvas()
    middle = (box[1] + box[3]) / 2
    glyphs = []
    for index, char in enumerate(rng.choices(GLYPHS, k=3)):
        center = (box[0] + 4 + pitch * (index + 0.5), middle)
        draw_glyph(ImageDraw.Draw(mask), char, center, size)
        glyphs.append(Glyph(char=char, center=center, index=index))
    layer.paste(ink, (0, 0, *layer.size))
    image.paste(layer.reduce(SCALE), (0, 0), mask.reduce(SCALE))
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
        draw.line([p * SCALE for p in (x, y + 2, x + wide, y + 2)], fill=150, width=SCALE)
        draw.line([p * SCALE for p in (x, y - 2, x + wide - 2, y - 2)], fill=110, width=SCALE)
        x += wide + 3
    x += rng.uniform(10, EDGE - x - 28)
    for index, char in enumerate(rng.choices(_DIGITS, k=2)):
        center = (x + index * size * 0.68, y)
        glyphs.append(Glyph(char=char, center=center, index=index, line=key))
    for glyph in glyphs:
        draw_glyph(draw, glyph.char, glyph.center, size)
    return tuple(glyphs)


def _add_shape(image: Image.Image, rng: random.Random, items: list[Item], shape: str) -> None:
    edge = rng.uniform(19, 27)
    box = _free_box(rng, items, edge, edge)
    if box is None:
        return
    left, top, right, bottom = box
    around = (round(left), round(top), round(right), round(bottom))
    behind = np.asarray(image.crop(around)).reshape(-1, 3).mean(0)
    visible = [
        name
        for name, paint in sorted(COLORS.items())
        if np.abs(behind - paint).sum() > _MIN_COLOR_DISTANCE
    ]
    color, pattern = rng.choice(visible), rng.choice(PATTERNS)
    paint = jitter(rng, COLORS[color])
    layer, mask = canvas()
    draw_outline(ImageDraw.Draw(mask), shape, box)
    layer.paste(paint, (0, 0, *layer.size))
    if pattern != "plain":
        draw_pattern(ImageDraw.Draw(layer), pattern, box, paint)
    x, y = math.floor(left) - 1, math.floor(top) - 1
    beyond = (math.floor(right) + 1, math.floor(bottom) + 1)
    large = (x * SCALE, y * SCALE, beyond[0] * SCALE, beyond[1] * SCALE)
    image.paste(layer.crop(large).reduce(SCALE), (x, y), mask.crop(large).reduce(SCALE))
    items.append(Item(kind=shape, color=color, pattern=pattern, box=box))
