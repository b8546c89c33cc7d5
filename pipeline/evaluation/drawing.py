"""Tokens drawn over the pixels a model saw: which stayed, how many each stands for, which went.

The one place that draws tokens. A token is a square of 24 pixels. What stayed keeps its colours;
what was merged into others is dim, what was dropped is dark and nearly grey. A token that stands
for several has a frame and their number in it.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from pipeline.errors import ConfigError
from pipeline.types import TileLayout

Color: TypeAlias = tuple[int, int, int]

CELL = 24  # pixels of a token's square
GAP = 8  # pixels between views

_FRAMES = (  # a token of at least so many source tokens, and the colour of its frame
    (10, (216, 70, 239)),
    (4, (255, 40, 70)),
    (3, (255, 120, 0)),
    (2, (255, 196, 0)),
)
_MERGED = (0.5, 0.7)  # brightness and colour left
_DROPPED = (0.3, 0.25)
_PAPER, _INK, _SOFT = (250, 250, 248), (27, 31, 36), (91, 101, 112)
_FRAMES_PER_ROW = 8
_MARGIN = 16  # pixels around panels of a sheet
_LINE = 24  # pixels of a line of text
_LEAST_CAPTION = 10 * CELL


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenImage:
    """What a model saw of one image or clip, and where its tokens lie. Made by `seen_image`."""

    views: Sequence[Image.Image]  # RGB; the grid covers each: the image, thumbnail and tiles, or
    # frames, in the order in which positions count
    grid: tuple[int, int]  # rows, columns of a view
    tiles: TileLayout | None = None

    @property
    def num_tokens(self) -> int:
        """N of all views together."""
        return len(self.views) * self.grid[0] * self.grid[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCounts:
    """What became of the tokens of an image."""

    kept: int
    merged: int  # stand in the sizes of kept ones
    dropped: int

    def __str__(self) -> str:
        """Return the counts in words."""
        total = self.kept + self.merged + self.dropped
        return f"{self.kept} of {total} kept, {self.merged} merged, {self.dropped} dropped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One picture of a sheet."""

    title: str
    note: str
    image: Image.Image


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelRow:
    """Panels side by side."""

    panels: Sequence[Panel]
    heading: str = ""


