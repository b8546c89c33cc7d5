"""Pictures for the report: which tokens of an image stayed, drawn over it."""

import base64
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

_CELL = 24  # pixels of a token's square
_FRAMES = ((255, 196, 0), (255, 120, 0), (255, 40, 70))  # two tokens in one, three, four or more


def draw_kept_tokens(
    image: Image.Image,
    grid: tuple[int, int],
    positions: Sequence[int],
    sizes: Sequence[float],
) -> Image.Image:
    """Dim what was dropped, and frame each token that stands for several.

    Args:
        image: RGB, as the encoder saw it; the grid covers it.
        grid: rows, columns.
        positions: of the kept tokens, row by row.
        sizes: source tokens that each stands for; above 1, the number is written into the frame.

    Returns:
        RGB, 24 pixels a token.
    """
    rows, columns = grid
    bright = image.resize((columns * _CELL, rows * _CELL), Image.Resampling.BICUBIC)
    drawn = ImageEnhance.Color(ImageEnhance.Brightness(bright).enhance(0.3)).enhance(0.25)
    boxes = [_box(position, columns) for position in positions]
    for box in boxes:
        drawn.paste(bright.crop(box), box)
    draw = ImageDraw.Draw(drawn)
    for box, size in zip(boxes, sizes, strict=True):
        if size > 1:
            _draw_frame(draw, box, round(size))
    return drawn


def data_uri(image: Image.Image, *, edge: int) -> str:
    """Return a JPEG of an image, scaled to `edge` pixels in width, for an `img` element."""
    height = round(image.height * edge / image.width)
    if image.size != (edge, height):
        image = image.resize((edge, height), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.save(sink, format="jpeg", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()


def _box(position: int, columns: int) -> tuple[int, int, int, int]:
    row, column = divmod(position, columns)
    left, top = column * _CELL, row * _CELL
    return left, top, left + _CELL, top + _CELL


def _draw_frame(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], size: int) -> None:
    left, top, right, bottom = box
    color = _FRAMES[min(size, len(_FRAMES) + 1) - 2]
    draw.rectangle((left, top, right - 1, bottom - 1), outline=color, width=2)
    font = ImageFont.load_default(size=14)
    middle = ((left + right) / 2, (top + bottom) / 2)
    draw.text(
        middle, str(size), font=font, fill="white", anchor="mm", stroke_width=2, stroke_fill="black"
    )
