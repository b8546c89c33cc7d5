import pytest
import torch

from pipeline import carvers
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens
from tests.golden import golden_cases

PORT = golden_cases("hiprune")
FITTING = [case for case in PORT if case.options["kept_tokens"] == case.options["keep_tokens"]]
EXCEEDING = [case for case in PORT if case.options["kept_tokens"] > case.options["keep_tokens"]]
NEEDS = ["cls_attention", "shallow_attention"]


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("hiprune", options).carve(tokens)


def golden(case) -> tuple[VisualTokens, dict[str, object]]:
    tokens = VisualTokens(
        features=case.inputs["features"][None],
        grid=(case.options["grid_height"], case.options["grid_width"]),
        signals={
            "cls_attention": case.inputs["deep_attention"][None],
            "shallow_attention": case.inputs["shallow_attention"][None],
        },
    )
    return tokens, {"keep_tokens": case.options["keep_tokens"], "alpha": case.options["alpha"]}


def looking_at(grid: tuple[int, int], anchors: list[int]) -> VisualTokens:
    """Return tokens whose early layer looks at some, most at the first; the late one at the end."""
    num_tokens = grid[0] * grid[1]
    early = torch.zeros(1, num_tokens)
    early[0, anchors] = torch.arange(len(anchors), 0, -1.0)
    late = torch.arange(num_tokens)[None].float()
    return VisualTokens(
        features=torch.arange(num_tokens)[None, :, None].float(),
        grid=grid,
        signals={"cls_attention": late, "shallow_attention": early},
    )


def test_both_kinds_of_golden_cases_are_there():
    assert len(FITTING) == 4
    assert len(EXCEEDING) == 1


@pytest.mark.parametrize("case", FITTING, ids=lambda case: case.name)
def test_it_equals_the_released_port(case):
    tokens, options = golden(case)

    result = carve(tokens, **options)[0]

    assert result.positions.tolist() == case.expected["positions"].tolist()
    assert torch.equal(result.features, case.expected["features"])


@pytest.mark.parametrize("case", EXCEEDING, ids=lambda case: case.name)
def test_where_the_port_exceeds_the_budget_the_least_looked_at_of_its_tokens_go(case):
    tokens, options = golden(case)
    early = case.inputs["shallow_attention"]
    kept_by_port = case.expected["positions"].long()
    best = kept_by_port[early[kept_by_port].argsort(descending=True)][: options["keep_tokens"]]

    result = carve(tokens, **options)[0]

    assert result.positions.tolist() == sorted(best.tolist())
    assert result.positions[result.ranks.argsort()].tolist() == best.tolist()


@pytest.mark.parametrize("case", EXCEEDING, ids=lambda case: case.name)
def test_with_room_for_them_all_tokens_around_the_anchors_of_the_port_stay(case):
    tokens, options = golden(case)
    anchors = case.options["anchors"]
    room = case.options["kept_tokens"]
    options = {"keep_tokens": room, "alpha": anchors * 5 / room}

    result = carve(tokens, **options)[0]

    assert result.positions.tolist() == case.expected["positions"].tolist()


@pytest.mark.parametrize(
    ("neighbours", "anchor", "expected"),
    [
        ("faithful", 5, {4, 5, 6, 1, 9}),
        ("grid", 5, {4, 5, 6, 1, 9}),
        ("faithful", 7, {6, 7, 8, 3, 11}),  # 8 is in the next row
        ("grid", 7, {6, 7, 3, 11}),
        ("faithful", 2, {1, 2, 3, 0, 6}),  # 2 - 4 is clamped to 0
        ("grid", 2, {1, 2, 3, 6}),
        ("faithful", 9, {8, 9, 10, 5, 11}),  # 9 + 4 is clamped to 11
        ("grid", 9, {8, 9, 10, 5}),
        ("faithful", 0, {0, 1, 4}),
        ("grid", 0, {0, 1, 4}),
    ],
)
def test_an_anchor_brings_its_neighbours(neighbours, anchor, expected):
    tokens = looking_at((3, 4), [anchor])

    result = carve(tokens, neighbours=neighbours, alpha=1.0, keep_tokens=len(expected))[0]

    assert set(result.positions.tolist()) == expected


@pytest.mark.parametrize(("grid", "expected"), [((1, 7), {2, 3, 4}), ((7, 1), {2, 3, 4})])
def test_neighbours_on_a_grid_of_one_row_or_column(grid, expected):
    tokens = looking_at(grid, [3])

    # One anchor; the late layer fills up from the end.
    result = carve(tokens, neighbours="grid", alpha=1.0, keep_tokens=5)[0]

    assert set(result.positions.tolist()) == expected | {6, 5}


@pytest.mark.parametrize(
    ("alpha", "keep", "anchors"),
    [(0.1, 128, 3), (0.1, 25, 1), (0.1, 4, 0), (0.0, 50, 0), (1.0, 25, 5), (0.5, 25, 2)],
)
def test_the_number_of_anchors_follows_from_the_budget(alpha, keep, anchors):
    # Anchors two rows and columns apart share no neighbour; the late layer looks elsewhere.
    spots = [r * 24 + c for r in (2, 5, 8, 11) for c in range(2, 22, 4)]
    tokens = looking_at((24, 24), spots)

    result = carve(tokens, alpha=alpha, keep_tokens=keep)[0]

    filled = keep - 5 * anchors
    expected = [s + d for s in spots[:anchors] for d in (0, -1, 1, -24, 24)]
    assert result.positions.tolist() == sorted(expected + list(range(576 - filled, 576)))


def test_every_prefix_holds_tokens_around_anchors_and_others_in_turns():
    tokens = looking_at((6, 6), [14])

    result = carve(tokens, alpha=0.5, keep_tokens=10)[0]

    # Five around token 14, itself first; five from the end.
    assert result.positions[result.ranks.argsort()].tolist() == [
        14,
        35,
        8,
        34,
        13,
        33,
        15,
        32,
        20,
        31,
    ]


def test_neighbours_do_not_reach_into_another_view():
    one = looking_at((3, 4), [11])
    tokens = VisualTokens(
        features=one.features.repeat(1, 2, 1),
        grid=(3, 4),
        signals={name: signal.repeat(1, 2) for name, signal in one.signals.items()},
        num_views=2,
    )

    result = carve(tokens, alpha=0.6, keep_tokens=10)[0]

    alone = carve(one, alpha=0.6, keep_tokens=5)[0].positions.tolist()
    assert result.positions.tolist() == alone + [12 + position for position in alone]


def test_received_attention_takes_the_place_of_the_class_token():
    tokens = make_tokens(NEEDS, batch=1, grid=(5, 6))
    signals = dict(tokens.signals)
    signals["received_attention"] = signals.pop("cls_attention")
    received = VisualTokens(features=tokens.features, grid=tokens.grid, signals=signals)

    expected = carve(tokens, keep_tokens=7)[0]
    result = carve(received, keep_tokens=7, attention="received_attention")[0]

    assert torch.equal(result.positions, expected.positions)