def seen_image(
    prepared: NDArray[np.uint8],
    grid: tuple[int, int],
    *,
    num_views: int = 1,
    tiles: TileLayout | None = None,
) -> SeenImage:
    """Say where the tokens of a preprocessed image lie.

    The patches are the largest squares that fill the grid, from the top left corner; what is left
    at the right and at the bottom, less than a patch, the model does not see.

    Args:
        prepared: (H, W, 3) as `Encoder.preprocess` gives it; several views of one size lie one
            below the other.
        grid: rows, columns of one view.
        num_views: see `VisualTokens`.
        tiles: see `VisualTokens`.

    Raises:
        ConfigError: the tokens do not lie over the image (the class token may be one of them), or
            tiles and views do not fit.
    """
    if tiles is not None and tiles.canvas is not None:
        raise ConfigError(
            f"the canvas of this image was resampled to {tiles.canvas[0]} x {tiles.canvas[1]} "
            "tokens, which lie over no patches of it, so they cannot be drawn; a smaller image can"
        )
    if tiles is not None and num_views != 1 + tiles.rows * tiles.columns:
        raise ConfigError(
            f"{num_views} views do not fit {tiles.rows} x {tiles.columns} tiles and a thumbnail"
        )
    height, width = prepared.shape[0] // num_views, prepared.shape[1]
    (rows, columns) = grid
    patch = min(height // rows, width // columns)
    if patch == 0 or (height // patch, width // patch) != grid:
        raise ConfigError(
            f"{rows} x {columns} tokens do not lie over a view of {height} x {width} pixels, so "
            "they cannot be drawn (is the class token one of them?)"
        )
    views = [
        Image.fromarray(prepared[top : top + rows * patch, : columns * patch])
        for top in range(0, num_views * height, height)
    ]
    return SeenImage(views=views, grid=grid, tiles=tiles)


def count_tokens(num_tokens: int, sizes: Sequence[float]) -> TokenCounts:
    """Return what became of `num_tokens` tokens, by the sizes of those that stayed."""
    kept = len(sizes)
    merged = min(num_tokens, round(sum(sizes))) - kept
    return TokenCounts(kept=kept, merged=merged, dropped=num_tokens - kept - merged)


def draw_image(seen: SeenImage) -> Image.Image:
    """Return what the model saw, of the size and layout of `draw_tokens`."""
    return _lay_out(seen, [_enlarged(view, seen.grid) for view in seen.views])


def draw_tokens(
    seen: SeenImage, positions: Sequence[int], sizes: Sequence[float] | None = None
) -> Image.Image:
    """Dim what was merged, darken what was dropped, and number what stands for several.

    Sizes say how many tokens were merged, not which: a token that did not stay is dim where all
    of them were merged, and dark otherwise. Thumbnail and tiles of a tiled image stand side by
    side, the tiles as they lie, with a line around what is not padding; frames in rows of eight.

    Args:
        seen: the image.
        positions: of the kept tokens, through all views.
        sizes: source tokens that each stands for; None if not known.

    Returns:
        RGB, 24 pixels a token.

    Raises:
        ValueError: a position is outside of the views, or there are not as many sizes.
    """
    wrong = [position for position in positions if not 0 <= position < seen.num_tokens]
    if wrong:
        raise ValueError(f"position {wrong[0]} is outside of [0, {seen.num_tokens})")
    if sizes is None:
        sizes = [1.0] * len(positions)
    size_by_position = dict(zip(positions, sizes, strict=True))
    none_dropped = count_tokens(seen.num_tokens, sizes).dropped == 0
    per_view = seen.grid[0] * seen.grid[1]
    drawn = []
    for index, view in enumerate(seen.views):
        first = index * per_view
        sizes_n = [size_by_position.get(first + cell, 0.0) for cell in range(per_view)]
        drawn.append(_draw_view(view, seen.grid, sizes_n, _MERGED if none_dropped else _DROPPED))
    return _lay_out(seen, drawn)


def draw_sheet(rows: Sequence[PanelRow]) -> Image.Image:
    """Put rows of panels below each other on a light sheet, each panel under its title and note.

    Args:
        rows: from the top; at least one, of at least one panel each.
    """
    bands = [_band(row) for row in rows]
    width = max(band.width for band in bands)
    bands = [
        _under(_text_lines([(row.heading, 20, _INK)], width), band)
        for row, band in zip(rows, bands, strict=True)
    ]
    placed, top = [], _MARGIN
    for band in bands:
        placed.append((band, (_MARGIN, top)))
        top += band.height + _MARGIN
    sheet = Image.new("RGB", (width + 2 * _MARGIN, top), _PAPER)
    for band, place in placed:
        sheet.paste(band, place)
    return sheet


def _enlarged(view: Image.Image, grid: tuple[int, int]) -> Image.Image:
    rows, columns = grid
    return view.resize((columns * CELL, rows * CELL), Image.Resampling.BICUBIC)


def _draw_view(
    view: Image.Image,
    grid: tuple[int, int],
    sizes_n: Sequence[float],  # of every cell; 0 where the token did not stay
    shade: tuple[float, float],
) -> Image.Image:
    rows, columns = grid
    bright = _enlarged(view, grid)
    brightness, colour = shade
    dim = ImageEnhance.Color(ImageEnhance.Brightness(bright).enhance(brightness)).enhance(colour)
    kept = Image.frombytes("L", (columns, rows), bytes(255 * (size > 0) for size in sizes_n))
    drawn = Image.composite(bright, dim, kept.resize(bright.size, Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(drawn)
    for cell, size in enumerate(sizes_n):
        if round(size) > 1:
            row, column = divmod(cell, columns)
            _draw_frame(draw, column * CELL, row * CELL, round(size))
    return drawn


def _draw_frame(draw: ImageDraw.ImageDraw, left: int, top: int, size: int) -> None:
    color = next(color for least, color in _FRAMES if size >= least)
    box = (left, top, left + CELL - 1, top + CELL - 1)
    draw.rectangle(box, outline=color, width=2)
    text = str(size)
    font = ImageFont.load_default(size={1: 14, 2: 14, 3: 11}.get(len(text), 8))
    middle = (left + CELL / 2, top + CELL / 2)
    draw.text(
        middle, text, font=font, fill="white", anchor="mm", stroke_width=2, stroke_fill="black"
    )


def _lay_out(seen: SeenImage, drawn: Sequence[Image.Image]) -> Image.Image:
    """Put drawn views where they belong: tiles on their canvas, frames in rows."""
    if len(drawn) == 1:
        return drawn[0]
    if seen.tiles is None:
        return _pasted(list(_in_rows(drawn, min(len(drawn), _FRAMES_PER_ROW))))
    thumbnail, *tiles = drawn
    # No gap within the canvas: the tiles are one picture.
    canvas = _pasted(list(_in_rows(tiles, seen.tiles.columns, gap=0)))
    draw = ImageDraw.Draw(canvas)
    edges = [edge * CELL for edge in seen.tiles.unpadded]
    top, bottom, left, right = edges
    draw.rectangle((left, top, right - 1, bottom - 1), outline="white", width=1)
    return _pasted([(thumbnail, (0, 0)), (canvas, (thumbnail.width + GAP, 0))])


def _in_rows(
    views: Sequence[Image.Image], columns: int, *, gap: int = GAP
) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Yield views of one size with their left and top."""
    for index, view in enumerate(views):
        row, column = divmod(index, columns)
        yield view, (column * (view.width + gap), row * (view.height + gap))


def _pasted(placed: Sequence[tuple[Image.Image, tuple[int, int]]]) -> Image.Image:
    right = max(left + image.width for image, (left, _) in placed)
    bottom = max(top + image.height for image, (_, top) in placed)
    joined = Image.new("RGB", (right, bottom), _PAPER)
    for image, place in placed:
        joined.paste(image, place)
    return joined


def _band(row: PanelRow) -> Image.Image:
    """Return the panels of a row side by side, their pictures at one height."""
    captions = [
        _text_lines(
            [(panel.title, 18, _INK), (panel.note, 14, _SOFT)],
            max(panel.image.width, _LEAST_CAPTION),
        )
        for panel in row.panels
    ]
    depth = max(caption.height for caption in captions)
    placed, left = [], 0
    for panel, caption in zip(row.panels, captions, strict=True):
        placed += [(caption, (left, 0)), (panel.image, (left, depth))]
        left += max(caption.width, panel.image.width) + _MARGIN
    return _pasted(placed)


def _text_lines(texts: Sequence[tuple[str, int, Color]], width: int) -> Image.Image:
    """Return texts, each of a font size and a colour, in as many lines as the width asks for."""
    lines = []
    for text, size, color in texts:
        font = ImageFont.load_default(size=size)
        length = max(1, int(width / font.getlength("n")))
        lines += [(line, font, color) for line in textwrap.wrap(text, width=length)]
    image = Image.new("RGB", (width, _LINE * len(lines)), _PAPER)
    draw = ImageDraw.Draw(image)
    for index, (line, font, color) in enumerate(lines):
        draw.text((0, _LINE * index), line, font=font, fill=color)
    return image


def _under(above: Image.Image, below: Image.Image) -> Image.Image:
    return _pasted([(above, (0, 0)), (below, (0, above.height))])
