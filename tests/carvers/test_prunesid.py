from fractions import Fraction
from itertools import combinations

import pytest
import torch
from torch import Tensor

from pipeline import carvers
from pipeline.carvers.prunesid import _shares
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens


def in_order(result: CarvedTokens) -> list[int]:
    return result.positions[result.ranks.argsort()].tolist()


def literal_shares(sizes: list[int], kept: list[int], budget: int) -> list[int]:
    """The sharing out of one image's budget, in whole numbers and fractions."""
    groups = range(len(sizes))
    least = [min(1, n) for n in sizes]
    most = [min(5 * -(-budget // 64), n, k) for n, k in zip(sizes, kept, strict=True)]
    while sum(most) < budget:
        most = [min(m + 1, n) for m, n in zip(most, sizes, strict=True)]
    others = budget - sum(least)
    ends = [round(Fraction(sum(kept[: g + 1]) * others, sum(kept))) for g in groups]
    parts = [end - start for end, start in zip(ends, [0, *ends], strict=False)]
    shares = [min(p + low, m) for p, low, m in zip(parts, least, most, strict=True)]
    for group in sorted(groups, key=lambda g: -kept[g]):
        shares[group] += min(budget - sum(shares), most[group] - shares[group])
    return shares


def literal(features: Tensor, scores: Tensor | None, budget: int) -> set[int]:
    """The kept positions of one image, group by group, in float64."""
    values = features.sigmoid().double()
    values = values - values.mean(dim=1, keepdim=True)
    weights = torch.linalg.svd(values, full_matrices=False).U.abs()[:, : max(1, budget // 4)]
    rating = (weights.amax(dim=1) if scores is None else scores).tolist()
    owners = weights.argmax(dim=1).tolist()
    rows = features.double()
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows, dim=2)
    pairs = [float(cosines[i, j]) for i, j in combinations(range(len(rows)), 2)]
    threshold = budget / 32 * sum(pairs) / len(pairs)
    ranked, kept = [], []
    for group in range(weights.shape[1]):
        rest = sorted((i for i, g in enumerate(owners) if g == group), key=lambda i: -rating[i])
        survivors: list[int] = []
        suppressed: list[int] = []
        while rest:
            best = rest.pop(0)
            survivors.append(best)
            suppressed += [j for j in rest if cosines[best, j] > threshold]
            rest = [j for j in rest if cosines[best, j] <= threshold]
        ranked.append(survivors + sorted(suppressed, key=lambda i: -rating[i]))
        kept.append(len(survivors))
    shares = literal_shares([len(r) for r in ranked], kept, budget)
    return {i for r, share in zip(ranked, shares, strict=True) for i in r[:share]}


def structured(batch: int, grid: tuple[int, int], seed: int, width: int) -> VisualTokens:
    """Tokens of few themes of different strength, on a common mean."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = grid[0] * grid[1]
    themes = torch.randn(batch, 8, width, generator=generator)
    shares = torch.rand(batch, num_tokens, 8, generator=generator) ** 3
    features = (shares * torch.arange(8, 0, -1)) @ themes / 3 + 0.4
    features += 0.3 * torch.randn(features.shape, generator=generator)
    attention = torch.rand(batch, num_tokens, generator=generator)
    return VisualTokens(features=features, grid=grid, signals={"cls_attention": attention})


@pytest.mark.parametrize("score", ["attention", "projection"])
@pytest.mark.parametrize("keep", [1, 7, 16, 33, 40])
@pytest.mark.parametrize(("grid", "width"), [((6, 8), 64), ((5, 13), 20)])
def test_it_equals_the_rule_written_out(grid, width, keep, score):
    tokens = structured(2, grid, keep, width)
    carver = carvers.build("prunesid", {"keep_tokens": keep, "score": score})

    results = carver.carve(tokens)

    for image, result in enumerate(results):
        scores = tokens.signals["cls_attention"][image] if score == "attention" else None
        assert set(result.positions.tolist()) == literal(tokens.features[image], scores, keep)
        assert len(result.positions) == keep


@pytest.mark.parametrize("budget", [4, 16, 64, 65, 130])
def test_shares_equal_the_rule_written_out(budget):
    generator = torch.Generator().manual_seed(budget)
    sizes = torch.randint(0, 40, (20, budget // 4), generator=generator)
    sizes[:, 0] += budget  # so that there are tokens enough
    kept = (torch.rand(sizes.shape, generator=generator) ** 4 * sizes).ceil().long()
    kept = kept.where(sizes == 0, kept.clamp_min(1))

    for row_sizes, row_kept in zip(sizes, kept, strict=True):
        shares = _shares(row_sizes[None], row_kept[None], budget)[0].tolist()

        assert shares == literal_shares(row_sizes.tolist(), row_kept.tolist(), budget)
        assert sum(shares) == budget


def test_shares_of_a_batch_equal_those_of_its_images():
    sizes = torch.tensor([[30, 2, 0, 4], [9, 9, 9, 9], [33, 1, 1, 1]])
    kept = torch.tensor([[1, 1, 0, 1], [9, 2, 3, 4], [5, 1, 1, 1]])

    together = _shares(sizes, kept, 16)

    assert together.tolist() == [
        literal_shares(s, k, 16) for s, k in zip(sizes.tolist(), kept.tolist(), strict=True)
    ]


def test_the_best_of_each_group_comes_before_the_second_best():
    # Two themes of different strength, four tokens each, alternating.
    width = torch.arange(12.0)
    themes = torch.stack([torch.cos(width), 0.5 * torch.sin(2 * width)])
    strengths = torch.tensor([1.0, 1.1, 1.2, 1.3]).repeat_interleave(2)[:, None]
    features = themes[torch.arange(8) % 2] * strengths
    attention = torch.tensor([[0.8, 0.4, 0.7, 0.3, 0.6, 0.2, 0.5, 0.1]])
    tokens = VisualTokens(
        features=features[None], grid=(2, 4), signals={"cls_attention": attention}
    )

    result = carvers.build("prunesid", {"keep_tokens": 8, "score": "attention"}).carve(tokens)[0]

    assert in_order(result) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_only_the_signal_that_scores_is_needed():
    projection = carvers.build("prunesid", {"score": "projection"})
    received = carvers.build("prunesid", {"attention": "received_attention"})

    assert projection.needs == frozenset()
    assert received.needs == {"received_attention"}
    assert carvers.build("prunesid").needs == {"cls_attention"}


def test_equal_tokens_are_one_group_in_the_order_of_attention():
    tokens = make_tokens(["cls_attention"], batch=1)
    features = torch.full_like(tokens.features, 0.1)
    constant = VisualTokens(features=features, grid=tokens.grid, signals=tokens.signals)

    result = carvers.build("prunesid", {"keep_tokens": 12}).carve(constant)[0]

    expected = tokens.signals["cls_attention"][0].argsort(descending=True)[:12].tolist()
    assert in_order(result) == expected
