import dataclasses

import pytest
import torch
from torch.testing import assert_close

from pipeline import carvers
from pipeline.carvers.globalcom2 import tile_ratios
from pipeline.types import CarvedTokens, TileLayout, VisualTokens
from tests.carvers.inputs import make_tokens
from tests.golden import golden_cases

CASES = golden_cases("globalcom2")

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("globalcom2", options).carve(tokens)


def unpadded(width: int, height: int, tile_rows: int, tile_columns: int, side: int):
    """The box that an image resized to fit fills on the canvas, in tokens."""
    canvas_height, canvas_width = tile_rows * side, tile_columns * side
    if width / height > canvas_width / canvas_height:
        pad = (canvas_height - int(height * (canvas_width / width))) // 2
        return (pad, canvas_height - pad, 0, canvas_width)
    pad = (canvas_width - int(width * (canvas_height / height))) // 2
    return (0, canvas_height, pad, canvas_width - pad)


def golden(case) -> VisualTokens:
    options = case.options
    rows, columns = options["grid_height"], options["grid_width"]
    side = options["patches_per_side"]
    return VisualTokens(
        features=case.inputs["features"].flatten(0, 1)[None],
        grid=(side, side),
        signals={"cls_logits": case.inputs["scores"].flatten()[None]},
        num_views=1 + rows * columns,
        tiles=TileLayout(
            rows=rows,
            columns=columns,
            unpadded=unpadded(
                options["original_width"], options["original_height"], rows, columns, side
            ),
        ),
    )


