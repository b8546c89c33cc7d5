import pytest
import torch
from torch.testing import assert_close

from pipeline import carvers
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens

NEEDS = ["cls_attention", "shallow_attention"]


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("vscan", options).carve(tokens)


def published_selection(early, late, keep: int) -> set[int]:
    """A 24 x 24 grid in 16 windows, with as many of each as divide."""
    quota = keep // 2 // 16
    local = set()
    for top in range(0, 24, 6):
        for left in range(0, 24, 6):
            window = [24 * r + c for r in range(top, top + 6) for c in range(left, left + 6)]
            local |= set(sorted(window, key=lambda i: -early[i])[:quota])
    others = sorted(set(range(576)) - local, key=lambda i: -late[i])
    return local | set(others[: keep - keep // 2])


def merged(features, kept: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Every dropped token joins the most similar kept one; plain means."""
    features = features.double()
    members = {k: [k] for k in kept}
    for i in sorted(set(range(len(features))) - set(kept)):
        cosines = [
            float(features[i] @ features[k] / features[i].norm() / features[k].norm()) for k in kept
        ]
        members[kept[cosines.index(max(cosines))]].append(i)
    means = [torch.stack([features[i] for i in members[k]]).mean(dim=0) for k in kept]
    return torch.stack(means).float(), [len(members[k]) for k in kept]


@pytest.mark.parametrize(
    "keep", [32, *(pytest.param(keep, marks=pytest.mark.slow) for keep in (64, 96))]
)
def test_it_equals_a_slow_loop_on_the_published_grid(keep):
    tokens = make_tokens(NEEDS, batch=2, grid=(24, 24), width=16)

    results = carve(tokens, keep_tokens=keep)

    for image, result in enumerate(results):
        early = tokens.signals["shallow_attention"][image].tolist()
        late = tokens.signals["cls_attention"][image].tolist()
        kept = sorted(published_selection(early, late, keep))
        assert result.positions.tolist() == kept
        features, sizes = merged(tokens.features[image], kept)
        assert_close(result.features, features, rtol=1e-5, atol=1e-5)
        assert result.sizes.tolist() == sizes


@pytest.mark.parametrize(
    ("grid", "keep", "views"), [((5, 7), 9, 1), ((13, 4), 20, 1), ((3, 4), 8, 3), ((1, 9), 2, 1)]
)
def test_merging_equals_a_slow_loop_on_any_grid(grid, keep, views):
    tokens = make_tokens(NEEDS, batch=2, grid=grid, width=16, num_views=views)

    results = carve(tokens, keep_tokens=keep)

    for image, result in enumerate(results):
        features, sizes = merged(tokens.features[image], result.positions.tolist())
        assert len(result.positions) == keep
        assert_close(result.features, features, rtol=1e-5, atol=1e-5)
        assert result.sizes.tolist() == sizes


@pytest.mark.parametrize("keep", [58, 48, 5])
def test_a_budget_that_the_windows_do_not_divide_is_spent_where_the_early_layer_looks(keep):
    tokens = make_tokens(NEEDS, batch=1, grid=(24, 24), width=8)
    early = tokens.signals["shallow_attention"][0].tolist()
    late = tokens.signals["cls_attention"][0].tolist()
    cells = [24 * r + c for r in range(6) for c in range(6)]
    windows = [
        sorted((corner + i for i in cells), key=lambda i: -early[i])
        for corner in (24 * r + c for r in range(0, 24, 6) for c in range(0, 24, 6))
    ]
    whole, left_over = divmod(keep // 2, 16)
    local = {i for window in windows for i in window[:whole]}
    local |= set(sorted((w[whole] for w in windows), key=lambda i: -early[i])[:left_over])
    others = sorted(set(range(576)) - local, key=lambda i: -late[i])[: keep - keep // 2]

    result = carve(tokens, keep_tokens=keep)[0]

    assert result.positions.tolist() == sorted(local | set(others))


def by_hand(grid: tuple[int, int], early: list[float], late: list[float], views: int = 1):
    num_tokens = len(early)
    return VisualTokens(
        features=torch.eye(num_tokens)[None],
        grid=grid,
        signals={
            "shallow_attention": torch.tensor([early]),
            "cls_attention": torch.tensor([late]),
        },
        num_views=views,
    )


def test_each_window_gives_its_best_token_even_if_another_has_better_ones():
    # Two windows of 1 x 3; the early layer prefers all of the first, the late one the last token.
    tokens = by_hand((1, 6), [0.9, 0.8, 0.7, 0.2, 0.3, 0.1], [0, 0, 0, 0, 0.2, 0.9])

    result = carve(tokens, window=3, keep_tokens=4)[0]

    # Local 0 and 4; global 5, then the first of equal ones that is not local yet.
    assert result.positions.tolist() == [0, 1, 4, 5]


def test_what_a_small_window_cannot_give_others_do():
    # 3 x 3 in windows of at most 2 x 2: four, two, two and one token; of 17 local ones each of the
    # 16 windows gives one, and the last can come from any window but those of one token.
    tokens = make_tokens(NEEDS, batch=1, grid=(3, 3), num_views=4, seed=5)
    early = tokens.signals["shallow_attention"][0].tolist()
    late = tokens.signals["cls_attention"][0].tolist()
    windows = [
        sorted((9 * view + i for i in cells), key=lambda i: -early[i])
        for view in range(4)
        for cells in ([0, 1, 3, 4], [2, 5], [6, 7], [8])
    ]
    local = {window[0] for window in windows}
    local.add(max((w[1] for w in windows if len(w) > 1), key=lambda i: early[i]))
    others = sorted(set(range(36)) - local, key=lambda i: -late[i])[:17]

    result = carve(tokens, window=2, keep_tokens=34)[0]

    assert result.positions.tolist() == sorted(local | set(others))


def test_windows_of_a_grid_that_does_not_divide_are_as_equal_as_can_be():
    # Seven columns in windows of at most 3: 3 + 2 + 2, not 3 + 3 + 1.
    early = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    tokens = by_hand((1, 7), early, [1.0, 0.9, 0.8, 0.0, 0.0, 0.0, 0.0])

    result = carve(tokens, window=3, keep_tokens=6)[0]

    # The best of each window are 2, 4 and 6; the late layer adds 0, 1 and, of equal ones, 3.
    assert result.positions.tolist() == [0, 1, 2, 3, 4, 6]


def test_every_view_has_windows_of_its_own():
    tokens = by_hand((1, 2), [0.9, 0.8, 0.1, 0.2], [0.4, 0.1, 0.2, 0.3], views=2)

    result = carve(tokens, keep_tokens=3)[0]
    all_of_both = carve(tokens, keep_tokens=4)[0]

    # One local token: 0; two global ones: 3 and 2.
    assert result.positions.tolist() == [0, 2, 3]
    # Local: 0 of the first view and 3 of the second; global: 2 and 1.
    assert all_of_both.positions[all_of_both.ranks.argsort()].tolist() == [0, 2, 3, 1]


def test_one_token_is_a_global_one_that_stands_for_all():
    tokens = make_tokens(NEEDS, batch=1, grid=(4, 5))

    result = carve(tokens, keep_tokens=1)[0]

    assert result.positions.tolist() == [int(tokens.signals["cls_attention"][0].argmax())]
    assert_close(result.features[0], tokens.features[0].mean(dim=0))
    assert result.sizes.tolist() == [20]


def test_received_attention_takes_the_place_of_the_class_token():
    tokens = make_tokens(NEEDS, batch=1, grid=(5, 6))
    signals = dict(tokens.signals)
    signals["received_attention"] = signals.pop("cls_attention")
    received = VisualTokens(features=tokens.features, grid=tokens.grid, signals=signals)

    expected = carve(tokens, keep_tokens=7)[0]
    result = carve(received, keep_tokens=7, attention="received_attention")[0]

    assert torch.equal(result.positions, expected.positions)
