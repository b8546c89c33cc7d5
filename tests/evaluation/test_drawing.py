"""Tokens drawn over an image: the right shade, at the right place."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.encoders import build
from pipeline.errors import ConfigError
from pipeline.evaluation.drawing import (
    CELL,
    GAP,
    Panel,
    PanelRow,
    SeenImage,
    count_tokens,
    draw_image,
    draw_sheet,
    draw_tokens,
    seen_image,
)
from pipeline.types import TileLayout
from tests.encoders.tiny_models import EDGE, VISION, save_processor, save_vit

ORANGE = (200, 100, 50)


def plain(rows: int, columns: int, *, views: int = 1, tiles: TileLayout | None = None) -> SeenImage:
    pixels = np.full((views * rows * 7, columns * 7, 3), ORANGE, dtype=np.uint8)
    return seen_image(pixels, (rows, columns), num_views=views, tiles=tiles)


def cell(image: Image.Image, row: int, column: int, *, left: int = 0, top: int = 0) -> Image.Image:
    """Return the inside of a cell, without frames and lines."""
    x, y = left + column * CELL, top + row * CELL
    return image.crop((x + 2, y + 2, x + CELL - 2, y + CELL - 2))


def is_unchanged(part: Image.Image) -> bool:
    return part.getcolors() == [(part.width * part.height, ORANGE)]


def brightest(part: Image.Image) -> int:
    return max(int(high) for _, high in part.getextrema())


def test_dropped_tokens_are_dark_kept_ones_unchanged_and_merged_ones_framed() -> None:
    drawn = draw_tokens(plain(2, 3), positions=[0, 3], sizes=[1.0, 3.0])

    assert drawn.size == (3 * CELL, 2 * CELL)
    assert drawn.crop((0, 0, CELL, CELL)).getcolors() == [(CELL * CELL, ORANGE)]
    assert brightest(drawn.crop((CELL, 0, 3 * CELL, CELL))) < 70
    assert drawn.getpixel((0, CELL)) == (255, 120, 0)
    assert (255, 255, 255) in {color for _, color in cell(drawn, 1, 0).getcolors(CELL * CELL)}


def test_merged_tokens_are_brighter_than_dropped_ones_and_darker_than_kept_ones() -> None:
    merged = draw_tokens(plain(2, 2), positions=[0], sizes=[4.0])
    dropped = draw_tokens(plain(2, 2), positions=[0], sizes=[1.0])
    unknown = draw_tokens(plain(2, 2), positions=[0])

    assert brightest(cell(dropped, 0, 1)) < brightest(cell(merged, 0, 1)) < max(ORANGE)
    assert unknown.tobytes() == dropped.tobytes()


def test_larger_sizes_have_frames_of_other_colours() -> None:
    drawn = draw_tokens(plain(1, 5), positions=range(5), sizes=[1.0, 2.0, 3.0, 4.0, 120.0])

    frames = [drawn.getpixel((column * CELL, 0)) for column in range(5)]

    assert frames[0] == ORANGE
    assert len(set(frames)) == 5


def test_counts_add_up_to_all_tokens() -> None:
    assert str(count_tokens(16, [1.0] * 4)) == "4 of 16 kept, 0 merged, 12 dropped"
    assert str(count_tokens(16, [3.0, 1.0])) == "2 of 16 kept, 2 merged, 12 dropped"
    assert str(count_tokens(16, [15.0, 1.0])) == "2 of 16 kept, 14 merged, 0 dropped"


@pytest.mark.parametrize("position", [-1, 4])
def test_a_position_outside_of_the_image_is_refused(position: int) -> None:
    with pytest.raises(ValueError, match=rf"position {position} is outside of \[0, 4\)"):
        draw_tokens(plain(2, 2), positions=[position])


def test_a_crop_is_drawn_where_the_model_saw_it(tmp_path: Path) -> None:
    """Left and right thirds are cut away: the model's first column is the middle's."""
    save_vit(tmp_path, "clip")
    encoder = build("vit", {"model": str(tmp_path)})
    image = np.zeros((90, 270, 3), dtype=np.uint8)
    image[:, 90:180] = ORANGE
    image[:, 180:] = (0, 0, 255)
    side = EDGE // VISION["patch_size"]

    drawn = draw_tokens(seen_image(encoder.preprocess(image), (side, side)), positions=[5, 6, 9])

    assert drawn.size == (side * CELL, side * CELL)
    assert all(is_unchanged(cell(drawn, *divmod(place, side))) for place in (5, 6, 9))
    assert brightest(cell(drawn, 2, 2)) < 70


def test_padding_is_drawn_as_the_model_saw_it(tmp_path: Path) -> None:
    """A flat image is padded to a square: its pixels lie in the two middle rows."""
    save_vit(tmp_path, "clip")
    padding = {
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "image_mean": [1.0, 1.0, 1.0],
        "size": {"shortest_edge": EDGE},
        "do_center_crop": False,
    }
    save_processor(tmp_path, padding)
    encoder = build("vit", {"model": str(tmp_path)})
    image = np.full((140, 280, 3), ORANGE, dtype=np.uint8)

    drawn = draw_image(seen_image(encoder.preprocess(image), (4, 4)))

    assert cell(drawn, 0, 0).resize((1, 1)).getpixel((0, 0))[2] > 230
    assert np.allclose(np.asarray(cell(drawn, 1, 2))[10], ORANGE, atol=3)


def test_pixels_that_fill_no_patch_are_left_out() -> None:
    pixels = np.zeros((31, 30, 3), dtype=np.uint8)
    pixels[:28, :28] = ORANGE

    seen = seen_image(pixels, (4, 4))

    assert seen.views[0].size == (28, 28)
    assert is_unchanged(draw_image(seen))


@pytest.mark.parametrize("grid", [(1, 17), (4, 3), (40, 40)])
def test_tokens_that_do_not_lie_over_the_image_are_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"do not lie over a view of 28 x 28 pixels"):
        seen_image(np.zeros((28, 28, 3), dtype=np.uint8), grid)


def test_tiles_lie_on_their_canvas_beside_the_thumbnail() -> None:
    """Position 12 is the first token of the last tile, whose place is down and right."""
    tiles = TileLayout(rows=1, columns=2, unpadded=(0, 2, 0, 4))
    seen = plain(2, 2, views=3, tiles=tiles)
    canvas = 2 * CELL + GAP

    drawn = draw_tokens(seen, positions=[3, 4, 9], sizes=[1.0, 1.0, 1.0])

    assert seen.num_tokens == 12
    assert drawn.size == (canvas + 4 * CELL, 2 * CELL)
    assert is_unchanged(cell(drawn, 1, 1))
    assert is_unchanged(cell(drawn, 0, 0, left=canvas))
    assert is_unchanged(cell(drawn, 0, 3, left=canvas))
    assert brightest(cell(drawn, 0, 2, left=canvas)) < 70
    assert brightest(cell(drawn, 0, 0)) < 70


def test_a_line_shows_what_of_the_canvas_is_not_padding() -> None:
    tiles = TileLayout(rows=2, columns=1, unpadded=(1, 3, 0, 2))
    drawn = draw_tokens(plain(2, 2, views=3, tiles=tiles), positions=range(12))
    canvas = 2 * CELL + GAP

    assert drawn.getpixel((canvas, CELL)) == (255, 255, 255)
    assert drawn.getpixel((canvas, 3 * CELL - 1)) == (255, 255, 255)
    assert drawn.getpixel((canvas, CELL - 1)) == ORANGE


def test_a_resampled_canvas_is_refused_by_name() -> None:
    tiles = TileLayout(rows=3, columns=3, unpadded=(0, 9, 0, 9), canvas=(5, 5))

    with pytest.raises(ConfigError, match="resampled to 5 x 5 tokens"):
        plain(1, 41, tiles=tiles)


def test_tiles_that_do_not_fit_the_views_are_refused() -> None:
    tiles = TileLayout(rows=2, columns=2, unpadded=(0, 4, 0, 4))

    with pytest.raises(ConfigError, match=r"3 views do not fit 2 x 2 tiles and a thumbnail"):
        plain(2, 2, views=3, tiles=tiles)


def test_frames_of_a_clip_stand_side_by_side_in_rows_of_eight() -> None:
    drawn = draw_tokens(plain(1, 1, views=9), positions=[8])

    assert drawn.size == (8 * CELL + 7 * GAP, 2 * CELL + GAP)
    assert is_unchanged(cell(drawn, 0, 0, top=CELL + GAP))
    assert brightest(cell(drawn, 0, 0)) < 70


def test_panels_of_a_sheet_keep_their_pixels_under_their_titles() -> None:
    panel = Panel(title="a carver", note="2 of 4 kept", image=Image.new("RGB", (240, 240), ORANGE))

    sheet = draw_sheet([PanelRow(panels=[panel, panel], heading="x.jpg"), PanelRow(panels=[panel])])

    colors = dict((color, count) for count, color in sheet.getcolors(1 << 20))
    assert sheet.width > 480 and sheet.height > 480
    assert colors[ORANGE] == 3 * 240 * 240
