import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pipeline import carvers
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("apet", options).carve(tokens)


def by_the_text(features: Tensor, keep: int, num_basis: int, placement: str) -> dict[int, tuple]:
    """Return position -> (feature, size), token by token; features in float64."""
    num_tokens = len(features)
    distances = [float((row - features.mean(dim=0)).norm()) for row in features]
    basis = [distances.index(min(distances))]
    while len(basis) < (num_basis if num_basis < keep else keep // 2):
        nearest = [min(float((row - features[b]).norm()) for b in basis) for row in features]
        basis.append(nearest.index(max(nearest)))
    rows = features[basis]
    weights = torch.linalg.solve(rows @ rows.T + 1e-5 * torch.eye(len(basis)), rows @ features.T)
    errors = [float((features[i] - weights[:, i] @ rows).norm()) for i in range(num_tokens)]
    order = sorted(range(num_tokens), key=lambda i: -errors[i])
    if placement == "faithful":
        others = order[: keep - len(basis)]
        places = order[keep - len(basis) : keep]
        dropped = order[keep:]
    else:
        order = [i for i in order if i not in basis]
        others, dropped = order[: keep - len(basis)], order[keep - len(basis) :]
        places = basis
    groups = {i: [i] for i in others}
    for i in dropped:
        cosines = [float(torch.cosine_similarity(features[i], features[o], dim=0)) for o in others]
        groups[others[cosines.index(max(cosines))]].append(i)
    kept = {p: (features[b], 1) for p, b in zip(places, basis, strict=True)}
    return kept | {i: (features[g].mean(dim=0), len(g)) for i, g in groups.items()}


@pytest.mark.parametrize("placement", ["corrected", "faithful"])
@pytest.mark.parametrize(
    ("grid", "width", "keep", "num_basis"),
    [
        ((5, 7), 40, 20, 6),
        ((6, 8), 12, 30, 10),
        ((4, 9), 20, 9, 10),
        ((3, 5), 30, 14, 3),
        ((5, 6), 24, 11, 10),
    ],
)
def test_it_equals_the_rules_token_by_token(placement, grid, width, keep, num_basis):
    tokens = make_tokens([], grid=grid, width=width, batch=2)

    results = carve(tokens, keep_tokens=keep, num_basis=num_basis, placement=placement)

    for features, result in zip(tokens.features.double(), results, strict=True):
        expected = by_the_text(features, keep, num_basis, placement)
        assert result.positions.tolist() == sorted(expected)
        assert result.sizes.tolist() == [expected[p][1] for p in sorted(expected)]
        rows = torch.stack([expected[p][0] for p in sorted(expected)])
        assert_close(result.features.double(), rows, rtol=1e-5, atol=1e-5)


def plane() -> VisualTokens:
    """Seven tokens in four dimensions, two of them alone in the third and the fourth."""
    rows = torch.zeros(1, 7, 4)
    rows[0, :, 0] = torch.tensor([3.0, 1.0, 9.0, 2.0, 2.0, 1.0, 3.0])
    rows[0, :, 1] = torch.tensor([2.0, 3.0, 0.0, 4.0, 3.0, -9.0, 1.0])
    rows[0, 4, 2] = 3.0
    rows[0, 6, 3] = 1.0
    return VisualTokens(features=rows, grid=(1, 7))


def test_the_basis_and_what_it_does_not_reconstruct_are_kept():
    # The mean is (3, 4/7, 3/7, 1/7): token 6 is nearest it. A budget of 4 has two basis tokens, the
    # second is 5, the farthest from 6. They leave 3.08 of token 4, 2.75 of 2, less of the others.
    result = carve(plane(), keep_tokens=4)[0]

    assert result.positions.tolist() == [2, 4, 5, 6]
    assert result.positions[result.ranks.argsort()].tolist() == [6, 4, 5, 2]  # in turns
    assert torch.equal(result.features[2:], plane().features[0, [5, 6]])
    assert result.sizes[2:].tolist() == [1.0, 1.0]
    assert result.sizes.sum() == 7


def test_the_published_placement_loses_the_tokens_whose_places_the_basis_takes():
    tokens = plane()

    result = carve(tokens, keep_tokens=4, placement="faithful")[0]

    kept = dict(zip(result.positions.tolist(), result.features, strict=True))
    taken = sorted(kept.keys() - {2, 4})  # the places of the third and fourth largest error
    assert len(taken) == 2
    assert not {5, 6} & set(taken)
    held = {tuple(kept[place].tolist()) for place in taken}
    assert held == {tuple(row.tolist()) for row in tokens.features[0, [5, 6]]}
    # What was at those places is in no mean; the basis tokens are, beside being kept.
    merged = sum(size * row for size, row in zip(result.sizes, result.features, strict=True))
    lost = tokens.features[0, taken].sum(dim=0)
    basis = tokens.features[0, [5, 6]].sum(dim=0)
    assert_close(merged, tokens.features[0].sum(dim=0) - lost + basis)


def test_only_the_corrected_placement_counts_every_token_once():
    faithful = carvers.build("apet", {"placement": "faithful"})

    assert carvers.build("apet").conserves
    assert not faithful.conserves


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_at_most_half_of_a_small_budget_is_basis(keep):
    tokens = make_tokens([])

    for result in carve(tokens, keep_tokens=keep):
        assert len(result.positions) == keep
        assert result.sizes.sum() == 35
        assert (result.sizes > 1).sum() <= keep - keep // 2


def test_a_single_token_is_the_mean_of_the_image_where_the_longest_stands():
    tokens = make_tokens([])

    result = carve(tokens, keep_tokens=1)[0]

    assert result.positions.tolist() == [int(tokens.features[0].norm(dim=1).argmax())]
    assert_close(result.features[0], tokens.features[0].mean(dim=0))


@pytest.mark.parametrize("placement", ["corrected", "faithful"])
def test_large_equal_tokens_do_not_break_the_solution(placement):
    features = torch.full((1, 36, 48), 4096.0)
    features[0, 20] = 1.0
    tokens = VisualTokens(features=features, grid=(6, 6))

    result = carve(tokens, keep_tokens=24, placement=placement)[0]

    assert result.features.isfinite().all()
    assert len(result.positions) == 24
    assert result.sizes.sum() == 36


def test_the_faithful_placement_leaves_a_budget_of_all_tokens_unchanged():
    tokens = make_tokens([])

    for image, result in enumerate(carve(tokens, keep_tokens=35, placement="faithful")):
        assert torch.equal(result.features, tokens.features[image])
