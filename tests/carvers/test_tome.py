import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pipeline import carvers
from pipeline.carvers import _merge
from pipeline.carvers.tome import match
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens
from tests.golden import golden_cases

# A class token is set aside by the published step; the tokens here are visual tokens only.
CASES = [case for case in golden_cases("tome") if not case.options["class_token"]]


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("tome", options).carve(tokens)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_equals_the_published_code(case):
    merged = case.options["effective_merge_count"]

    rows = match(case.inputs["metric"][None], merged)

    assert rows[0].tolist() == case.expected["assignment"].tolist()
    # A token of size s is s equal tokens that were merged before.
    sizes = case.inputs["sizes"].long()
    members = case.inputs["features"].repeat_interleave(sizes, dim=0)[None]
    owners = rows.repeat_interleave(sizes, dim=1)
    features, sizes_after, _ = _merge.group_means(members, owners, case.options["output_tokens"])
    assert torch.equal(sizes_after[0], case.expected["sizes"])
    tolerance = case.tolerance["features"]
    assert_close(
        features[0],
        case.expected["features"],
        rtol=tolerance["rtol"],
        atol=tolerance["atol"],
    )


def test_golden_cases_without_a_class_token_are_there():
    assert len(CASES) == 3


def by_steps(features: Tensor, metric: Tensor, keep: int) -> list[tuple[list[int], Tensor]]:
    """Merge token by token as the paper says: size-weighted means, a list that is rebuilt."""
    tokens = [([i], features[i].double(), metric[i].double()) for i in range(len(features))]
    while len(tokens) > keep:
        even, odd = tokens[::2], tokens[1::2]
        proposals = []
        for token in even:
            cosines = [torch.cosine_similarity(token[2], o[2], dim=0).item() for o in odd]
            partner = max(range(len(odd)), key=lambda j: (cosines[j], -j))
            proposals.append((cosines[partner], partner))
        order = sorted(range(len(even)), key=lambda i: (-proposals[i][0], i))
        count = min(len(tokens) // 2, len(tokens) - keep)
        joined = [[o] for o in odd]
        for i in order[:count]:
            joined[proposals[i][1]].append(even[i])
        tokens = [even[i] for i in order[count:]] + [merged(group) for group in joined]
    return [(sorted(members), feature) for members, feature, _ in tokens]


def merged(group: list[tuple[list[int], Tensor, Tensor]]) -> tuple[list[int], Tensor, Tensor]:
    size = sum(len(members) for members, _, _ in group)
    feature = sum(len(members) * f for members, f, _ in group) / size
    metric = sum(len(members) * m for members, _, m in group) / size
    return [i for members, _, _ in group for i in members], feature, metric


@pytest.mark.parametrize("metric", ["mean_keys", "features"])
@pytest.mark.parametrize(
    ("grid", "keep"), [((6, 8), 40), ((6, 8), 24), ((6, 8), 5), ((5, 7), 9), ((3, 3), 1)]
)
def test_it_equals_merging_step_by_step_down_to_the_budget(metric, grid, keep):
    tokens = make_tokens(["mean_keys"], grid=grid, batch=2)

    results = carve(tokens, keep_tokens=keep, metric=metric)

    for image, result in enumerate(results):
        compared = tokens.features if metric == "features" else tokens.signals["mean_keys"]
        expected = by_steps(tokens.features[image], compared[image], keep)
        expected.sort(key=lambda token: token[0][(len(token[0]) - 1) // 2])
        medians = [members[(len(members) - 1) // 2] for members, _ in expected]
        assert result.positions.tolist() == medians
        assert result.sizes.tolist() == [len(members) for members, _ in expected]
        assert_close(result.features, torch.stack([f for _, f in expected]).float())


def test_the_most_similar_pair_is_merged_and_the_larger_token_ranks_first():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.5, 1.0], [3.0, -1.0]])[None]
    tokens = VisualTokens(features=features, grid=(1, 5))

    # Odd places are 1 and 3. Token 2 is nearest to 3, then 0 to 3, nearer than 4 is.
    result = carve(tokens, metric="features", keep_tokens=3)[0]

    assert result.positions.tolist() == [1, 2, 4]
    assert result.sizes.tolist() == [1.0, 3.0, 1.0]
    assert result.ranks.tolist() == [1, 0, 2]
    assert_close(result.features[1], torch.tensor([2.1, 1.8]) / 3)


def test_a_zero_token_is_similar_to_nothing_and_is_merged_last():
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.1], [0.0, 1.0], [1.0, 0.1]])[None]
    tokens = VisualTokens(features=features, grid=(1, 5))

    result = carve(tokens, metric="features", keep_tokens=3)[0]

    # Cosines with the best odd token: 0 has 0, 2 has 0.1 with token 3, 4 nearly 1 with token 1.
    assert result.positions.tolist() == [0, 1, 2]
    assert result.sizes.tolist() == [1.0, 2.0, 2.0]


def test_each_metric_asks_for_what_it_compares():
    assert carvers.build("tome").needs == {"mean_keys"}
    assert carvers.build("tome", {"metric": "features"}).needs == frozenset()
