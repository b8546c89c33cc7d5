"""What the tower learns to say of every patch: glyphs, colours, shapes, patterns and places.

From question answering alone a tower learns slowly; from 144 labelled patches an image it learns
to read in half an hour on two cores. P patches of an image in raster order.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from pipeline.demo.quiz import GLYPHS, Glyph, Item, Quiz
from pipeline.demo.quiz_drawing import COLORS, EDGE, PATTERNS, SHAPES, Box

PATCH = 14  # pixels
SIDE = EDGE // PATCH
NONE = 0  # the class of a patch that a head has nothing to say of

_MIN_COVER = 0.25  # share of a patch that an item must cover to give it its colour and kind

HEADS: Mapping[str, int] = {
    "left_glyph": 1 + len(GLYPHS),  # whose centre is in the left half of the patch
    "right_glyph": 1 + len(GLYPHS),
    "left_index": 5,  # none, names a line, first, second, third of its word
    "right_index": 5,
    "line": 1 + len(GLYPHS),  # the letter that names the line of the patch's glyph
    "color": 1 + len(COLORS),
    "kind": 2 + len(SHAPES),  # none, plate, or a shape
    "pattern": 1 + len(PATTERNS),
    "center": 2 + len(SHAPES),  # what has its centre here
    "row": SIDE,
    "column": SIDE,
}
"""Number of classes of each head; class 0 is `NONE` but for row and column."""

CONTENTS = len(GLYPHS) + 2 * len(COLORS) + len(SHAPES)
"""What the class token learns to say of an image: which of these are in it."""

WORDS: Mapping[str, tuple[str, ...]] = {
    "left_glyph": tuple(GLYPHS),
    "right_glyph": tuple(GLYPHS),
    "line": tuple(GLYPHS),
    "color": tuple(COLORS),
    "kind": ("plate", *SHAPES),
    "pattern": PATTERNS,
}
"""The word for each class of a head, from class 1 on; the other heads have none."""

_COLOR_NAMES = tuple(COLORS)
_KINDS = WORDS["kind"]


def patch_targets(quiz: Quiz) -> np.ndarray:
    """Return the class of every patch for every head, (P, H) uint8, heads in order of `HEADS`."""
    grids = {name: np.zeros((SIDE, SIDE), dtype=np.uint8) for name in HEADS}
    grids["row"][:], grids["column"][:] = np.arange(SIDE)[:, None], np.arange(SIDE)[None]
    for item in quiz.items:
        for row, column in _covered(item.box):
            grids["color"][row, column] = 1 + _COLOR_NAMES.index(item.color)
            grids["kind"][row, column] = 1 + _KINDS.index(item.kind)
            if item.pattern:
                grids["pattern"][row, column] = 1 + PATTERNS.index(item.pattern)
        x, y = item.center
        grids["center"][int(y // PATCH), int(x // PATCH)] = 1 + _KINDS.index(item.kind)
    for glyph in _glyphs(quiz):
        _mark(grids, glyph)
    return np.stack([grids[name].reshape(-1) for name in HEADS], axis=1)


def image_targets(quiz: Quiz) -> np.ndarray:
    """Return which glyphs, colours of plates and shapes, and shapes are there, (CONTENTS,) bool."""
    found = np.zeros(CONTENTS, dtype=bool)
    for glyph in _glyphs(quiz):
        found[GLYPHS.index(glyph.char)] = True
    for item in quiz.items:
        found[_place_of(item)] = True
        if item.kind != "plate":
            found[len(GLYPHS) + 2 * len(COLORS) + SHAPES.index(item.kind)] = True
    return found


def patch_words(patches_BPH: np.ndarray, vocabulary: Mapping[str, int]) -> np.ndarray:
    """Return which words are true of each patch, (B, P, V) bool, for (B, P, H) targets."""
    found = np.zeros((*patches_BPH.shape[:2], len(vocabulary)), dtype=bool)
    for place, name in enumerate(HEADS):
        if name not in WORDS:
            continue
        ids = np.array([0, *(vocabulary[word] for word in WORDS[name])])
        np.put_along_axis(found, ids[patches_BPH[..., place]][..., None], True, axis=2)
    for name, (first, second) in (("row", ("top", "bottom")), ("column", ("left", "right"))):
        half = patches_BPH[..., list(HEADS).index(name)] < SIDE // 2
        found[..., vocabulary[first]] = half
        found[..., vocabulary[second]] = ~half
    found[..., 0] = False  # the padding token took the patches without a word
    return found


def _place_of(item: Item) -> int:
    offset = len(GLYPHS) + (0 if item.kind == "plate" else len(COLORS))
    return offset + _COLOR_NAMES.index(item.color)


def _glyphs(quiz: Quiz) -> Iterator[Glyph]:
    for item in quiz.items:
        yield from item.glyphs
    for line in quiz.lines:
        yield from line


def _mark(grids: Mapping[str, np.ndarray], glyph: Glyph) -> None:
    x, y = glyph.center
    row, column = int(y // PATCH), int(x // PATCH)
    side = "left" if x - column * PATCH < PATCH / 2 else "right"
    grids[f"{side}_glyph"][row, column] = 1 + GLYPHS.index(glyph.char)
    grids[f"{side}_index"][row, column] = 2 + glyph.index
    if glyph.line:
        grids["line"][row, column] = 1 + GLYPHS.index(glyph.line)


def _covered(box: Box) -> Iterator[tuple[int, int]]:
    left, top, right, bottom = (edge / PATCH for edge in box)
    for row in range(int(top), min(SIDE, int(bottom) + 1)):
        for column in range(int(left), min(SIDE, int(right) + 1)):
            width = min(right, column + 1) - max(left, column)
            height = min(bottom, row + 1) - max(top, row)
            if width * height >= _MIN_COVER:
                yield row, column
