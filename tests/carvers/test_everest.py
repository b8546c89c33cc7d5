import pytest
import torch
from torch.testing import assert_close

from pipeline import carvers
from pipeline.carvers.everest import changes
from pipeline.types import CarvedTokens, TileLayout, VisualTokens
from tests.carvers.inputs import make_tokens
from tests.golden import golden_cases

CASES = golden_cases("everest")


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("everest", options).carve(tokens)


def by_rank(result: CarvedTokens) -> list[int]:
    return result.positions[result.ranks.argsort()].tolist()


def clip(*frames: list[float]) -> VisualTokens:
    """Frames of a grid of one row, features one wide."""
    features = torch.tensor(frames).flatten()[None, :, None]
    return VisualTokens(features=features, grid=(1, len(frames[0])), num_views=len(frames))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_equals_the_published_code(case):
    tubelets, cells = case.options["tubelets"], case.options["cells"]
    side = round(cells**0.5)
    tokens = VisualTokens(features=case.inputs["features"], grid=(side, side), num_views=tubelets)

    results = carve(tokens, keep_tokens=case.options["keep_tokens"])

    tolerance = case.tolerance["importance"]
    assert_close(
        changes(tokens),
        case.expected["importance"],
        rtol=tolerance["rtol"],
        atol=tolerance["atol"],
    )
    assert len(results) == case.options["clips"]
    for image, result in enumerate(results):
        assert result.positions.tolist() == case.expected["positions"][image].tolist()
        assert torch.equal(result.features, case.expected["features"][image])


def test_the_cells_that_change_are_kept_wherever_they_are_in_the_clip():
    tokens = clip([0.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 5.0, 9.0], [1.0, 5.0, 9.0])

    result = carve(tokens, keep_tokens=4)[0]

    # Frame 0 is scored like frame 1, so cell 1 comes twice, the earlier one first.
    assert by_rank(result) == [8, 1, 4, 9]


def test_a_cut_between_the_equal_scores_of_the_first_two_frames_keeps_the_first_frame():
    tokens = clip([0.0, 0.0], [3.0, 2.0], [3.0, 2.0])

    assert by_rank(carve(tokens, keep_tokens=1)[0]) == [0]
    assert by_rank(carve(tokens, keep_tokens=3)[0]) == [0, 2, 1]


def test_a_clip_that_stands_still_keeps_the_lowest_positions():
    tokens = clip(*[[1.0, 2.0, 3.0]] * 4)

    assert by_rank(carve(tokens, keep_tokens=5)[0]) == [0, 1, 2, 3, 4]


def test_the_first_frame_can_be_kept_whole_before_any_change():
    tokens = clip([0.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 5.0, 9.0], [1.0, 5.0, 9.0])

    result = carve(tokens, keep_tokens=6, first_frame="keep")[0]

    assert by_rank(result) == [1, 0, 2, 8, 4, 9]  # frame 0 from its middle outwards, then changes


def test_a_budget_below_one_frame_spreads_over_the_first_frame_where_it_is_kept():
    tokens = make_tokens([], grid=(5, 7), num_views=3)

    result = carve(tokens, keep_tokens=8, first_frame="keep")[1]

    still = VisualTokens(features=tokens.features[:, :35], grid=(5, 7))
    grid = carvers.build("uniform_grid", {"keep_tokens": 8}).carve(still)[1]
    assert result.positions.tolist() == grid.positions.tolist()
    assert result.ranks.tolist() == grid.ranks.tolist()


@pytest.mark.parametrize("first_frame", ["faithful", "keep"])
@pytest.mark.parametrize(
    ("num_views", "tiles"), [(1, None), (3, TileLayout(rows=1, columns=2, unpadded=(0, 5, 0, 14)))]
)
def test_one_image_has_no_time_and_is_kept_coarse_to_fine(first_frame, num_views, tiles):
    made = make_tokens([], grid=(5, 7), num_views=num_views)
    tokens = VisualTokens(features=made.features, grid=(5, 7), num_views=num_views, tiles=tiles)

    results = carve(tokens, keep_tokens=11, first_frame=first_frame)

    expected = carvers.build("uniform_grid", {"keep_tokens": 11}).carve(tokens)
    assert [by_rank(r) for r in results] == [by_rank(r) for r in expected]


def test_changes_of_half_precision_features_are_measured_in_float32():
    # 200 cells wide, each value changes by 300: the sum of squares is far above what float16 holds.
    features = torch.zeros(1, 4, 200, dtype=torch.float16)
    features[0, 3] = 300.0
    tokens = VisualTokens(features=features, grid=(1, 2), num_views=2)

    assert_close(changes(tokens), torch.tensor([[0.0, 1.0, 0.0, 1.0]]) * 300 * 200**0.5)
