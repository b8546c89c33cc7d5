import numpy as np
import pytest
import torch

from pipeline import carvers
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("otprune", options).carve(tokens)


def picks(result: CarvedTokens) -> list[int]:
    """Positions in the order of picking."""
    return result.positions[result.ranks.argsort()].tolist()


def literal(features: torch.Tensor, num_kept: int) -> list[int]:
    """The rule by determinants of every possible next set, in float64."""
    rows = features.double().numpy()
    columns = rows / np.linalg.norm(rows, axis=0)
    products = columns @ columns.T
    kernel = np.eye(len(rows)) + 0.01 * products @ products.T
    kept: list[int] = []
    while len(kept) < num_kept:
        rest = [i for i in range(len(rows)) if i not in kept]
        sets = [[*kept, i] for i in rest]
        volumes = [np.linalg.slogdet(kernel[np.ix_(s, s)])[1] for s in sets]
        kept.append(rest[int(np.argmax(volumes))])
    return kept


@pytest.mark.parametrize(
    ("grid", "width", "keep"), [((3, 7), 60, 8), ((6, 2), 300, 12), ((5, 5), 40, 9)]
)
def test_it_equals_the_rule_written_out(grid, width, keep):
    tokens = make_tokens([], grid=grid, width=width, seed=6)

    for features, result in zip(tokens.features, carve(tokens, keep_tokens=keep), strict=True):
        assert picks(result) == literal(features, keep)


def test_what_fewer_tokens_show_is_kept_first():
    # Each token shows one thing: two of them 2, one 1, the others 0.
    shows = torch.tensor([0, 0, 2, 0, 1, 0, 2, 0])
    tokens = VisualTokens(features=torch.eye(3)[shows][None], grid=(2, 4))

    assert picks(carve(tokens, keep_tokens=5)[0]) == [4, 2, 6, 0, 1]


def test_scale_of_a_feature_dimension_does_not_matter():
    tokens = make_tokens([], seed=2)
    scales = torch.tensor([2.0, 1.0, 0.25, 64.0]).repeat(10)
    scaled = VisualTokens(features=tokens.features * scales, grid=tokens.grid)

    for left, right in zip(carve(tokens), carve(scaled), strict=True):
        assert picks(left) == picks(right)


def test_dimensions_that_are_zero_everywhere_change_nothing():
    tokens = make_tokens([], seed=3)
    empty = torch.zeros_like(tokens.features[..., :9])
    padded = VisualTokens(features=torch.cat([tokens.features, empty], 2), grid=tokens.grid)

    for left, right in zip(carve(tokens), carve(padded), strict=True):
        assert picks(left) == picks(right)


def test_large_half_precision_features_do_not_overflow():
    tokens = make_tokens([], seed=4)
    scaled = VisualTokens(features=(tokens.features * 8192).half(), grid=tokens.grid)
    small = VisualTokens(features=tokens.features.half(), grid=tokens.grid)

    for left, right in zip(carve(scaled), carve(small), strict=True):
        assert picks(left) == picks(right)


def test_an_image_of_zeros_keeps_its_first_tokens():
    tokens = VisualTokens(features=torch.zeros(1, 20, 8), grid=(4, 5))

    assert picks(carve(tokens, keep_tokens=6)[0]) == list(range(6))