def stored(case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View, source and canvas cell of each token of the tiles that the released code emits."""
    of_tiles = case.expected["stream_source"][:, 0] >= 1
    view, row, column = case.expected["stream_source"][of_tiles].long().unbind(1)
    side = case.options["patches_per_side"]
    source = view * side**2 + row * side + column
    cell_row, cell_column = case.expected["stream_cell"][of_tiles].long().unbind(1)
    tile = cell_row // side * case.options["grid_width"] + cell_column // side
    assert torch.equal(tile + 1, view)
    cell = view * side**2 + cell_row % side * side + cell_column % side
    return source, cell, of_tiles.nonzero().flatten()


def test_padded_and_unpadded_golden_cases_are_there():
    assert {case.options["padded"] for case in CASES} == {True, False}
    assert len(CASES) == 5


@every_case
def test_the_thumbnail_keeps_what_the_released_code_keeps_in_its_order(case):
    result = carve(golden(case), keep_ratio=case.options["retention_ratio"])[0]

    in_order = result.positions[result.ranks.argsort()]
    thumbnail = case.expected["thumbnail_positions"].long()
    assert torch.equal(in_order[: len(thumbnail)], thumbnail)
    assert (in_order[len(thumbnail) :] >= 576).all()


@every_case
def test_each_tile_has_the_released_ratio_and_count(case):
    tokens = golden(case)

    result = carve(tokens, keep_ratio=case.options["retention_ratio"])[0]
    ratios = tile_ratios(
        tokens.signals["cls_logits"][:, :576],
        tokens.grid,
        tokens.tiles,
        case.options["retention_ratio"],
        case.options["temperature"],
    )

    assert_close(ratios[0], case.expected["crop_ratios"], rtol=1e-6, atol=1e-9)
    counts = torch.bincount(result.positions // 576, minlength=tokens.num_views)
    assert torch.equal(counts[1:].int(), case.expected["crop_keep"])


@every_case
def test_faithful_placement_puts_features_where_the_released_code_does(case):
    tokens = golden(case)
    source, cell, in_stream = stored(case)

    result = carve(tokens, keep_ratio=case.options["retention_ratio"], placement="faithful")[0]

    of_tiles = result.positions >= 576
    by_cell = cell.argsort()
    assert torch.equal(result.positions[of_tiles], cell[by_cell])
    assert torch.equal(result.features[of_tiles], tokens.features[0][source[by_cell]])
    assert torch.equal(result.features[of_tiles], case.expected["stream"][in_stream[by_cell]])


@every_case
def test_corrected_placement_gives_every_token_its_own_position(case):
    tokens = golden(case)
    source, _, _ = stored(case)

    result = carve(tokens, keep_ratio=case.options["retention_ratio"], placement="corrected")[0]

    of_tiles = result.positions >= 576
    assert torch.equal(result.positions[of_tiles], source.sort().values)
    assert torch.equal(result.features, tokens.features[0][result.positions])


@every_case
def test_corrected_positions_lie_inside_the_image(case):
    tokens = golden(case)
    top, bottom, left, right = tokens.tiles.unpadded

    result = carve(tokens, keep_ratio=case.options["retention_ratio"], placement="corrected")[0]

    of_tiles = result.positions[result.positions >= 576] - 576
    tile, cell = of_tiles // 576, of_tiles % 576
    row = tile // tokens.tiles.columns * 24 + cell // 24
    column = tile % tokens.tiles.columns * 24 + cell % 24
    assert ((top <= row) & (row < bottom) & (left <= column) & (column < right)).all()


def tiled(*, unpadded: tuple[int, int, int, int], batch: int = 2, seed: int = 0) -> VisualTokens:
    """Two by three tiles of 4 x 5 tokens and their thumbnail."""
    tokens = make_tokens(["cls_logits"], batch=batch, grid=(4, 5), num_views=7, width=6, seed=seed)
    layout = TileLayout(rows=2, columns=3, unpadded=unpadded)
    return dataclasses.replace(tokens, tiles=layout)


def test_a_tile_that_the_thumbnail_attends_to_keeps_more():
    tokens = tiled(unpadded=(0, 8, 0, 15), batch=1)
    logits = torch.zeros_like(tokens.signals["cls_logits"])
    logits[0, [3, 4]] = 8.0  # the top right of the thumbnail: tile 2
    tokens = dataclasses.replace(tokens, signals={"cls_logits": logits})

    result = carve(tokens, keep_ratio=0.3)[0]

    counts = torch.bincount(result.positions // 20, minlength=7).tolist()
    assert counts[0] == 6
    assert counts[3] > counts[1] == counts[2] == counts[4] == counts[5] == counts[6]


def test_a_tiles_own_and_the_thumbnails_attention_count_alike():
    tokens = tiled(unpadded=(0, 8, 0, 15), batch=1)
    logits = torch.full_like(tokens.signals["cls_logits"], 0.01)
    logits[0, 0] = 1.0  # the thumbnail sees the top left of the image, that is of the first tile
    logits[0, 20 + 19] = 1.0  # the first tile sees its own bottom right
    tokens = dataclasses.replace(tokens, signals={"cls_logits": logits})

    result = carve(tokens, keep_tokens=40)[0]

    of_first = result.positions[result.positions // 20 == 1] - 20
    assert {0, 19} <= set(of_first.tolist())


def test_tokens_that_see_only_padding_are_left_out():
    tokens = tiled(unpadded=(2, 6, 0, 15))

    for result in carve(tokens, keep_ratio=0.9, placement="corrected"):
        tile, cell = result.positions // 20 - 1, result.positions % 20
        row = tile // 3 * 4 + cell // 5
        assert ((row >= 2) & (row < 6))[tile >= 0].all()
        assert (tile >= 0).any()


@pytest.mark.parametrize("placement", ["faithful", "corrected"])
@pytest.mark.parametrize("keep", [1, 2, 7, 33, 70, 139])
@pytest.mark.parametrize("box", [(0, 8, 0, 15), (2, 6, 0, 15), (0, 8, 4, 11)])
def test_there_are_never_more_tokens_than_the_budget_and_at_least_one(placement, keep, box):
    tokens = tiled(unpadded=box, seed=keep)

    for image, result in enumerate(carve(tokens, keep_tokens=keep, placement=placement)):
        count = len(result.positions)
        assert 1 <= count <= keep
        assert (result.positions.diff() > 0).all()
        assert result.ranks.sort().values.tolist() == list(range(count))
        rows = {tuple(row) for row in tokens.features[image].tolist()}
        assert all(tuple(row) in rows for row in result.features.tolist())


@pytest.mark.parametrize(
    "budget", [{"keep_tokens": 140}, {"keep_tokens": 999}, {"keep_ratio": 1.0}]
)
def test_a_budget_of_all_tokens_keeps_all_views_whole(budget):
    tokens = tiled(unpadded=(2, 6, 0, 15))

    for image, result in enumerate(carve(tokens, **budget)):
        assert result.positions.tolist() == list(range(140))
        assert torch.equal(result.features, tokens.features[image])


def test_an_image_of_tiles_does_not_depend_on_its_batch_mates():
    tokens = tiled(unpadded=(0, 8, 4, 11), batch=3)

    together = carve(tokens, keep_ratio=0.3)

    for image, result in enumerate(together):
        one = dataclasses.replace(
            tokens,
            features=tokens.features[image : image + 1],
            signals={"cls_logits": tokens.signals["cls_logits"][image : image + 1]},
        )
        alone = carve(one, keep_ratio=0.3)[0]
        assert torch.equal(alone.positions, result.positions)
        assert torch.equal(alone.ranks, result.ranks)
        assert torch.equal(alone.features, result.features)


def test_an_image_without_tiles_keeps_its_highest_attention():
    tokens = make_tokens(["cls_logits"], batch=1, grid=(4, 5))
    order = tokens.signals["cls_logits"][0].argsort(descending=True)

    result = carve(tokens, keep_tokens=7)[0]

    assert torch.equal(result.positions[result.ranks.argsort()], order[:7])


def test_a_lower_temperature_makes_shares_differ_more():
    scores = torch.arange(24.0 * 24)[None] / 1000
    layout = TileLayout(rows=2, columns=2, unpadded=(0, 48, 0, 48))

    mild = tile_ratios(scores, (24, 24), layout, 0.25, 100.0)[0]
    sharp = tile_ratios(scores, (24, 24), layout, 0.25, 10.0)[0]

    assert (mild.diff() > 0).all()
    assert sharp.max() - sharp.min() > mild.max() - mild.min()
    assert_close(mild.mean().item(), 0.25)


def test_tiles_of_which_there_are_more_than_tokens_in_a_row_share_the_last_ones():
    scores = torch.rand(1, 4)
    layout = TileLayout(rows=1, columns=3, unpadded=(0, 2, 0, 6))

    ratios = tile_ratios(scores, (2, 2), layout, 0.3, 10.0)[0]

    # Two columns for three tiles: the third has none, and the sum of nothing is 0.
    assert ratios[2] < ratios[:2].min()


def test_received_attention_takes_the_place_of_the_class_token():
    tokens = tiled(unpadded=(0, 8, 4, 11), batch=1)
    received = dataclasses.replace(
        tokens, signals={"received_attention": tokens.signals["cls_logits"]}
    )

    expected = carve(tokens, keep_tokens=20)[0]
    result = carve(received, keep_tokens=20, attention="received_attention")[0]

    assert torch.equal(result.positions, expected.positions)
